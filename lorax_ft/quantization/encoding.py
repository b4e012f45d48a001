"""Arrays to four-bit blocks, on the host and to the bit as bitsandbytes does it.

Quantising happens once, when weights are read, and numpy computes it the same everywhere; XLA would
flush denormals to zero on some devices.
"""

from __future__ import annotations

import math

import numpy as np

from lorax_ft.quantization.codebooks import nearest_codes, nearest_dynamic_codes

NESTED_BLOCK = 256  # absmax values that share one nested absmax
_SMALLEST_ABSMAX = np.float32(1e-38)  # bitsandbytes' guard against dividing by zero
_CHUNK = 1 << 18  # values encoded at a time, so that the working memory stays in the cache


def is_blocked(in_size: int, block_size: int) -> bool:
    """Whether blocks fit whole into the columns of a matrix; else they run over the flat array."""
    return in_size % block_size == 0


def encode_matrix(
    matrix: np.ndarray, table: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(packed, absmax) of a matrix `[in, out]`, in the layout that `nf4.FourBit` describes.

    Raises ValueError for a value that is not finite.
    """
    if not is_blocked(matrix.shape[0], block_size):
        return encode_flat(np.ascontiguousarray(matrix.T).reshape(-1), table, block_size)
    blocks, out_size = matrix.shape[0] // block_size, matrix.shape[1]
    packed = np.empty((blocks, block_size // 2, out_size), np.uint8)
    absmax = np.empty((blocks, out_size), np.float32)
    step = max(1, _CHUNK // (block_size * out_size))
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        rows = matrix[start * block_size : stop * block_size].astype(np.float32, order="C")
        codes, absmax[start:stop] = _encode_blocks(rows.reshape(-1, block_size, out_size), table)
        packed[start:stop] = (codes[:, : block_size // 2] << 4) | codes[:, block_size // 2 :]
    return packed.reshape(-1, out_size), absmax


def encode_flat(
    values: np.ndarray, table: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(packed `[n/2]`, absmax `[n/block_size]`), rounded up, of a flat array: bitsandbytes' own."""
    whole = values.size // block_size * block_size
    codes = np.empty(values.size + values.size % 2, np.uint8)
    codes[values.size :] = nearest_codes(np.zeros(1, np.float32), table)
    absmax = np.empty(math.ceil(values.size / block_size), np.float32)
    step = max(1, _CHUNK // block_size) * block_size
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        blocks = values[start:stop].astype(np.float32).reshape(-1, block_size)
        # blocks as columns, as encode_matrix has them
        found, absmax_found = _encode_blocks(blocks.T[None], table)
        codes[start:stop] = found[0].T.reshape(-1)
        absmax[start // block_size : stop // block_size] = absmax_found[0]
    if whole < values.size:
        tail = values[whole:].astype(np.float32)
        absmax[-1] = max(_absmax(tail, axis=0), _SMALLEST_ABSMAX)
        codes[whole : values.size] = nearest_codes(tail / absmax[-1], table)
    return (codes[::2] << 4) | codes[1::2], absmax


def compress_absmax(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Double quantisation of a flat absmax in torch's order: (codes, nested absmax, offset)."""
    offset = torch_mean(absmax)
    centred = absmax - offset
    padded = np.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = np.abs(padded).max(axis=1)
    # a nested absmax may be zero or denormal
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = np.nan_to_num(padded * (np.float32(1) / nested)[:, None], posinf=1, neginf=-1)
    codes = nearest_dynamic_codes(scaled)
    codes[nested == 0] = 0
    return codes.reshape(-1)[: absmax.size], nested, offset


def torch_mean(values: np.ndarray) -> np.float32:
    """`torch.mean` of a flat float32 array to the last bit, as one AVX2 thread computes it.

    The offset of double quantisation is such a mean. Rows of 4 x 8 values are summed in a cascade
    of four levels, then the four, then the eight lanes one after another.
    """
    lanes, ways = 8, 4
    groups = values.size // (ways * lanes)
    rows, scalars = np.split(values, [values.size // lanes * lanes])
    grouped, rest = np.split(rows.reshape(-1, lanes), [groups * ways])
    level_size = 1 << max(4, max(groups - 1, 0).bit_length() // 4)
    first, *others = _cascade(grouped.reshape(groups, ways, lanes), level_size)
    by_lane = _sum_in_order(np.stack([_sum_in_order(np.stack([first, *rest])), *others]))
    total = _sum_in_order(np.concatenate([scalars, by_lane]))
    return np.float32(total) / np.float32(values.size)


def _cascade(rows: np.ndarray, level_size: int) -> np.ndarray:
    """The sum over the first axis by groups of `level_size` rows, groups of groups, four levels."""
    remainders = []
    for _ in range(3):
        whole = len(rows) // level_size * level_size
        remainders.append(_sum_in_order(rows[whole:]))
        groups = rows[:whole].reshape(-1, level_size, *rows.shape[1:])
        rows = _sum_in_order(np.moveaxis(groups, 1, 0))
    return _sum_in_order(np.stack([*remainders, _sum_in_order(rows)]))


def _sum_in_order(rows: np.ndarray) -> np.ndarray:
    """The sum over the first axis, one row after another (`np.sum` would pair rows up)."""
    total = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    return total


def _encode_blocks(blocks: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, absmax) of whole blocks `[n, block_size, m]`, which run along the middle axis."""
    absmax = _absmax(blocks, axis=1)
    reciprocal = np.float32(1) / np.maximum(absmax, _SMALLEST_ABSMAX)
    return nearest_codes(blocks * reciprocal[:, None], table), absmax


def _absmax(values: np.ndarray, axis: int) -> np.ndarray:
    absmax = np.abs(values).max(axis=axis)
    if not np.isfinite(absmax).all():
        raise ValueError("the array holds values that are not finite (NaN or infinity)")
    return absmax
