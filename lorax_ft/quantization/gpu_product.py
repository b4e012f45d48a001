"""A product with a four-bit kernel on a GPU that dequantises in registers (Pallas, Triton).

For few rows of x a product is bound by reading the kernel. XLA writes the dequantised kernel to
memory and reads it again; here each program reads packed bytes and multiplies at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lorax_ft.quantization.tilings import GpuTiling

Array = jax.Array


def product(
    x: Array,
    packed: Array,
    absmax: Array,
    table: np.ndarray,
    *,
    block_size: int,
    tiling: GpuTiling,
    interpret: bool = False,
) -> Array:
    """`x [n, in] @ kernel [in, out]` in the dtype of x, summed in float32.

    `packed [in / 2, out]` and `absmax [in / block_size, out]` (float32) lie as
    `lorax_ft.quantization.nf4.FourBit` describes. The table's values are rounded to bfloat16.
    `tiling.columns` must divide `out`, and `tiling.splits` the blocks of a column.
    """
    rows, in_size = x.shape
    out_size = packed.shape[1]
    values_of = _compared if interpret else _permuted
    body = functools.partial(
        _kernel,
        values_of=functools.partial(values_of, np.asarray(table, jnp.bfloat16)),
        row_count=rows,
        half=block_size // 2,
        blocks=in_size // block_size // tiling.splits,
        tiling=tiling,
    )
    partial_sums = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((tiling.splits, rows, out_size), jnp.float32),
        grid=(math.ceil(rows / tiling.rows), out_size // tiling.columns, tiling.splits),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        name="four_bit_product",
    )(x, packed, absmax)
    return partial_sums.sum(0).astype(x.dtype)


def _kernel(
    x_ref: Any,
    packed_ref: Any,
    absmax_ref: Any,
    out_ref: Any,
    *,
    values_of: Any,
    row_count: int,
    half: int,
    blocks: int,
    tiling: GpuTiling,
) -> None:
    """One program: some rows of x by some columns of the kernel, over one split of the inputs."""
    first_row = pl.program_id(0) * tiling.rows
    columns = pl.ds(pl.program_id(1) * tiling.columns, tiling.columns)
    split = pl.program_id(2)
    rows = pl.ds(first_row, tiling.rows)
    is_row = (first_row + jnp.arange(tiling.rows) < row_count)[:, None]

    def add_block(step: Array, total: Array) -> Array:
        block = split * blocks + step
        packed = triton.load(packed_ref.at[pl.ds(block * half, half), columns])
        absmax = triton.load(absmax_ref.at[block, columns])[None, :]
        sums = jnp.zeros_like(total)
        for part, values in enumerate(values_of(packed)):
            inputs = pl.ds((block * 2 + part) * half, half)
            x = triton.load(x_ref.at[rows, inputs], mask=is_row, other=0)
            values = values * absmax if tiling.scales_values else values
            sums = sums + triton.dot(x, values.astype(x.dtype))
        return total + (sums if tiling.scales_values else sums * absmax)

    total = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    total = lax.fori_loop(0, blocks, add_block, total)
    triton.store(out_ref.at[split, rows, columns], total, mask=is_row)


# --- The values of the high and of the low nibbles of bytes, in float32 ---------------------------


def _compared(table: np.ndarray, packed: Array) -> tuple[Array, Array]:
    """By comparisons, which Pallas's interpreter knows."""
    codes = packed.astype(jnp.int32)

    def look_up(codes: Array) -> Array:
        values = jnp.zeros(codes.shape, jnp.float32)
        for code, value in enumerate(table):
            values = jnp.where(codes == code, jnp.float32(value), values)
        return values

    return look_up(codes >> 4), look_up(codes & 15)


def _permuted(table: np.ndarray, packed: Array) -> tuple[Array, Array]:
    """By instructions that permute bytes: some three a value, and no memory is asked.

    Of the variants that were timed (a table in memory, a tree of selects) this is the fastest.
    `prmt` looks four nibbles up in eight bytes, by their lower three bits. For four bytes of
    `packed` it is asked for the lower and upper bytes of bfloat16, in either half of the table;
    nibbles' fourth bits then choose between the halves.
    """
    bits = table.view(np.uint16)
    low, high = (
        [
            int.from_bytes(bytes(plane[start : start + 4].tolist()), "little")
            for start in range(0, 16, 4)
        ]
        for plane in (bits & 255, bits >> 8)
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
    both = lax.bitcast_convert_type(both, jnp.uint32)
    high = lax.bitcast_convert_type(both & jnp.uint32(0xFFFF0000), jnp.float32)
    low = lax.bitcast_convert_type(both << jnp.uint32(16), jnp.float32)
    return high, low
