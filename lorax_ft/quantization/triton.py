"""A product with a four-bit kernel on a GPU that dequantises in registers (Pallas, Triton).

For few rows of x a product is bound by reading the kernel. XLA writes the dequantised kernel to
memory and reads it again; here each program reads packed bytes and multiplies at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one product is cut: `rows` of x by `columns` of the kernel a program, `splits` of `in`."""

    rows: int = 16
    columns: int = 128
    splits: int = 4
    warps: int = 4
    stages: int = 3
    lookup: str = "load"
    """How a code becomes a value: "load" its entry, "select" by its bits, "pair": load the two
    bfloat16 values of a byte at once, "permute": the same by the bytes' permutation in registers."""
    scaled: str = "before"  # absmax times the table's entry, or times the block's partial product


def product(
    x: Array,
    packed: Array,
    absmax: Array,
    table: np.ndarray,
    *,
    block_size: int,
    tiling: Tiling = Tiling(),
    interpret: bool = False,
) -> Array:
    """`x [n, in] @ kernel [in, out]` in the dtype of x, summed in float32.

    `packed [in / 2, out]` and `absmax [in / block_size, out]` (float32) lie as
    `lorax_ft.quantization.nf4.FourBit` describes.
    """
    rows, in_size = x.shape
    out_size = packed.shape[1]
    blocks = in_size // block_size
    grid = (math.ceil(rows / tiling.rows), out_size // tiling.columns, tiling.splits)
    body = functools.partial(
        _kernel,
        look_up=functools.partial(_look_up, tiling.lookup, table, interpret),
        row_count=rows,
        half=block_size // 2,
        blocks=blocks // tiling.splits,
        tiling=tiling,
    )
    partial_sums = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(
            (tiling.splits, rows, out_size), x.dtype if tiling.splits == 1 else jnp.float32
        ),
        grid=grid,
        interpret=interpret,
        compiler_params=triton.CompilerParams(
            num_warps=tiling.warps, num_stages=tiling.stages
        ),
        name="four_bit_product",
    )(x, packed, absmax, *_tables(table))
    return partial_sums[0] if tiling.splits == 1 else partial_sums.sum(0).astype(x.dtype)


def _kernel(
    x_ref, packed_ref, absmax_ref, table_ref, pairs_ref, out_ref, *, look_up, row_count, half, blocks, tiling
):
    first_row = pl.program_id(0) * tiling.rows
    columns = pl.ds(pl.program_id(1) * tiling.columns, tiling.columns)
    split = pl.program_id(2)
    rows = pl.ds(first_row, tiling.rows)
    is_row = (first_row + jnp.arange(tiling.rows) < row_count)[:, None]
    dtype = x_ref.dtype

    def add_block(step, total):
        block = split * blocks + step
        packed = triton.load(packed_ref.at[pl.ds(block * half, half), columns])
        absmax = triton.load(absmax_ref.at[block, columns])
        sums = 0.0
        for part, values in enumerate(look_up(packed, table_ref, pairs_ref)):
            inputs = pl.ds(block * 2 * half + part * half, half)
            x = triton.load(x_ref.at[rows, inputs], mask=is_row, other=0)
            if tiling.scaled == "before":
                values = values * absmax[None, :]
            values = values.astype(dtype)
            sums = sums + triton.dot(x, values)
        if tiling.scaled == "after":
            sums = sums * absmax[None, :]
        return total + sums

    total = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    total = lax.fori_loop(0, blocks, add_block, total)
    triton.store(out_ref.at[split, rows, columns], total.astype(out_ref.dtype), mask=is_row)


def vector_product(
    x: Array,
    packed: Array,
    absmax: Array,
    table: np.ndarray,
    *,
    block_size: int,
    tiling: Tiling = Tiling(),
    interpret: bool = False,
) -> Array:
    """`product` for one row of x, in float32 multiplications and sums without tensor cores."""
    _, in_size = x.shape
    out_size = packed.shape[1]
    body = functools.partial(
        _vector_kernel,
        look_up=functools.partial(_look_up, tiling.lookup, table, interpret),
        half=block_size // 2,
        blocks=in_size // block_size // tiling.splits,
        tiling=tiling,
    )
    partial_sums = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((tiling.splits, out_size), jnp.float32),
        grid=(out_size // tiling.columns, tiling.splits),
        interpret=interpret,
        compiler_params=triton.CompilerParams(
            num_warps=tiling.warps, num_stages=tiling.stages
        ),
        name="four_bit_vector_product",
    )(x[0], packed, absmax, *_tables(table))
    return partial_sums.sum(0, keepdims=True).astype(x.dtype)


def _vector_kernel(
    x_ref, packed_ref, absmax_ref, table_ref, pairs_ref, out_ref, *, look_up, half, blocks, tiling
):
    columns = pl.ds(pl.program_id(0) * tiling.columns, tiling.columns)
    split = pl.program_id(1)

    def add_block(step, total):
        block = split * blocks + step
        packed = triton.load(packed_ref.at[pl.ds(block * half, half), columns])
        absmax = triton.load(absmax_ref.at[block, columns])
        first = triton.load(x_ref.at[pl.ds(block * 2 * half, half)]).astype(jnp.float32)
        second = triton.load(x_ref.at[pl.ds(block * 2 * half + half, half)]).astype(jnp.float32)
        high, low = look_up(packed, table_ref, pairs_ref)
        values = high * first[:, None] + low * second[:, None]
        return total + values.sum(axis=0) * absmax

    total = lax.fori_loop(0, blocks, add_block, jnp.zeros((tiling.columns,), jnp.float32))
    triton.store(out_ref.at[split, columns], total)


def _look_up(
    lookup: str, table: np.ndarray, interpret: bool, packed: Array, table_ref, pairs_ref
) -> tuple[Array, Array]:
    """The values of the high and of the low nibbles, in float32."""
    if lookup in ("load", "select"):
        codes = packed.astype(jnp.int32)
        pair = (codes >> 4, codes & 15)
        if lookup == "load":
            high, low = (triton.load(table_ref.at[codes]) for codes in pair)
        else:
            high, low = (_select(table, codes) for codes in pair)
        return high, low
    if lookup == "pair" or interpret:
        both = triton.load(pairs_ref.at[packed.astype(jnp.int32)])
    else:
        both = _permute(table, packed)
    high = lax.bitcast_convert_type(both & jnp.uint32(0xFFFF0000), jnp.float32)
    low = lax.bitcast_convert_type(both << jnp.uint32(16), jnp.float32)
    return high, low


def _bits(table: np.ndarray) -> np.ndarray:
    """The entries rounded to bfloat16, their sixteen bits as uint32."""
    return np.asarray(table, jnp.bfloat16).view(np.uint16).astype(np.uint32)


def _tables(table: np.ndarray) -> tuple[Array, Array]:
    """The table in float32, and for each byte the bits of its high and its low nibble's value."""
    bits = _bits(table)
    pairs = (bits[:, None] << np.uint32(16)) | bits[None, :]
    return jnp.asarray(table, jnp.float32), jnp.asarray(pairs.reshape(-1))


def _permute(table: np.ndarray, packed: Array) -> Array:
    """The pairs of values of four bytes at a time: `prmt` looks four nibbles up in eight bytes."""
    low, high = (
        [
            int.from_bytes(bytes(plane[start : start + 4].tolist()), "little")
            for start in range(0, 16, 4)
        ]
        for plane in (_bits(table) & 255, _bits(table) >> 8)
    )
    lines = [".reg .b32 codes, above, choice, below, upper, lows, highs, zero, mask;"]
    lines += [f".reg .b32 l{i}, h{i};" for i in range(4)]
    lines += [f"mov.b32 l{i}, {low[i]:#x}; mov.b32 h{i}, {high[i]:#x};" for i in range(4)]
    lines += [
        "mov.b32 zero, 0; mov.b32 mask, 0xff00;",
        "and.b32 codes, $4, 0x77777777;",
        "shr.u32 above, $4, 3;",
        "and.b32 above, above, 0x11111111;",
    ]
    for first in (0, 2):
        lines += [
            "prmt.b32 choice, mask, zero, above;",
            "prmt.b32 below, l0, l1, codes;",
            "prmt.b32 upper, l2, l3, codes;",
            "lop3.b32 lows, upper, below, choice, 0xe4;",
            "prmt.b32 below, h0, h1, codes;",
            "prmt.b32 upper, h2, h3, codes;",
            "lop3.b32 highs, upper, below, choice, 0xe4;",
            f"prmt.b32 ${first}, lows, highs, 0x5140;",
            f"prmt.b32 ${first + 1}, lows, highs, 0x7362;",
        ]
        if first == 0:
            lines += ["shr.u32 codes, codes, 16;", "shr.u32 above, above, 16;"]
    (both,) = triton.elementwise_inline_asm(
        "{\n" + "\n".join(lines) + "\n}",
        args=[packed],
        constraints="=&r,=&r,=&r,=&r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.int32)],
    )
    return lax.bitcast_convert_type(both, jnp.uint32)


def _select(table: np.ndarray, codes: Array) -> Array:
    values = [jnp.float32(entry) for entry in table]
    bit = 1
    while len(values) > 1:
        is_set = (codes & bit) != 0
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2])]
        bit *= 2
    return values[0]
