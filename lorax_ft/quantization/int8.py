"""Eight-bit kernels: integers with one scale for each output channel."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lorax_ft.leaves import Array, leaf
from lorax_ft.quantization.quantized import Quantized

_CHUNK = 1 << 18  # values encoded at a time


@leaf
class Int8(Quantized):
    """A kernel in eight bits a value: `quantized * absmax / 127`, symmetric about zero.

    quantized  [*stack, in, out] int8 from -127 to 127
    absmax     [*stack, out] float32, the largest magnitude of an output channel
    """

    quantized: Array
    absmax: Array

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.quantized.shape[:-2])

    def matrix(self) -> Array:
        scale = self.absmax[..., None, :] * np.float32(1 / 127)
        return (jnp.asarray(self.quantized).astype(jnp.float32) * scale).astype(self.dtype)

    def _rows(self, ids: Array) -> Array:
        rows = jnp.asarray(self.quantized)[ids].astype(jnp.float32)
        scale = self.absmax * np.float32(1 / 127)
        return (rows * jnp.broadcast_to(scale, rows.shape)).astype(self.dtype)

    def partition_specs(self, spec: PartitionSpec) -> Int8:
        stack, inputs, outputs = self.matrix_specs(spec)
        return self.replace(
            quantized=PartitionSpec(*stack, inputs, outputs), absmax=PartitionSpec(*stack, outputs)
        )


def encode_int8(
    matrix: np.ndarray, absmax: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(quantized, absmax) of a matrix `[in, out]`. Raises ValueError for one that is not finite.

    `absmax` is given where the matrix is some rows of a larger one.
    """
    absmax = int8_absmax(matrix) if absmax is None else absmax
    divisor = np.where(absmax > 0, absmax, np.float32(1))
    quantized = np.empty(matrix.shape, np.int8)
    for rows in _chunks(matrix):
        scaled = matrix[rows].astype(np.float32) / divisor * np.float32(127)
        quantized[rows] = np.rint(scaled).astype(np.int8)
    return quantized, absmax


def int8_absmax(matrix: np.ndarray) -> np.ndarray:
    """The largest magnitude of each column, in float32. Raises as `encode_int8` does."""
    absmax = np.zeros(matrix.shape[1], np.float32)
    for rows in _chunks(matrix):
        absmax = np.maximum(absmax, np.abs(matrix[rows].astype(np.float32)).max(axis=0))
    if not np.isfinite(absmax).all():
        raise ValueError("the array holds values that are not finite (NaN or infinity)")
    return absmax


def _chunks(matrix: np.ndarray) -> list[slice]:
    """Rows to work on at a time, so that the working memory is small."""
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]
