"""A group's program: its compiled steps, the shapes of its slots, what its members share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_ft import trees
from lorax_ft.adapted import Base, load_base, make_apply, make_outputs, with_head
from lorax_ft.config import ExperimentConfig
from lorax_ft.data import Dataset, Tokenizer, TrainSteps
from lorax_ft.experiment import Experiment, assemble, load_data, make_optimizer, training_key
from lorax_ft.models import hub
from lorax_ft.sweeps import devices, members, step
from lorax_ft.sweeps.groups import Group
from lorax_ft.sweeps.members import Stack
from lorax_ft.training.flops import count_flops
from lorax_ft.training.objectives import OBJECTIVES
from lorax_ft.training.step import NOT_INPUTS, signature

PyTree = Any
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(kw_only=True)
class Source:
    """A pretrained model and a data set, read once for all the runs that use them."""

    base: Base
    tokenizer: Tokenizer
    dataset: Dataset
    fingerprints: dict[int, str] = dataclasses.field(default_factory=dict)  # by seed
    epochs: dict[str, int] = dataclasses.field(default_factory=dict)  # steps, by loader

    def fingerprint(self, config: ExperimentConfig) -> str:
        """That of the base with the head of the config's seed."""
        if config.seed not in self.fingerprints:
            self.fingerprints[config.seed] = hub.fingerprint(with_head(self.base, config))
        return self.fingerprints[config.seed]

    def steps_per_epoch(self, config: ExperimentConfig) -> int:
        """How many batches an epoch of a run has, in whichever order."""
        loader = dataclasses.replace(config.data.loader, seed=None, prefetch=0)
        if repr(loader) not in self.epochs:
            self.epochs[repr(loader)] = steps_per_epoch(self.dataset, config)
        return self.epochs[repr(loader)]

    def total_steps(self, config: ExperimentConfig) -> int:
        """How many steps a run takes."""
        return config.train.total_steps(self.steps_per_epoch(config))


def check_members(config: ExperimentConfig) -> None:
    """Raises ValueError for what a run may have, but not a member of a sweep."""
    if config.mesh.size != 1:
        raise ValueError(
            f"config.mesh = {dataclasses.asdict(config.mesh)}: a run of a sweep has one "
            "device. Set its axes to 1, or train the runs one by one."
        )
    if config.optimizer.paged:
        raise ValueError(
            "config.optimizer.paged = True: the members of a sweep keep their optimizers' states "
            "on the device. Set it to False, or train the runs one by one."
        )


def load_source(config: ExperimentConfig) -> Source:
    """Reads the data and the model of a config. Raises as `experiment.prepare` does."""
    tokenizer, dataset = load_data(config)
    base = load_base(config, dataset.task, dataset.label_names)
    return Source(base=base, tokenizer=tokenizer, dataset=dataset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A run, ready for a slot."""

    stack: Stack  # padded
    size: int  # the number of the program's size that it is cut to for a step
    key: np.ndarray  # raw, of the run's PRNG key
    experiment: Experiment  # whose trees are not padded


class Program:
    """The steps of a group on so many slots; each shape of batch is compiled once, when asked for.

    `shapes` are those of one member's `Stack`, as large as the largest run of the group. The
    slots are parted among the devices of `mesh`. Those of a device are `vectorized` everywhere but
    on the core of a CPU, which one member fills; where they are not, each step is of one of the
    `sizes`, of which the last are `shapes`, and `run_sizes` says which each run has.
    """

    def __init__(self, source: Source, group: Group, slots: int, *, vectorized: bool | None = None):
        config = group.first
        self.vectorized = jax.default_backend() != "cpu" if vectorized is None else vectorized
        self.source, self.group, self.slots = source, group, slots
        self.mesh = devices.mesh_of(slots)
        base, task = source.base, source.dataset.task
        self.tx = _optimizer(source, config)
        own = {
            repr(run.config.methods): members.shapes(
                base, run.config, _optimizer(source, run.config), drops=group.drops
            )
            for run in _distinct(group)
        }
        self.shapes: Stack = members.largest(list(own.values()))
        fingerprint = source.fingerprint(config)
        halves = members.part(base, config, drops=group.drops, fingerprint=fingerprint)
        self.shared = devices.replicate(halves.shared, self.mesh)
        apply, objective = make_outputs(base.model, right_padded=True), OBJECTIVES[task]
        self.sizes: tuple[Stack, ...] = (self.shapes,)
        if not self.vectorized and len(own) > 1:
            forward = _forward_flops(source, config)
            self.sizes = members.step_sizes([*own.values(), self.shapes], forward)
        fits = {key: members.fitting(self.sizes, (x.train, x.own)) for key, x in own.items()}
        self.run_sizes = [fits[repr(run.config.methods)] for run in group.runs]
        self._train_step = step.make_train_step(
            apply,
            objective,
            self.tx,
            accumulation=config.train.accumulation,
            sizes=None if self.vectorized else self.sizes,
            mesh=self.mesh,
        )
        self.eval_every, self.eval_one = step.make_eval_steps(
            apply, objective, vectorized=self.vectorized, mesh=self.mesh
        )
        kept = devices.split(self.mesh)
        self._take = jax.jit(members.take)
        self._put = jax.jit(members.put, donate_argnums=0, out_shardings=kept)
        self.choose = jax.jit(members.choose, out_shardings=kept)
        self.keeps_best = any(run.config.train.best_metric for run in group.runs)
        self._compiled: dict[Any, Any] = {}

    @property
    def key_data(self) -> np.ndarray:
        """Some member's key, for what needs one and not whose."""
        return np.asarray(jax.random.key_data(training_key(0)))

    @property
    def compiles(self) -> int:
        """How often the training step was compiled."""
        return len(self._compiled)

    def compiled(self, batch: Batch) -> Any:
        """The training step for batches [slots, ...] of these shapes, compiled."""
        shapes = signature(batch)
        if shapes not in self._compiled:
            self._compiled[shapes] = self._train_step.lower(*self._abstract(batch)).compile()
        return self._compiled[shapes]

    def train(
        self,
        stack: Stack,
        keys: np.ndarray,
        sizes: np.ndarray,
        counts: np.ndarray,
        batch: Batch,
    ) -> tuple[Stack, dict[str, jax.Array]]:
        """One step of every slot; see `step.make_train_step`."""
        train, opt_state, metrics = self.compiled(batch)(
            *(stack.train, stack.opt_state, stack.own, self.shared),
            *(keys, sizes, counts, dict(batch)),
        )
        return Stack(train, opt_state, stack.own), metrics

    def start(self, config: ExperimentConfig) -> Member:
        """A run as it is before its first step."""
        base = self.source.base
        fingerprint = self.source.fingerprint(config)
        halves = members.part(base, config, drops=self.group.drops, fingerprint=fingerprint)
        experiment = assemble(config, self.source.tokenizer, self.source.dataset, halves.adapted)
        size = members.fitting(self.sizes, (halves.train, halves.own))
        train, own = members.pad((halves.train, halves.own), (self.shapes.train, self.shapes.own))
        opt_state = _optimizer(self.source, config).init(train)
        key = np.asarray(jax.random.key_data(training_key(config.seed)))
        stack = Stack(train, opt_state, own)
        return Member(stack=stack, size=size, key=key, experiment=experiment)

    def empty(self) -> Stack:
        """Slots without members."""
        return members.empty(self.shapes, self.slots, devices.split(self.mesh))

    def put(self, stack: PyTree, index: int, member: PyTree) -> PyTree:
        """The stack, whose arrays are taken over, with a member in a slot."""
        return self._put(stack, index, jax.device_put(member, devices.whole(self.mesh)))

    def take(self, stack: PyTree, index: int) -> PyTree:
        """The arrays of the member in a slot, on one device."""
        return jax.tree.map(jnp.asarray, jax.device_get(self._take(stack, index)))

    def _abstract(self, batch: Batch) -> tuple[Any, ...]:
        stack = members.stacked_shapes(self.shapes, self.slots)
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        shared = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.shared)
        return (
            *(stack.train, stack.opt_state, stack.own, shared),
            jax.ShapeDtypeStruct((self.slots, *key.shape), key.dtype),
            *(jax.ShapeDtypeStruct((self.slots,), jnp.int32),) * 2,
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()},
        )


class Batches:
    """The batches of runs by their own number, shared where their orders are the same."""

    def __init__(self, source: Source, config: ExperimentConfig, slots: int):
        self._source, self._config = source, config
        self._steps = functools.cache(self._make)
        self._batch = functools.lru_cache(maxsize=4 * slots)(lambda s, n: self._steps(s)[n])

    @property
    def per_epoch(self) -> int:
        """How many an epoch has, of whichever order."""
        return self._steps(order_seed(self._config)).per_epoch

    @functools.cached_property
    def shapes(self) -> dict[Any, list[int]]:
        """The numbers of an epoch's batches by the shapes of their arrays, in one order."""
        found: dict[Any, list[int]] = {}
        for number in range(self.per_epoch):
            found.setdefault(signature(self.get(self._config, number)), []).append(number)
        return found

    def get(self, config: ExperimentConfig, number: int) -> Batch:
        """The batch of a run's step `number`."""
        return self._batch(order_seed(config), number)

    def _make(self, seed: int) -> TrainSteps:
        return _train_steps(self._source.dataset, self._config, seed)


def steps_per_epoch(dataset: Dataset, config: ExperimentConfig) -> int:
    """How many batches an epoch of a run has, in whichever order."""
    return _train_steps(dataset, config, order_seed(config)).per_epoch


def _train_steps(dataset: Dataset, config: ExperimentConfig, seed: int) -> TrainSteps:
    loader = config.data.loader
    rows = slice(0, loader.batch_size)
    return TrainSteps(dataset.train, loader, dataset.pad_id, seed, rows)


def order_seed(config: ExperimentConfig) -> int:
    """The seed of the order that a run sees its examples in."""
    seed = config.data.loader.seed
    return config.seed if seed is None else seed


def state_bytes(program: Program) -> tuple[int, int]:
    """(bytes of what all members share, in all memories, bytes of what each slot holds).

    Where a run keeps its best, a slot has its trainable half three times: as it is, as it was best,
    and while one of them is chosen.
    """

    def size(tree: PyTree) -> int:
        return sum(trees.array_bytes(x) for x in jax.tree.leaves(tree))

    best = 2 * size(program.shapes.train) if program.keeps_best else 0
    return devices.memories(program.mesh) * size(program.shared), size(program.shapes) + best


def _forward_flops(source: Source, config: ExperimentConfig) -> float:
    """What the base computes forward, for each row of a batch."""
    batch = Batches(source, config, 1).get(config, 0)
    inputs = {name: array for name, array in batch.items() if name not in NOT_INPUTS}
    traced = jax.jit(make_apply(source.base.model)).trace(source.base.params, inputs)
    return count_flops(traced.jaxpr) / batch["input_ids"].size


def _optimizer(source: Source, config: ExperimentConfig) -> optax.GradientTransformation:
    return make_optimizer(config, source.total_steps(config))


def _distinct(group: Group) -> list[Any]:
    """Runs that between them have all the sizes of the group: one of each method sections."""
    return list({repr(run.config.methods): run for run in group.runs}.values())
