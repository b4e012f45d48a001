"""What a training step of a LLaMA of 8 billion parameters costs a TPU, by its compiler's estimates.

    python experiments/targets/step.py --target=v5p --remat=none,products,full

LoRA of rank 16 on all linear layers, a bfloat16 base, 4 rows of 2,048 tokens, AdamW, and a scan:
the library's own step, lowered on shapes alone. Needs no TPU but its compiler (`pip install
'jax[tpu]'`). Splash attention has no estimate and is counted by its arithmetic, at the chip's peak.
The share of the peak is of the arithmetic that the step must do, so that what is computed again
counts against it. Each program is a row of step.csv beside this file.
"""

from __future__ import annotations

import csv
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from chips import chip, listing, total
from jax.sharding import SingleDeviceSharding

from lorax_ft import inspection, methods, trees
from lorax_ft.adapted import make_outputs
from lorax_ft.devices import find_device
from lorax_ft.models import LlamaConfig, build
from lorax_ft.quantization import QuantizationConfig, quantize
from lorax_ft.training import OBJECTIVES, OptimizerConfig, build_optimizer, make_train_step
from lorax_ft.training.flops import count_flops

HERE = pathlib.Path(__file__).resolve().parent
KEY = ("target", "quantization", "attention", "remat", "rows", "length", "layers")
_TARGET = flags.DEFINE_string("target", "v5p", "chip")
_LAYERS = flags.DEFINE_integer("layers", 32, "layers of the model")
_BATCH = flags.DEFINE_integer("batch", 4, "rows")
_LENGTH = flags.DEFINE_integer("length", 2048, "tokens of a row")
_REMAT = flags.DEFINE_list("remat", ["none"], "what the backward pass computes again")
_KIND = flags.DEFINE_string("quantization", "", "nf4, int8, or none where empty")
_ATTENTION = flags.DEFINE_string("attention", "splash", "as ComputeConfig.attention")
_OPERATIONS = flags.DEFINE_integer("operations", 0, "how many operations to print")
_TEXT = flags.DEFINE_string("text", "", "file for the compiled program")


def model_of(remat: str) -> Any:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=_LAYERS.value,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    half = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    return build(config, task="causal_lm", remat=remat, attention=_ATTENTION.value, **half)


def trace(model: Any, sharding: Any) -> Any:
    """The training step, traced on shapes alone."""
    ids = jax.ShapeDtypeStruct((_BATCH.value, _LENGTH.value), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    batch["weights"] = jax.ShapeDtypeStruct((_BATCH.value,), jnp.float32)
    uses = inspection.inspect(model.apply, model.shapes(), {"input_ids": ids})
    base = model.shapes()
    if _KIND.value:
        base = quantize(base, QuantizationConfig(kind=_KIND.value), uses)
    tx = build_optimizer(OptimizerConfig(), 1000)

    def halves(params: Any) -> Any:
        sections = [methods.LoraConfig(rank=16)]
        params, patterns = methods.add_methods(params, sections, jax.random.key(0), uses)
        train, frozen = trees.partition(params, patterns)
        return train, tx.init(train), frozen

    shapes = *jax.eval_shape(halves, base), batch, jax.eval_shape(lambda: jax.random.key(0))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    return make_train_step(make_outputs(model), OBJECTIVES["causal_lm"], tx).trace(*placed)


def attention_flops(model: Any, products: int, pairs_of_row: float) -> float:
    """Of so many products of each of a row's pairs of a query and a key."""
    config = model.config
    width = config.num_attention_heads * config.size_of_head
    return products * 2 * _BATCH.value * pairs_of_row * width * config.num_hidden_layers


def needed_flops(sharding: Any) -> float:
    """What a step must do: nothing twice, and of attention the pairs that are seen alone, where
    `count_flops` has two products forward and four backward of all."""
    model = model_of("none")
    hidden = _LENGTH.value * (_LENGTH.value - 1) / 2
    return count_flops(trace(model, sharding).jaxpr) - attention_flops(model, 2 + 4, hidden)


def measured(remat: str) -> dict[str, Any]:
    """A row of the table."""
    model, sharding = model_of(remat), SingleDeviceSharding(chip(_TARGET.value))
    device = find_device(f"tpu-{_TARGET.value}")
    traced = trace(model, sharding)
    # Splash attention computes two products forward and five backward, of the pairs that are seen.
    seen = _LENGTH.value * (_LENGTH.value + 1) / 2
    attends = attention_flops(model, 2 + 5, seen) if _ATTENTION.value == "splash" else 0.0
    needed = needed_flops(sharding)
    compiled = traced.lower().compile()
    text = compiled.as_text()
    if _TEXT.value:
        pathlib.Path(_TEXT.value).write_text(text)
    if _OPERATIONS.value:
        print(listing(text, _OPERATIONS.value))
    per_cycle = device.flops_per_cycle
    cycles = total(text, _TARGET.value) + attends / per_cycle
    memory = compiled.memory_analysis()
    return {
        "target": _TARGET.value,
        "quantization": _KIND.value or "none",
        "attention": _ATTENTION.value,
        "remat": remat,
        "rows": _BATCH.value,
        "length": _LENGTH.value,
        "layers": _LAYERS.value,
        "gigacycles": f"{cycles / 1e9:.3f}",
        "of_peak": f"{needed / cycles / per_cycle:.3f}",
        "arguments_gib": f"{memory.argument_size_in_bytes / 2**30:.2f}",
        "temporaries_gib": f"{memory.temp_size_in_bytes / 2**30:.2f}",
    }


def write(row: dict[str, Any]) -> None:
    """Puts a row into the table, in place of an earlier one of its kind."""
    path, rows = HERE / "step.csv", []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    rows = [r for r in rows if any(r[k] != str(row[k]) for k in KEY)] + [row]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    for remat in _REMAT.value:
        row = measured(remat)
        write(row)
        print(row, flush=True)


if __name__ == "__main__":
    app.run(main)
