"""Times products with a four-bit kernel on a GPU: bfloat16, XLA's dequantisation, a fused kernel.

    python experiments/accelerator/nf4_kernel.py --output FOLDER

Every way is checked against a float32 product of the same dequantised kernel first. A call is timed
within a compiled loop over copies of the kernel that exceed the level-2 cache together, so kernels
come from memory as they do in a model. Prints a table and writes nf4_kernel.csv to the folder.
`--tiny` runs everything on small shapes, in Pallas's interpreter where there is no GPU.

The committed rows of 2,048 are of an earlier version, which spelled XLA's dequantisation itself.
"""

from __future__ import annotations

import csv
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from lorax_ft.quantization import codebooks, gpu_product
from lorax_ft.quantization.nf4 import NF4
from lorax_ft.quantization.tilings import GpuTiling, gpu_tiling

BLOCK = 64
CACHE = 120e6  # bytes that the copies of a kernel exceed together: twice the largest level-2 cache
SHAPES = ((4096, 4096), (4096, 14336))
TURNS = 16  # known to the compiler, or the host would be asked after each
ROWS = (1, 8, 16, 64, 256, 2048)
TILINGS = ((16, 8, 128), (16, 16, 128), (16, 16, 64), (64, 4, 128), (64, 8, 128))

FIELDS = "device in out rows way microseconds gigabytes_per_second error compile_seconds".split()

_OUTPUT = flags.DEFINE_string("output", ".", "folder of nf4_kernel.csv")
_TINY = flags.DEFINE_bool("tiny", False, "small shapes")
_LIMIT = flags.DEFINE_float("limit", 85.0, "seconds in all")
_ROWS = flags.DEFINE_list("rows", None, "rows of x, as --rows=1,16; all where not given")


def ways(rows: int, shape: tuple[int, int]) -> dict[str, GpuTiling | None]:
    """What is timed for so many rows of x: name -> tiling of the fused kernel; XLA's have none."""
    found = [
        GpuTiling(rows=height, splits=splits, scales_values=height > 16, columns=columns)
        for height, splits, columns in TILINGS
        if (height == 16) == (rows <= 16)
    ]
    chosen = gpu_tiling(rows, *shape, BLOCK)
    if chosen is not None and chosen not in found:
        found.insert(0, chosen)
    return {"bf16": None, "xla nf4": None} | {name_of(tiling): tiling for tiling in found}


def name_of(tiling: GpuTiling) -> str:
    scaled = "before" if tiling.scales_values else "after"
    sizes = f"r{tiling.rows} c{tiling.columns} s{tiling.splits} w{tiling.warps}"
    return f"product {sizes} permute {scaled}"


def xla_matrix(packed: Any, absmax: Any) -> Any:
    """The kernel as XLA dequantises it, in bfloat16."""
    kernel = NF4(
        packed=packed,
        absmax=absmax,
        nested_absmax=None,
        offset=None,
        block_size=BLOCK,
        kernel_shape=(2 * packed.shape[0], packed.shape[1]),
        kernel_in_axes=(-2,),
        shown_dtype=jnp.dtype(jnp.bfloat16),
    )
    return kernel.matrix()


def multiply(way: str, tiling: GpuTiling | None) -> Callable:
    """The function of (x, arrays of the kernel) that a row of the table names."""
    if way == "bf16":
        return lambda x, kernel: x @ kernel[0]
    if tiling is None:
        return lambda x, kernel: x @ xla_matrix(*kernel)
    interpret = jax.default_backend() != "gpu"
    return lambda x, kernel: gpu_product.product(
        x, *kernel, codebooks.NF4, block_size=BLOCK, tiling=tiling, interpret=interpret
    )


@functools.partial(jax.jit, static_argnums=(0,))
def looped(call: Callable, x: Any, kernels: Any) -> Any:
    """`TURNS` times a product with each of the kernels, one after another."""

    def turn(_: Any, carry: Any) -> Any:
        x, results = carry
        # each turn waits for the one before: no compiler knows that this adds nothing
        x = x.at[0, 0].add(0 * results[-1][0, 0])
        results = []
        for kernel in kernels:
            x = lax.optimization_barrier(x)  # or products that share x would be merged
            results.append(call(x, kernel))
        return x, results

    empty = [jnp.zeros((x.shape[0], kernel[0].shape[1]), x.dtype) for kernel in kernels]
    return lax.fori_loop(0, TURNS, turn, (x, empty))[1]


def timed(call: Callable, x: Any, kernels: Any, seconds: float) -> tuple[Any, float, float]:
    """(the products, seconds of one, seconds until the first result)."""
    start = time.perf_counter()
    result = jax.block_until_ready(looped(call, x, kernels))
    compiling = time.perf_counter() - start

    def measure(calls: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready([looped(call, x, kernels)[-1] for _ in range(calls)])
        return time.perf_counter() - start

    calls = max(1, min(50, int(seconds / max(measure(1), 1e-5))))
    # what waiting for the results costs is in both terms and falls out
    long = min(measure(2 * calls) for _ in range(3))
    short = min(measure(calls) for _ in range(3))
    return result, (long - short) / calls / len(kernels) / TURNS, compiling


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # the small and the large row counts decide most: they come first should time run out
    counts = sorted(ROWS, key=(1, 16, 64, 2048, 256, 8).index)
    if _ROWS.value:
        counts = [int(rows) for rows in _ROWS.value]
    began = time.perf_counter()
    device = jax.devices()[0].device_kind
    table: list[dict[str, Any]] = []
    print(*FIELDS, sep="\t", flush=True)
    shapes = ((1024, 256),) if _TINY.value else SHAPES
    for shape in shapes:
        makes = kernels_of(shape, 2 if _TINY.value else None)
        for rows in counts:
            x = jax.random.normal(jax.random.key(rows), (rows, shape[0]), jnp.bfloat16)
            expected = None
            for way, tiling in ways(rows, shape).items():
                if time.perf_counter() - began > _LIMIT.value:
                    print("# out of time before", shape, rows, way, flush=True)
                    break
                entry = {"device": device, "in": shape[0], "out": shape[1], "rows": rows}
                entry["way"] = way
                try:
                    call = multiply(way, tiling)
                    kernels = makes["bf16" if way == "bf16" else "nf4"]
                    if expected is None:
                        expected = reference(x, makes["nf4"][0])
                    seconds = 0.001 if _TINY.value else 0.02
                    result, took, compiling = timed(call, x, kernels, seconds)
                    entry["error"] = error(result[-1], expected)
                    entry["microseconds"] = round(took * 1e6, 2)
                    size = sum(field.nbytes for field in kernels[0])
                    entry["gigabytes_per_second"] = round(size / max(took, 1e-9) / 1e9, 1)
                    entry["compile_seconds"] = round(compiling, 2)
                except Exception as problem:  # the other ways are still worth knowing
                    entry["error"] = f"{type(problem).__name__}: {problem}"[:300].replace("\n", " ")
                table.append(entry)
                print(*(entry.get(field, "") for field in FIELDS), sep="\t", flush=True)
                write(pathlib.Path(_OUTPUT.value), table)
        del makes
    print(f"# {time.perf_counter() - began:.0f} s in all")


def kernels_of(shape: tuple[int, int], copies: int | None) -> dict[str, list[Any]]:
    """Copies of one random kernel in four bits, and dequantised."""
    keys = jax.random.split(jax.random.key(0), 2)
    packed = jax.random.bits(keys[0], (shape[0] // 2, shape[1]), jnp.uint8)
    absmax = jax.random.uniform(keys[1], (shape[0] // BLOCK, shape[1]), jnp.float32, 0.02, 0.1)
    dense = jax.jit(xla_matrix)(packed, absmax)
    small = copies or int(np.ceil(CACHE / (packed.nbytes + absmax.nbytes)))
    large = copies or int(np.ceil(CACHE / dense.nbytes))
    return {
        "nf4": [(packed.copy(), absmax.copy()) for _ in range(small)],
        "bf16": [(dense.copy(),) for _ in range(large)],
    }


def reference(x: Any, kernel: Any) -> np.ndarray:
    """The product in float32 with the kernel rounded to bfloat16, which no rounding follows."""
    matrix = jax.jit(xla_matrix)(*kernel).astype(jnp.float32)
    product = jnp.matmul(x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST)
    return np.asarray(product)


def error(found: Any, expected: np.ndarray) -> float:
    """The root of the mean square of the differences, relative to that of the expected values."""
    difference = np.asarray(found, np.float32) - expected
    return float(f"{np.sqrt((difference**2).mean() / (expected**2).mean()):.2e}")


def write(folder: pathlib.Path, table: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "nf4_kernel.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    app.run(main)
