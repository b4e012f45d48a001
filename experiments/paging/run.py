"""What an optimizer's states take of a TPU and of its host: paged or not, in float32 or eight bits.

    python experiments/paging/run.py --target=v5e:2x2 --rows=4,12

Needs no TPU but its compiler (`pip install 'jax[tpu]'`). Full fine-tuning of a LLaMA of 0.6 billion
float32 parameters (Llama-3.2-1B's shapes with 8 layers and 32,000 words) on the target's first
chip, computed in bfloat16, layers rematerialised, a batch of so many rows of 1,024 tokens; nothing
is allocated. Where the compiler refuses a batch, its own figures are in the table. Writes
memory.csv beside this file.
"""

from __future__ import annotations

import csv
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax_ft import planning, trees
from lorax_ft.adapted import make_outputs
from lorax_ft.memory import refusal_of
from lorax_ft.models import build
from lorax_ft.training import OBJECTIVES, OptimizerConfig, build_optimizer, make_train_step
from lorax_ft.training.paging import state_shardings
from lorax_ft.training.sharding import shardings_of

LENGTH = 1024
HERE = pathlib.Path(__file__).resolve().parent
SHAPES = HERE.parents[1] / "configs" / "models" / "llama-3.2-1b" / "config.json"
CONFIG = {**json.loads(SHAPES.read_text()), "vocab_size": 32000}
OPTIMIZERS = {
    "float32": OptimizerConfig(),
    "int8": OptimizerConfig(state_dtype="int8"),
    "paged float32": OptimizerConfig(paged=True),
    "paged int8": OptimizerConfig(paged=True, state_dtype="int8"),
}

_TARGET = flags.DEFINE_string("target", "v5e:2x2", "the TPU, whose first chip is compiled for")
_ROWS = flags.DEFINE_list("rows", ["4", "12"], f"rows of a batch, of {LENGTH} tokens each")
_LAYERS = flags.DEFINE_integer("layers", 8, "of the model")


def compile_step(optimizer: OptimizerConfig, layers: int, rows: int, device: Any) -> Any:
    """The training step, compiled on shapes alone, and the shapes of the states with it."""
    config = {**CONFIG, "num_hidden_layers": layers}
    model = build(config, task="causal_lm", dtype="bfloat16", remat="full")
    mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any, shardings: Any = None) -> Any:
        shardings = jax.tree.map(lambda _: everywhere, tree) if shardings is None else shardings
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    train, frozen = trees.partition(placed(model.shapes()), ".*")
    tx = build_optimizer(optimizer, 1000)
    opt_state = jax.eval_shape(tx.init, train)
    lies = state_shardings(tx, opt_state, train, mesh) if optimizer.paged else None
    opt_state = placed(opt_state, lies)
    ids = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    batch["weights"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_train_step(
        make_outputs(model),
        OBJECTIVES["causal_lm"],
        tx,
        out_shardings=(shardings_of(train), shardings_of(opt_state)),
    )
    return step.lower(train, opt_state, frozen, placed(batch), placed(key)).compile()


def measure(optimizer: OptimizerConfig, layers: int, rows: int, device: Any) -> dict[str, Any]:
    """Bytes of the device and of the host, or what the compiler says where it refuses."""
    began = time.perf_counter()
    try:
        memory = compile_step(optimizer, layers, rows, device).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        refusal = refusal_of(error)
        return {"refused": refusal.words if refusal else str(error).splitlines()[0][:200]}
    found = {
        "device_arguments": memory.argument_size_in_bytes,
        "device_temporaries": memory.temp_size_in_bytes,
        "host_arguments": memory.host_argument_size_in_bytes,
        "host_temporaries": memory.host_temp_size_in_bytes,
    }
    gib = {f"{name}_gib": round(size / 2**30, 3) for name, size in found.items()}
    return gib | {"compile_seconds": round(time.perf_counter() - began)}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    target = planning.parse_target(f"tpu-{_TARGET.value}")
    planning.prepare_process(target)
    if reason := planning.missing(target):
        raise app.UsageError(reason)
    device = planning.compiler(target).devices[0]
    found: list[dict[str, Any]] = []
    for rows in map(int, _ROWS.value):
        for name, optimizer in OPTIMIZERS.items():
            row = {"target": _TARGET.value, "rows": rows, "states": name}
            row |= measure(optimizer, _LAYERS.value, rows, device)
            found.append(row)
            print(row, flush=True)
    fields = list(dict.fromkeys(key for row in found for key in row))
    with (HERE / "memory.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    app.run(main)
