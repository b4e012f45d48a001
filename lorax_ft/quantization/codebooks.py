"""bitsandbytes' tables of the values that codes stand for, and encoding by them on the host."""

from __future__ import annotations

import functools

import numpy as np

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""Quantiles of the normal distribution with an exact zero (Dettmers et al. 2023), ascending."""

_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4_MAGNITUDES, 0 - _FP4_MAGNITUDES])  # both zeros are +0 there
"""A sign, two bits of exponent and one of mantissa, in the order of the bits."""


def nearest_codes(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The uint8 code of the entry of `table` nearest to each value; a tie goes to the lower one."""
    order = np.argsort(table, kind="stable").astype(np.uint8)
    entries = table[order]
    ranks = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, bool)
    # fifteen vectorised comparisons are several times faster than one binary search per value
    for midpoint in (entries[:-1] + entries[1:]) / np.float32(2):
        np.greater(values, midpoint, out=above)
        ranks += above.view(np.uint8)
    return ranks if np.array_equal(order, np.arange(order.size)) else order[ranks]


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """bitsandbytes' 8-bit dynamic map, 256 ascending float32 values (Dettmers 2015).

    A decimal exponent from 1e-6 to 1 and, the larger it is, the finer a linear fraction; where no
    bit is spent on a sign, the fraction has it.
    """
    positive = []
    for exponent in range(7):
        edges = _linspace(2 ** (exponent + (not signed)) + 1)
        positive.append(
            np.float32(10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        )
    values = np.concatenate(positive)
    negative = -values if signed else values[:0]
    return np.sort(np.concatenate([negative, values, np.array([0, 1], np.float32)]))


def nearest_dynamic_codes(values: np.ndarray) -> np.ndarray:
    """The code of `dynamic_map` for each value in [-1, 1], as bitsandbytes' CPU encoder chooses it.

    That encoder rounds the value to a grid of 65,536 points first, so near a midpoint, and near
    zero, its code may not be the nearest one.
    """
    positions = (values + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)
    return _dynamic_codes_of_grid()[positions.astype(np.int32)]


@functools.cache
def _dynamic_codes_of_grid() -> np.ndarray:
    table = dynamic_map()
    midpoints = (table[:-1] + table[1:]) / np.float32(2)
    grid = (np.arange(65536) * (2 / 65535) - 1).astype(np.float32)
    return np.searchsorted(midpoints, grid, side="left").astype(np.uint8)


def _linspace(count: int) -> np.ndarray:
    """`torch.linspace(0.1, 1, count)` to the last bit: from both ends, with fused multiply-adds."""
    start, stop = np.float32(0.1), np.float32(1)
    step = np.float64((stop - start) / np.float32(count - 1))
    index = np.arange(count)
    rising = np.float64(start) + step * index
    falling = np.float64(stop) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)
