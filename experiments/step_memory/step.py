"""Memory of a LoRA step with logits at once or in pieces, and with what the backward pass keeps.

    python experiments/step_memory/step.py

A LLaMA of 1.2 billion parameters and 128,256 words (Llama-3.2-1B's shapes), LoRA of rank 16 on all
linear layers, 4 texts of 1,024 tokens. The step is compiled on shapes alone, so nothing is
allocated: what is printed is the compiler's own account of this machine's program. Writes
results.csv beside this file.
"""

from __future__ import annotations

import csv
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from lorax_ft import LoraConfig, add_lora, inspect, partition
from lorax_ft.adapted import make_outputs
from lorax_ft.models import build
from lorax_ft.training import OBJECTIVES, make_train_step

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = HERE.parents[1] / "configs" / "models" / "llama-3.2-1b" / "config.json"
CONFIG = json.loads(SHAPES.read_text())
AT_ONCE = 2**50  # bytes that no logits come to
PIECES = 2**28

_BATCH = flags.DEFINE_integer("batch", 4, "texts")
_LENGTH = flags.DEFINE_integer("length", 1024, "tokens of each")
_REMAT = flags.DEFINE_list("remat", ["none", "full"], "policies of the layers")


def compile_step(remat: str, logits_bytes: int) -> Any:
    """The step, compiled; its frozen parameters are the base's and its optimizer is AdamW."""
    model = build(CONFIG, task="causal_lm", remat=remat, logits_bytes=logits_bytes)
    uses = inspect(model.apply, model.shapes(), model.input_shapes())

    def start(params, key):
        train, frozen = partition(add_lora(params, LoraConfig(rank=16), key, uses))
        return train, tx.init(train), frozen

    tx = optax.adamw(1e-4)
    key = jax.eval_shape(lambda: jax.random.key(0))
    ids = jax.ShapeDtypeStruct((_BATCH.value, _LENGTH.value), jnp.int32)
    weights = jax.ShapeDtypeStruct((_BATCH.value,), jnp.float32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids, "weights": weights}
    step = make_train_step(make_outputs(model), OBJECTIVES["causal_lm"], tx)
    return step.lower(*jax.eval_shape(start, model.shapes(), key), batch, key).compile()


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    rows: list[dict[str, Any]] = []
    for remat in _REMAT.value:
        for name, most in (("at once", AT_ONCE), ("in pieces", PIECES)):
            memory = compile_step(remat, most).memory_analysis()
            row = {"remat": remat, "logits": name}
            row["arguments_gib"] = round(memory.argument_size_in_bytes / 2**30, 2)
            row["temporaries_gib"] = round(memory.temp_size_in_bytes / 2**30, 2)
            rows.append(row)
            print(row, flush=True)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    app.run(main)
