"""Attention by the device's kernel beside plain products: errors, gradients and time.

    python experiments/accelerator/attention.py --output=attention.csv

Each case is what a model may ask for. Both ways compute in bfloat16; the error is against plain
products in float32, relative to their norm, of the output and of the gradients of queries, keys and
values. A time is of a forward and a backward pass. With members, it is of as many copies by
`jax.vmap`, as a sweep computes them. `--tiny` runs on small shapes.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from lorax_ft.axes import MEMBER
from lorax_ft.models.attending import OF_PLATFORM, Products, Seen, attend

FIELDS = (
    "device",
    "case",
    "members",
    "rows",
    "length",
    "way",
    "milliseconds",
    "error",
    "gradient_error",
    "note",
)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # as LLaMA-3-8B's

_OUTPUT = flags.DEFINE_string("output", "attention.csv", "the table")
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["1x4x2048", "2x2x2048", "1x32x256", "1x8x128", "1x64x128", "8x8x128", "1x64x64"],
    "members, rows of each and tokens of a row",
)
_CASES = flags.DEFINE_list("cases", [], "names of cases; all where empty")
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
        "causal padded": (causal(mask=mask, hides_ends=True), Products(), 0),
        "both ways padded": (Seen(mask=mask, hides_ends=True), Products(), 0),
        "padded by a mask": (causal(mask=mask), Products(), 0),
        "many texts": (causal(segments=segments), Products(), 0),
        "window": (causal(window=length // 4), Products(), 0),
        "behind a prefix": (Seen(mask=behind, hides_ends=True), Products(), 32),
        "bias": (Seen(mask=mask, hides_ends=True), Products(bias=bias), 0),
    }


def measure(shape: list[int], seen: Seen, products: Products, before: int) -> list[dict]:
    members, rows, length = shape
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

    is_gpu = jax.default_backend() == "gpu"
    texts = (seen.mask, seen.segments, products.bias, weights)  # of all members

    def one(kernel: str, texts: Any, *arrays: jax.Array) -> Any:
        mask, segments, bias, weights = texts
        what = dataclasses.replace(seen, mask=mask, segments=segments)
        of_products = dataclasses.replace(products, bias=bias)

        def loss(*arrays: jax.Array) -> Any:
            y = attend(*arrays, what, of_products, kernel=kernel) * weights
            return jnp.sum(y, dtype=jnp.float32), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    def compiled(kernel: str, arrays: list[jax.Array]) -> Any:
        function = functools.partial(one, kernel)
        if members > 1:
            axes = (None, *(0 for _ in arrays))
            function = jax.vmap(function, in_axes=axes, axis_name=MEMBER)
        # what is only compared with is not tuned, which takes seconds
        options = {"xla_gpu_autotune_level": 0} if arrays is widened and is_gpu else None
        lowered = jax.jit(function).lower(texts, *arrays)
        return functools.partial(lowered.compile(options), texts)

    widened = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):  # a GPU rounds to TF32 otherwise
        exact_gradients, exact = compiled("xla", widened)(*widened)
    found = []
    for way in ("xla", OF_PLATFORM.get(jax.default_backend(), "auto")):
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
        fused = re.search("cudnn|tpu_custom_call", program.func.as_text())
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


def main(argv: list[str]) -> None:
    begun = time.perf_counter()
    shapes = ["1x2x256", "2x2x256"] if _TINY.value else _SHAPES.value
    with open(_OUTPUT.value, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS, lineterminator="\n")
        writer.writeheader()
        for shape in shapes:
            members, rows, length = map(int, shape.split("x"))
            for case, what in cases(rows, length).items():
                if _CASES.value and case not in _CASES.value:
                    continue
                if time.perf_counter() - begun > _LIMIT.value:
                    print(f"left out, the time is up: {case}, {shape}", flush=True)
                    continue
                for row in measure([members, rows, length], *what):
                    row = {
                        "device": jax.local_devices()[0].device_kind,
                        "case": case,
                        "members": members,
                        "rows": rows,
                        "length": length,
                        **row,
                    }
                    writer.writerow(row)
                    file.flush()
                    print(*row.values(), sep=", ", flush=True)


if __name__ == "__main__":
    app.run(main)
