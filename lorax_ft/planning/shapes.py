"""A training step's arguments as shapes with placements: nothing is read or allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lorax_ft import training
from lorax_ft.adapted import Adapted, load_shapes, make_outputs
from lorax_ft.config import ExperimentConfig
from lorax_ft.data import SequenceToSequence, TextClassification
from lorax_ft.data.dataset import MODEL_TASKS
from lorax_ft.experiment import make_optimizer
from lorax_ft.memory import local_bytes, place, placed
from lorax_ft.training.paging import HOST, paged_arrays
from lorax_ft.training.sharding import batch_sharding

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A training step and the shapes of its arguments, each of which says where it lies."""

    function: Any  # jitted
    train: PyTree
    opt_state: PyTree
    frozen: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct
    misplaced: int  # bytes of paged states on a device whose description has no memory of a host
    mesh: jax.sharding.Mesh
    vocabulary: int
    longest: int | None  # rows that the model has positions for; None where they end nowhere

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.train, self.opt_state, self.frozen, self.batch, self.key


def describe(config: ExperimentConfig) -> Adapted:
    """The config's model with its methods, of shapes."""
    task = config.data.task
    names = task.label_names if isinstance(task, TextClassification) else ()
    return load_shapes(config, MODEL_TASKS[type(task)], names)


def make_step(config: ExperimentConfig, adapted: Adapted, devices: Sequence[Any]) -> Step:
    """The step of a run on these devices, laid out by the config's mesh, as `train` makes it.

    Its batch is of the longest bucket. Raises ValueError where the mesh does not divide the
    devices, the batch or a parameter, and where the model has no positions for the batch.
    """
    mesh = training.make_mesh(config.mesh, devices)
    alone = SingleDeviceSharding(mesh.devices.flat[0]) if mesh.size == 1 else None
    everywhere = alone or NamedSharding(mesh, PartitionSpec())
    tx = make_optimizer(config, config.train.steps)
    kept = place(adapted, tx, mesh)
    return Step(
        function=training.make_train_step(
            make_outputs(adapted.model, mesh, right_padded=True),
            training.OBJECTIVES[adapted.model.task],
            tx,
            accumulation=config.train.accumulation,
            out_shardings=kept.out_shardings,
        ),
        train=kept.train,
        opt_state=kept.opt_state,
        frozen=kept.frozen,
        batch={
            name: placed(x, alone or batch_sharding(name, x.shape, mesh))
            for name, x in batch_shapes(config).items()
        },
        misplaced=sum(
            local_bytes(x)
            for x in paged_arrays(tx, kept.opt_state, kept.train)
            if x.sharding.memory_kind != HOST
        ),
        key=placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere),
        mesh=mesh,
        vocabulary=adapted.model.config.vocab_size,
        longest=_longest(config, adapted.model.config.max_length),
    )


def batch_shapes(config: ExperimentConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A full batch of the longest bucket, as `data.loader` makes it."""
    loader, task = config.data.loader, config.data.task
    rows, length = loader.batch_size, loader.buckets[-1]

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    packing = () if config.data.packed_length is None else ("segment_ids", "position_ids")
    names = ("input_ids", "attention_mask", *packing)
    batch = {name: integers(rows, length) for name in names}
    if isinstance(task, SequenceToSequence):
        targets = (loader.target_buckets or (task.max_target_length,))[-1]
        batch |= {name: integers(rows, targets) for name in ("decoder_input_ids", "labels")}
    elif isinstance(task, TextClassification):
        batch["labels"] = integers(rows)
        if task.text_pair is not None:
            batch["token_type_ids"] = integers(rows, length)
    else:
        batch["labels"] = integers(rows, length)
    return {**batch, "weights": jax.ShapeDtypeStruct((rows,), jnp.float32)}


def _longest(config: ExperimentConfig, positions: int | None) -> int | None:
    """What trained vectors that stand in front leave of a model's positions."""
    if positions is None:
        return None
    in_front = (config.prompt, config.p_tuning, config.prefix)
    return positions - sum(section.length for section in in_front if section is not None)
