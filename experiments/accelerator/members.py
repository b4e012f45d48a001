"""Times one step of K members of a sweep, that share a frozen base: K runs in one program.

    python experiments/accelerator/members.py --members=1,2,4,8,16,32 --output=x.csv

A LLaMA of 1.0 billion parameters in bfloat16 with LoRA of rank 16 on all linear layers, 8 rows of
128 tokens for each member: the sweep's own step. The random weights are as in weights.py.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "sweep_benchmark"))

import jax
import jax.numpy as jnp
from absl import app, flags
from common import GIB, since_begun, step_flops, timed, write_row
from profiled import profile
from stacked import LENGTH, LLAMA_1B, RANK, Sweep, make
from weights import peak_bytes, random_params

from lorax_ft.memory import step_memory
from lorax_ft.models import LlamaConfig
from lorax_ft.training.flops import peak_flops

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
MODELS = {"llama-1b": LLAMA_1B, "tiny": TINY}
BETWEEN = 4  # steps from one waiting for the device to the next

_MODEL = flags.DEFINE_enum("model", "llama-1b", list(MODELS), "shapes")
_MEMBERS = flags.DEFINE_list("members", ["1", "2", "4", "8", "16", "32"], "how many at once")
_ROWS = flags.DEFINE_integer("rows", 8, "of a member's batch")
_LENGTH = flags.DEFINE_integer("length", LENGTH, "tokens of a row")
_REMAT = flags.DEFINE_string("remat", "none", "as ComputeConfig.remat")
_ATTENTION = flags.DEFINE_string("attention", "auto", "as ComputeConfig.attention")
_SCAN = flags.DEFINE_bool("scan_layers", True, "as ComputeConfig.scan_layers")
_STEPS = flags.DEFINE_integer("steps", 5, f"how often {BETWEEN} steps are timed")
_PROFILE = flags.DEFINE_bool("profile", False, "beside the table, where a step's time goes")
_OUTPUT = flags.DEFINE_string("output", None, "the table", required=True)


def measure(sweep: Sweep, one: Any, shared: Any, slots: int) -> dict[str, Any]:
    """A row: a step of so many members, all of which begin as `one` does."""
    state = list(jax.tree.map(lambda x: jnp.stack([x] * slots), (one.train, one.opt_state)))
    own = jax.tree.map(lambda x: jnp.stack([x] * slots), one.own)
    keys = jax.vmap(lambda n: jax.random.key_data(jax.random.key(n)))(jnp.arange(slots))
    sizes = jnp.zeros(slots, jnp.int32)
    vocabulary = sweep.model.config.vocab_size
    shape = (slots, sweep.rows, sweep.length)
    ids = jax.random.randint(jax.random.key(1), shape, 5, vocabulary)
    weights = jnp.ones(shape[:2], jnp.float32)
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": ids}
    rest = (own, shared, keys, sizes, sizes, {**batch, "weights": weights})
    before, start = peak_bytes(), time.perf_counter()
    compiled = sweep.step.lower(*state, *rest).compile()

    def some() -> float:
        for _ in range(BETWEEN):
            *state[:], metrics = compiled(*state, *rest)
        return float(metrics["loss"].mean())

    some()
    build, peak, memory = time.perf_counter() - start, peak_bytes(), step_memory(compiled)
    times, losses = timed(some, _STEPS.value, warm_up=1)
    if _PROFILE.value:
        profile(some, BETWEEN, f"{_OUTPUT.value}.members.{slots}.profile.csv")
    seconds = statistics.median(times) / BETWEEN
    fields = {name: getattr(sweep.model.config, name) for name in vars(LLAMA_1B)}
    needed = slots * step_flops(fields, sweep.rows, sweep.length, RANK)
    device = jax.local_devices()[0]
    most = peak_flops(device)
    return {
        "part": "members",
        "by": "lorax_ft",
        "model": _MODEL.value,
        "variant": variant(),
        "members": slots,
        "rows": sweep.rows,
        "length": sweep.length,
        "device": device.device_kind,
        "step_s": seconds,
        "fastest_s": min(times) / BETWEEN,
        "tokens_per_s": ids.size / seconds,
        "tflop": needed / 1e12,
        "mfu": needed / seconds / most if most else "",
        "peak_gib": peak / GIB if peak > before else "",
        "compiler_gib": memory.peak / GIB if memory else "",
        "build_s": build,
        "losses": f"{losses[0]:.3f} {losses[-1]:.3f}",
        "note": f"jax {jax.__version__}",
    }


def variant() -> str:
    how = [_REMAT.value, "" if _ATTENTION.value == "auto" else _ATTENTION.value]
    return "+".join(filter(None, [*how, "" if _SCAN.value else "unrolled"]))


def main(argv: list[str]) -> None:
    how = {"remat": _REMAT.value, "attention": _ATTENTION.value, "scan_layers": _SCAN.value}
    sweep = make(MODELS[_MODEL.value], _ROWS.value, _LENGTH.value, **how)
    params = random_params(sweep.model.shapes(), jax.random.key(0))
    one, shared = sweep.part(params, sweep.uses())
    jax.block_until_ready((one, shared))
    started = since_begun()
    for slots in map(int, _MEMBERS.value):
        write_row(_OUTPUT.value, {**measure(sweep, one, shared, slots), "start_s": started})


if __name__ == "__main__":
    app.run(main)
