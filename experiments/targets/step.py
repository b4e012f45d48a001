"""What a training step of a LLaMA of 8 billion parameters costs a TPU, by its compiler's estimates.

    python experiments/targets/step.py --target=v5p

LoRA of rank 16 on all linear layers, a bfloat16 base, 4 rows of 2,048 tokens, AdamW, layers under a
scan whose backward pass computes them again. It is the library's own step, lowered on shapes alone.
Needs no TPU but its compiler (`pip install libtpu`).
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from chips import chip, listing
from jax.sharding import SingleDeviceSharding

from lorax_ft import inspection, methods, trees
from lorax_ft.adapted import make_outputs
from lorax_ft.models import LlamaConfig, build
from lorax_ft.quantization import QuantizationConfig, quantize
from lorax_ft.training import OBJECTIVES, OptimizerConfig, build_optimizer, make_train_step

_TARGET = flags.DEFINE_string("target", "v5p", "chip")
_LAYERS = flags.DEFINE_integer("layers", 32, "layers of the model")
_BATCH = flags.DEFINE_integer("batch", 4, "rows")
_LENGTH = flags.DEFINE_integer("length", 2048, "tokens of a row")
_REMAT = flags.DEFINE_string("remat", "full", "what the backward pass computes again")
_SCAN = flags.DEFINE_bool("scan", True, "one layer over stacked arrays")
_KIND = flags.DEFINE_string("quantization", "", "nf4, int8, or none where empty")
_ADAPTER = flags.DEFINE_bool("lora", True, "with LoRA on all linear layers")
_ATTENTION = flags.DEFINE_string("attention", "xla", "as ComputeConfig.attention")
_OPERATIONS = flags.DEFINE_integer("operations", 40, "how many operations to print")
_TEXT = flags.DEFINE_string("text", "", "file for the compiled program")


def model_of(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    options: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    options |= {"remat": _REMAT.value, "scan_layers": _SCAN.value, "attention": _ATTENTION.value}
    return build(config, task="causal_lm", **options)


def lower(model: Any, sharding: Any) -> Any:
    """The training step on shapes alone, lowered for where `sharding` says."""
    ids = jax.ShapeDtypeStruct((_BATCH.value, _LENGTH.value), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    uses = inspection.inspect(model.apply, model.shapes(), {"input_ids": ids})
    base = model.shapes()
    if _KIND.value:
        base = quantize(base, QuantizationConfig(kind=_KIND.value), uses)
    tx = build_optimizer(OptimizerConfig(), 1000)

    def halves(params: Any) -> Any:
        sections = [methods.LoraConfig(rank=16)] if _ADAPTER.value else [methods.HeadConfig()]
        params, patterns = methods.add_methods(params, sections, jax.random.key(0), uses)
        train, frozen = trees.partition(params, patterns)
        return train, tx.init(train), frozen

    shapes = *jax.eval_shape(halves, base), batch, jax.eval_shape(lambda: jax.random.key(0))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    step = make_train_step(make_outputs(model), OBJECTIVES["causal_lm"], tx)
    return step.lower(*placed)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    sharding = SingleDeviceSharding(chip(_TARGET.value))
    compiled = lower(model_of(_LAYERS.value), sharding).compile()
    text = compiled.as_text()
    if _TEXT.value:
        pathlib.Path(_TEXT.value).write_text(text)
    print(listing(text, _OPERATIONS.value))
    memory = compiled.memory_analysis()
    print(f"{memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments")
    print(f"{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries")


if __name__ == "__main__":
    app.run(main)
