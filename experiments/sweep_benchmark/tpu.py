"""What a step of K members takes on a TPU, by its compiler's estimates: cycles for each member.

    python experiments/sweep_benchmark/tpu.py --cost=tpu_cost.py --members=1,2,4,8,16,32

Needs no TPU but its compiler (`pip install libtpu`). A LLaMA of 1.2 billion parameters in bfloat16
with LoRA of rank 16 on all linear layers, 8 rows of 128 tokens for each member; nothing is
allocated. `--cost` is a file with `cost(text)`, which sums the compiler's `estimated_cycles` over a
printed program, loops by their trip counts, and returns it first of three. Writes tpu.csv beside
this file.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import runpy
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lorax_ft import inspection
from lorax_ft.adapted import Base, make_outputs
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.experiment import make_optimizer
from lorax_ft.models import LlamaConfig, build
from lorax_ft.sweeps import members
from lorax_ft.sweeps.step import make_train_step
from lorax_ft.training import OBJECTIVES

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
BATCH, LENGTH = 8, 128
NO_DATA = {"data": {"source": {"train": "none"}}}

_COST = flags.DEFINE_string("cost", None, "file with cost(text)", required=True)
_MEMBERS = flags.DEFINE_list("members", ["1", "2", "4", "8", "16", "32"], "how many at once")
_TARGET = flags.DEFINE_string("target", "v5p:2x2x1", "the TPU, whose first chip is compiled for")


def lower(slots: int, sharding: Any) -> Any:
    """The sweep's own training step of so many members, lowered on shapes alone."""
    model = build(CONFIG, task="causal_lm", dtype="bfloat16", param_dtype="bfloat16")
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    batch["weights"] = jax.ShapeDtypeStruct((BATCH,), jnp.float32)
    uses = inspection.inspect(model.apply, model.shapes(), {"input_ids": ids})
    config = parse({"model": {"path": "none"}, **NO_DATA, "lora": {"rank": 16}}, ExperimentConfig)
    tx = make_optimizer(config, 1000)

    def halves(params):
        base = Base(model=model, params=params, head=(), num_labels=None, uses=uses, config=config)
        found = members.part(base, config, drops=False, fingerprint="")
        return found.train, tx.init(found.train), found.own, found.shared

    train, opt_state, own, shared = jax.eval_shape(halves, model.shapes())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    count = jax.ShapeDtypeStruct((), jnp.int32)  # of steps; and as the number of a size

    def placed(tree: Any, *front: int) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*front, *x.shape), x.dtype, sharding=sharding), tree
        )

    step = make_train_step(make_outputs(model), OBJECTIVES["causal_lm"], tx)
    stacked = (placed(x, slots) for x in (train, opt_state, own))
    rest = (placed(x, slots) for x in (key, count, count, batch))
    return step.lower(*stacked, placed(shared), *rest)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    cost = runpy.run_path(_COST.value)["cost"]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=_TARGET.value)
    sharding = SingleDeviceSharding(topology.devices[0])
    rows: list[dict[str, Any]] = []
    for slots in map(int, _MEMBERS.value):
        compiled = lower(slots, sharding).compile()
        cycles, _, opaque = cost(compiled.as_text())
        memory = compiled.memory_analysis()
        row = {"target": _TARGET.value, "members": slots, "gigacycles": cycles / 1e9}
        row["of_one"] = cycles / slots / (rows[0]["gigacycles"] * 1e9 if rows else cycles)
        row["arguments_gib"] = memory.argument_size_in_bytes / 2**30
        row["temporaries_gib"] = memory.temp_size_in_bytes / 2**30
        row["without_estimate"] = json.dumps(dict(opaque))
        rows.append(row)
        print(row, flush=True)
    with (HERE / "tpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    app.run(main)
