"""A product with a four-bit kernel on a TPU that dequantises in fast memory (Pallas, Mosaic).

Each step of the grid has a tile of packed bytes in vector memory, looks its values up by a lane
permutation, and multiplies at once. Permutations and products are the work of different units: the
compiler schedules them side by side, so that of many rows the look-up costs next to nothing.
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
from jax.experimental.pallas import tpu as pltpu

from lorax_ft.quantization.tilings import TpuTiling

Array = jax.Array

SUBLANES, LANES = 8, 128  # of a vector register


def product(
    x: Array,
    packed: Array,
    absmax: Array,
    table: np.ndarray,
    *,
    block_size: int,
    transposed: bool,
    tiling: TpuTiling,
    interpret: bool = False,
) -> Array:
    """`x [n, in] @ kernel [in, out]`, or `x [n, out] @ kernel.T`, in the dtype of x.

    `packed [in / 2, out]` and `absmax [in / block_size, out]` (float32) lie as
    `lorax_ft.quantization.nf4.FourBit` describes. The kernel is rounded to the dtype of x, and sums
    are in float32, as in XLA's product with the dequantised kernel. `tiling.inputs` must divide
    `in` and be a multiple of `block_size`, `tiling.outputs` must divide `out`.
    """
    rows, summed_size = x.shape
    in_size, out_size = 2 * packed.shape[0], packed.shape[1]
    made_size = in_size if transposed else out_size
    blocks = tiling.inputs // block_size
    absmax = absmax.reshape(-1, blocks, out_size)  # a tile's is a whole axis, as Mosaic wants it
    made, summed = tiling.outputs, tiling.inputs  # sizes of a tile
    if transposed:
        made, summed = summed, made

    def of_kernel(row: Any, made: Any, summed: Any) -> tuple[Any, Any]:
        """Which tile of the kernel: along its inputs, along its outputs."""
        return (made, summed) if transposed else (summed, made)

    def of_absmax(*step: Any) -> tuple[Any, int, Any]:
        inputs, outputs = of_kernel(*step)
        return inputs, 0, outputs

    return pl.pallas_call(
        functools.partial(_kernel, table=table, block_size=block_size, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((rows, made_size), x.dtype),
        grid=(math.ceil(rows / tiling.rows), made_size // made, summed_size // summed),
        in_specs=[
            pl.BlockSpec((tiling.rows, summed), lambda row, made, summed: (row, summed)),
            pl.BlockSpec((tiling.inputs // 2, tiling.outputs), of_kernel),
            pl.BlockSpec((None, blocks, tiling.outputs), of_absmax),
        ],
        out_specs=pl.BlockSpec((tiling.rows, made), lambda row, made, summed: (row, made)),
        scratch_shapes=[
            pltpu.VMEM((tiling.inputs, tiling.outputs), x.dtype),
            pltpu.VMEM((tiling.rows, made), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * in_size * out_size,
            bytes_accessed=packed.nbytes
            + absmax.nbytes
            + x.nbytes
            + x.dtype.itemsize * rows * made_size,
            transcendentals=0,
        ),
        interpret=interpret,
        name="four_bit_product",
    )(x, packed, absmax)


def _kernel(
    x_ref: Any,
    packed_ref: Any,
    absmax_ref: Any,
    out_ref: Any,
    kernel_ref: Any,
    sums_ref: Any,
    *,
    table: np.ndarray,
    block_size: int,
    transposed: bool,
) -> None:
    """One tile of the output: adds the product with one tile of the kernel."""
    half = block_size // 2
    values = _in_lanes(table)
    for block in range(absmax_ref.shape[0]):
        packed = packed_ref[pl.ds(block * half, half), :].astype(jnp.int32)
        absmax = absmax_ref[pl.ds(block, 1), :]
        for part, codes in enumerate((packed >> 4, packed & 15)):
            kernel = _look_up(values, codes) * absmax
            kernel_ref[pl.ds(block * block_size + part * half, half), :] = kernel.astype(
                x_ref.dtype
            )
    axes = ((1,), (1 if transposed else 0,))
    # no branch for the first and the last step: it would end what is scheduled together
    sums = jnp.where(pl.program_id(2) == 0, 0.0, sums_ref[...]) + lax.dot_general(
        x_ref[...], kernel_ref[...], (axes, ((), ())), preferred_element_type=jnp.float32
    )
    sums_ref[...] = sums
    out_ref[...] = sums.astype(out_ref.dtype)


def _in_lanes(table: np.ndarray) -> Array:
    """The table along the lanes of a vector register, made by selects: kernels hold no arrays."""
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    values = jnp.zeros((SUBLANES, LANES), jnp.float32)
    for code, value in enumerate(table):
        values = jnp.where(lane == code, jnp.float32(value), values)
    return values


def _look_up(values: Array, codes: Array) -> Array:
    """`table[codes]`, one register at a time."""

    def register(row: int, column: int) -> Array:
        some = codes[row : row + SUBLANES, column : column + LANES]
        return jnp.take_along_axis(values, some, axis=1, mode="promise_in_bounds")

    rows, columns = codes.shape
    return jnp.concatenate(
        [
            jnp.concatenate([register(row, column) for column in range(0, columns, LANES)], axis=1)
            for row in range(0, rows, SUBLANES)
        ],
        axis=0,
    )
