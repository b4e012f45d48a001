"""Times training steps of LoRA or QLoRA on random weights: this library's own, as `train` has it.

    python experiments/accelerator/ours.py --method=qlora --variants=full,products --output=x.csv

A variant is what `remat` names; with "+mask" the batch has an attention mask, as the loader makes
it, and without one it is of whole rows that need none; all of a process have their layers unrolled
where --scan_layers=False. They are timed in their order, and should go
from less memory to more: the allocator tells its highest mark alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from common import GIB, MODELS, read_config, since_begun, step_flops, timed, write_row
from profiled import profile
from settings import experiment
from weights import peak_bytes, random_params

from lorax_ft import inspection, training, trees
from lorax_ft.adapted import Base, adapt, make_outputs
from lorax_ft.config import ExperimentConfig
from lorax_ft.experiment import make_optimizer
from lorax_ft.memory import step_memory
from lorax_ft.models import hub
from lorax_ft.quantization import quantize
from lorax_ft.training.flops import count_flops, peak_flops

_METHOD = flags.DEFINE_enum("method", "lora", ["lora", "qlora"], "what is trained")
_MODEL = flags.DEFINE_enum("model", "llama-3-8b", list(MODELS), "shapes")
_VARIANTS = flags.DEFINE_list("variants", ["products"], "values of remat, some with +mask")
_ROWS = flags.DEFINE_integer("rows", 4, "of a batch")
_LENGTH = flags.DEFINE_integer("length", 2048, "tokens of a row")
_SCAN = flags.DEFINE_bool("scan_layers", True, "as ComputeConfig.scan_layers")
_STEPS = flags.DEFINE_integer("steps", 6, "timed steps of each variant")
_PROFILE = flags.DEFINE_bool("profile", False, "beside the table, where a step's time goes")
_OUTPUT = flags.DEFINE_string("output", None, "the table", required=True)


def experiment_of(remat: str) -> ExperimentConfig:
    shapes = _METHOD.value, _MODEL.value, remat, _ROWS.value, _LENGTH.value
    return experiment(*shapes, scan_layers=_SCAN.value)


def describe(config: ExperimentConfig) -> Any:
    return hub.describe(
        config.model.path, task="causal_lm", **dataclasses.asdict(config.model.compute)
    )


def prepare(config: ExperimentConfig) -> tuple[Any, Any, Any]:
    """(train, frozen, optimizer): the config's parameters on random weights."""
    model = describe(config)
    base = model.shapes()
    uses = inspection.inspect(model.apply, base, model.input_shapes())
    if config.quantization is not None:
        base = quantize(base, config.quantization, uses)
    params = random_params(base, jax.random.key(0))
    whole = Base(model=model, params=params, head=(), num_labels=None, uses=uses, config=config)
    adapted = adapt(whole, config, fingerprint="")
    train, frozen = trees.partition(adapted.params, adapted.trainable)
    return train, frozen, make_optimizer(config, 1000)


def make_batch(rows: int, length: int, vocabulary: int, masked: bool) -> dict[str, jax.Array]:
    ids = np.random.default_rng(1).integers(5, vocabulary, (rows, length)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids, "weights": np.ones(rows, np.float32)}
    if masked:
        batch["attention_mask"] = np.ones_like(ids)
    return {name: jnp.asarray(array) for name, array in batch.items()}


def named(variant: str) -> dict[str, Any]:
    """What a row says of its case."""
    variant = variant if _SCAN.value else f"{variant}+unrolled"
    return {
        "part": _METHOD.value,
        "by": "lorax_ft",
        "model": _MODEL.value,
        "variant": variant,
        "rows": _ROWS.value,
        "length": _LENGTH.value,
        "device": jax.local_devices()[0].device_kind,
    }


def measure(variant: str, state: list[Any], frozen: Any, tx: Any) -> dict[str, Any]:
    """A row; `state` is [train, opt_state], which steps take over and put back."""
    remat, _, mask = variant.partition("+")
    config = experiment_of(remat)
    step = training.make_train_step(
        make_outputs(describe(config), right_padded=True), training.OBJECTIVES["causal_lm"], tx
    )
    vocabulary = read_config(_MODEL.value)["vocab_size"]
    batch = make_batch(_ROWS.value, _LENGTH.value, vocabulary, mask == "mask")
    key = jax.random.key(2)
    before, start = peak_bytes(), time.perf_counter()
    traced = step.trace(*state, frozen, batch, key)
    compiled = traced.lower().compile()

    def once() -> float:
        *state[:], metrics = compiled(*state, frozen, batch, key)
        return float(metrics["loss"])

    once()
    build, memory, peak = time.perf_counter() - start, step_memory(compiled), peak_bytes()
    times, losses = timed(once, _STEPS.value)
    if _PROFILE.value:
        profile(once, 1, f"{_OUTPUT.value}.{_METHOD.value}.{variant}.profile.csv")
    needed = step_flops(read_config(_MODEL.value), _ROWS.value, _LENGTH.value)
    seconds, most = statistics.median(times), peak_flops(jax.local_devices()[0])
    return {
        **named(variant),
        "step_s": seconds,
        "fastest_s": min(times),
        "tokens_per_s": _ROWS.value * _LENGTH.value / seconds,
        "tflop": needed / 1e12,
        "mfu": needed / seconds / most if most else "",
        "peak_gib": peak / GIB if peak > before else "",
        "compiler_gib": memory.peak / GIB if memory else "",
        "build_s": build,
        "losses": f"{losses[0]:.3f} {losses[-1]:.3f}",
        "note": f"jax {jax.__version__}; by the traced step, with what is computed again and "
        f"attention's whole: {count_flops(traced.jaxpr) / 1e12:.4g} TFLOP",
    }


def main(argv: list[str]) -> None:
    config = experiment_of("none")
    train, frozen, tx = prepare(config)
    state = [train, training.start_optimizer(tx, train)]
    del train
    jax.block_until_ready((state, frozen))
    started = since_begun()
    for variant in _VARIANTS.value:
        try:
            row = measure(variant, state, frozen, tx)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row = {**named(variant), "note": str(error).partition("\n")[0][:200]}
        write_row(_OUTPUT.value, {**row, "start_s": started})


if __name__ == "__main__":
    app.run(main)
