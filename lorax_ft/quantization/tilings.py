"""How products with a four-bit kernel are cut for the fused kernels of GPUs and of TPUs.

What stands here is known without Pallas, which takes a while to import.
"""

from __future__ import annotations

import dataclasses
import math

# --- GPUs, by what was timed on one ---------------------------------------------------------------

# By experiments/accelerator/nf4_kernel.csv (H200, 4096 x 4096), from which the tilings are too: of
# 64 rows the fused kernel takes half of XLA's time, of 2,048 three times as much.
MOST_ROWS = 64
FEWEST_SPLITS = 4  # with fewer, which nobody timed, too few programs run at once
BLOCK_SIZES = (64, 128)


@dataclasses.dataclass(frozen=True)
class GpuTiling:
    """How a product is cut: `rows` of x by `columns` of the kernel a program, `splits` of `in`."""

    rows: int
    splits: int
    scales_values: bool  # by absmax; else a block's partial sums, which are fewer where rows are
    columns: int = 128
    warps: int = 4
    stages: int = 3


def gpu_tiling(rows: int, in_size: int, out_size: int, block_size: int) -> GpuTiling | None:
    """The fastest tiling that was timed, with as many splits as the blocks allow; None for a shape
    that the kernel does not take."""
    fastest = GpuTiling(16, 16, False) if rows <= 16 else GpuTiling(64, 8, True)
    if not 0 < rows <= MOST_ROWS or block_size not in BLOCK_SIZES or out_size % fastest.columns:
        return None
    blocks, rest = divmod(in_size, block_size)
    splits = max(n for n in range(1, fastest.splits + 1) if blocks % n == 0)
    if rest or splits < FEWEST_SPLITS:
        return None
    return dataclasses.replace(fastest, splits=splits)


# --- TPUs, by what the compiler schedules ---------------------------------------------------------

ROWS = 2048  # of a tile at most: with its sums it takes 13 of the 16 MiB that a kernel is given
SIZES = (512, 256, 128)  # of a tile of the kernel, whole vector registers
SMALLEST_BLOCK = 64  # half of one is the 32 rows of bytes that a register's tile has


@dataclasses.dataclass(frozen=True)
class TpuTiling:
    """How a product is cut: `rows` of x by `inputs` by `outputs` of the kernel a step."""

    rows: int
    inputs: int
    outputs: int


def tpu_tiling(rows: int, in_size: int, out_size: int, block_size: int) -> TpuTiling | None:
    """The largest tiles that divide the kernel; None for a shape that the fused product does not
    take."""
    inputs = [size for size in SIZES if in_size % size == 0 and size % block_size == 0]
    outputs = [size for size in SIZES if out_size % size == 0]
    if rows < 1 or block_size < SMALLEST_BLOCK or not (inputs and outputs):
        return None
    tiles = math.ceil(rows / ROWS)
    return TpuTiling(math.ceil(rows / tiles / 16) * 16, inputs[0], outputs[0])
