"""How products of few rows with a four-bit kernel are cut for a GPU, by what was timed on one."""

from __future__ import annotations

import dataclasses

# By experiments/accelerator/nf4_kernel.csv (H200, 4096 x 4096), from which the tilings are too: of
# 64 rows the fused kernel takes half of XLA's time, of 2,048 three times as much.
MOST_ROWS = 64
FEWEST_SPLITS = 4  # with fewer, which nobody timed, too few programs run at once
BLOCK_SIZES = (64, 128)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut: `rows` of x by `columns` of the kernel a program, `splits` of `in`."""

    rows: int
    splits: int
    scales_values: bool  # by absmax; else a block's partial sums, which are fewer where rows are
    columns: int = 128
    warps: int = 4
    stages: int = 3


def tiling_of(rows: int, in_size: int, out_size: int, block_size: int) -> Tiling | None:
    """The fastest tiling that was timed, with as many splits as the blocks allow; None for a shape
    that the kernel does not take."""
    fastest = Tiling(16, 16, False) if rows <= 16 else Tiling(64, 8, True)
    if not 0 < rows <= MOST_ROWS or block_size not in BLOCK_SIZES or out_size % fastest.columns:
        return None
    blocks, rest = divmod(in_size, block_size)
    splits = max(n for n in range(1, fastest.splits + 1) if blocks % n == 0)
    if rest or splits < FEWEST_SPLITS:
        return None
    return dataclasses.replace(fastest, splits=splits)
