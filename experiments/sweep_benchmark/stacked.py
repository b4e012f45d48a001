"""The sweep's own training step of so many members of a LLaMA, and the trees of one member."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft import inspection
from lorax_ft.adapted import Base, make_outputs
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.experiment import make_optimizer
from lorax_ft.models import LlamaConfig, Model, build
from lorax_ft.sweeps import members
from lorax_ft.sweeps.members import Stack
from lorax_ft.sweeps.step import make_train_step
from lorax_ft.training import OBJECTIVES

PyTree = Any
HERE = pathlib.Path(__file__).resolve().parent
SHAPES = HERE.parents[1] / "configs" / "models" / "llama-3.2-1b" / "config.json"
LLAMA_1B = LlamaConfig.from_hugging_face({**json.loads(SHAPES.read_text()), "vocab_size": 32000})
LENGTH = 128
RANK = 16
NO_DATA = {"data": {"source": {"train": "none"}}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """LoRA of rank 16 on all linear layers of a bfloat16 base, with AdamW."""

    model: Model
    config: ExperimentConfig
    tx: Any
    rows: int
    length: int

    @property
    def step(self) -> Any:
        """Jitted, as `sweeps.step.make_train_step` has it."""
        outputs = make_outputs(self.model, right_padded=True)
        return make_train_step(outputs, OBJECTIVES["causal_lm"], self.tx)

    def part(self, params: PyTree, uses: Any) -> tuple[Stack, PyTree]:
        """What one member has for itself, and what all share, of the base's parameters; also of
        shapes under `jax.eval_shape`."""
        base = Base(
            model=self.model,
            params=params,
            head=(),
            num_labels=None,
            uses=uses,
            config=self.config,
        )
        found = members.part(base, self.config, drops=False, fingerprint="")
        return Stack(found.train, self.tx.init(found.train), found.own), found.shared

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of one member's batch."""
        ids = jax.ShapeDtypeStruct((self.rows, self.length), jnp.int32)
        weights = jax.ShapeDtypeStruct((self.rows,), jnp.float32)
        return {"input_ids": ids, "attention_mask": ids, "labels": ids, "weights": weights}

    def uses(self) -> dict[str, inspection.Use]:
        """How the model uses its parameters."""
        ids = {"input_ids": self.batch()["input_ids"]}
        return inspection.inspect(self.model.apply, self.model.shapes(), ids)


def make(config: LlamaConfig, rows: int, length: int = LENGTH, **compute: Any) -> Sweep:
    """The sweep of a model, with so many rows in a member's batch, and fields of `compute`."""
    half = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    model = build(config, task="causal_lm", **{"remat": "products", **half, **compute})
    sections = {"model": {"path": "none"}, **NO_DATA, "lora": {"rank": RANK}}
    parsed = parse(sections, ExperimentConfig)
    tx = make_optimizer(parsed, 1000)
    return Sweep(model=model, config=parsed, tx=tx, rows=rows, length=length)


def lower(sweep: Sweep, slots: int, sharding: Any) -> Any:
    """The step of so many members, lowered on shapes alone."""
    uses = sweep.uses()
    stack, shared = jax.eval_shape(lambda params: sweep.part(params, uses), sweep.model.shapes())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    count = jax.ShapeDtypeStruct((), jnp.int32)  # of steps; and as the number of a size

    def placed(tree: Any, *front: int) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*front, *x.shape), x.dtype, sharding=sharding), tree
        )

    stacked = (placed(x, slots) for x in stack)
    rest = (placed(x, slots) for x in (key, count, count, sweep.batch()))
    return sweep.step.lower(*stacked, placed(shared), *rest)
