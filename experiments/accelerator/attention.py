"""Attention by the device's kernel beside plain products: errors, gradients and time.

    python experiments/accelerator/attention.py --output=attention.csv

Each case is what a model may ask for. Both ways compute in bfloat16; the error is against plain
products in float32, relative to their norm, of the output and of the gradients of queries, keys and
values. A time is of a forward and a backward pass. With members, it is of as many copies by
`jax.vmap`, as a sweep computes them. `--tiny` runs on small shapes.
"""

from __future__ import annotations

import csv
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from lorax_ft.axes import MEMBER
from lorax_ft.models.attending import Products, Seen, attend

FIELDS = (
    "device",
    "case",
    "members",
    "length",
    "way",
    "milliseconds",
    "error",
    "gradient_error",
    "note",
)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # as LLaMA-3-8B's
MEMBERS = (1, 2)

_OUTPUT = flags.DEFINE_string("output", "attention.csv", "the table")
_LENGTH = flags.DEFINE_integer("length", 2048, "tokens of a row")
_ROWS = flags.DEFINE_integer("rows", 4, "of a batch")
_TINY = flags.DEFINE_bool("tiny", False, "small shapes")
_LIMIT = flags.DEFINE_float("limit", 120.0, "seconds in all")


def cases(rows: int, length: int) -> dict[str, tuple[Seen, Products, int]]:
    """name -> what is seen, what is made of products, how many keys stand before the queries."""
    places = jnp.arange(length)
    lengths = length - (length // 3) * jnp.arange(rows) // rows
    mask = (places[None] < lengths[:, None])[:, None, None]
    behind = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (32, 0)), constant_values=True)
    segments = jnp.broadcast_to(1 + 4 * places // length, (rows, length))
    bias = jax.random.normal(jax.random.key(3), (1, HEADS, length, length), jnp.bfloat16)
    causal = functools.partial(Seen, is_causal=True)
    return {
        "causal": (causal(), Products(), 0),
        "both ways": (Seen(), Products(), 0),
        "causal, padded": (causal(mask=mask, hides_ends=True), Products(), 0),
        "both ways, padded": (Seen(mask=mask, hides_ends=True), Products(), 0),
        "padded, by a mask": (causal(mask=mask), Products(), 0),
        "many texts": (causal(segments=segments), Products(), 0),
        "window": (causal(window=length // 4), Products(), 0),
        "behind a prefix": (Seen(mask=behind, hides_ends=True), Products(), 32),
        "bias": (Seen(mask=mask, hides_ends=True), Products(bias=bias), 0),
    }


def measure(case: str, members: int, seen: Seen, products: Products, before: int) -> list[dict]:
    rows, length = sizes()
    shapes = ((length, HEADS), (length + before, KV_HEADS), (length + before, KV_HEADS))
    keys = jax.random.split(jax.random.key(0), 4)
    lead = (members, rows) if members > 1 else (rows,)
    given = [
        jax.random.normal(k, (*lead, size, heads, HEAD_DIM), jnp.bfloat16)
        for k, (size, heads) in zip(keys, shapes)
    ]
    weights = jax.random.normal(keys[3], (rows, length, HEADS, HEAD_DIM), jnp.bfloat16)
    if seen.mask is not None:  # what is behind a text differs, and nothing reads it
        weights = weights * seen.mask[:, 0, 0, before:, None, None]

    def one(kernel: str, *arrays: jax.Array) -> Any:
        def loss(*arrays: jax.Array) -> Any:
            y = attend(*arrays, seen, products, kernel=kernel) * weights
            return jnp.sum(y, dtype=jnp.float32), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    def compiled(kernel: str, arrays: list[jax.Array]) -> Any:
        function = functools.partial(one, kernel)
        if members > 1:
            function = jax.vmap(function, axis_name=MEMBER)
        return jax.jit(function).lower(*arrays).compile()

    widened = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):  # a GPU rounds to TF32 otherwise
        exact_gradients, exact = compiled("xla", widened)(*widened)
    found = []
    for way in ("xla", "auto"):
        try:
            program = compiled(way, given)
            gradients, y = jax.block_until_ready(program(*given))
        except Exception as error:  # a table tells what a device refuses, and goes on
            lines = str(error).splitlines() or [type(error).__name__]
            found.append({"way": way, "note": lines[0][:200]})
            continue
        times = []
        for _ in range(3 if _TINY.value else 20):
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            times.append(time.perf_counter() - start)
        errors = [relative(a, b) for a, b in zip(gradients, exact_gradients)]
        fused = "cudnn" in program.as_text() or "tpu_custom_call" in program.as_text()
        found.append(
            {
                "way": way,
                "milliseconds": f"{1e3 * statistics.median(times):.4g}",
                "error": f"{relative(y, exact):.2g}",
                "gradient_error": " ".join(f"{error:.2g}" for error in errors),
                "note": "the device's kernel" if fused else "plain products",
            }
        )
    return found


def relative(found: jax.Array, wanted: jax.Array) -> float:
    found = found.astype(jnp.float32)
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def sizes() -> tuple[int, int]:
    return (2, 256) if _TINY.value else (_ROWS.value, _LENGTH.value)


def main(argv: list[str]) -> None:
    begun = time.perf_counter()
    with open(_OUTPUT.value, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS, lineterminator="\n")
        writer.writeheader()
        for members in MEMBERS:
            for case, what in cases(*sizes()).items():
                if time.perf_counter() - begun > _LIMIT.value:
                    print(f"left out, the time is up: {case}, {members} members", flush=True)
                    continue
                for row in measure(case, members, *what):
                    row |= {
                        "device": jax.local_devices()[0].device_kind,
                        "case": case,
                        "members": members,
                        "length": sizes()[1],
                    }
                    writer.writerow(row)
                    file.flush()
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    app.run(main)
