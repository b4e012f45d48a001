"""Four-bit kernels: the NF4 and FP4 leaves, how blocks lie in memory and are dequantised."""

from __future__ import annotations

import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lorax_ft.leaves import Array, leaf, static_field
from lorax_ft.quantization import codebooks, fused
from lorax_ft.quantization.encoding import NESTED_BLOCK, is_blocked
from lorax_ft.quantization.quantized import Dot, Quantized


@leaf
class FourBit(Quantized):
    """A kernel in four bits a value: `table[code] * absmax`, one absmax for each block of values.

    Seen as the matrix `[in, out]`, a block is `block_size` inputs of one output. Where those fit
    (`in` is a multiple of `block_size`) the kernel keeps its orientation, so both axes shard:

        packed  [*stack, in / 2, out]            of each block the first half in the high nibbles
        absmax  [*stack, in / block_size, out]

    Elsewhere blocks run over the flat `[out, in]` array, two neighbours to a byte, as bitsandbytes
    has them:

        packed  [*stack, n / 2],   absmax  [*stack, n / block_size]      rounded up

    With double quantisation absmax is uint8 codes of `dynamic_map`, and

        nested_absmax  [*stack, blocks / 256],   offset  [*stack]

    where each 256 blocks in the order of the `[out, in]` array share one nested absmax.
    """

    table: ClassVar[np.ndarray]

    packed: Array
    absmax: Array
    nested_absmax: Array | None = None
    offset: Array | None = None
    block_size: int = static_field()

    @property
    def blocked(self) -> bool:
        """Whether blocks lie within columns, rather than in the flat array."""
        return is_blocked(self.in_size, self.block_size)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.packed.shape[: -2 if self.blocked else -1])

    def _dequantized(self) -> Array:
        absmax = self.float_absmax()
        stack = self.stack_shape
        if self.blocked:
            blocks = self.packed.reshape(*stack, absmax.shape[-2], -1, self.out_size)
            values = self._values(blocks, absmax[..., None, :], axis=-2)
            return values.reshape(*stack, self.in_size, self.out_size)
        # a byte as a block of its own puts its two values side by side
        size = self.in_size * self.out_size
        absmax = jnp.repeat(absmax, self.block_size // 2, axis=-1)[..., : self.packed.shape[-1]]
        values = self._values(self.packed[..., None], absmax[..., None], axis=-1)
        values = values.reshape(*stack, -1)[..., :size]
        return values.reshape(*stack, self.out_size, self.in_size).swapaxes(-1, -2)

    def times(self, dot: Dot, x: Array) -> Array:
        y = fused.product(dot, self, x)
        return super().times(dot, x) if y is None else y

    def _values(self, packed: Array, absmax: Array, axis: int) -> Array:
        """Dequantises bytes `[..., block_size / 2, ...]` into `block_size` values along `axis`."""
        # one look-up of all the codes costs a TPU a fifth less than one for each half of the block
        codes = jnp.concatenate([packed >> 4, packed & 15], axis=axis)
        return (_look_up(self.table, codes) * absmax).astype(self.dtype)

    def _rows(self, ids: Array) -> Array:
        if not self.blocked:
            return super()._rows(ids)
        half = self.block_size // 2
        block, row = ids // self.block_size, ids % self.block_size
        packed = jnp.asarray(self.packed)[block * half + row % half]
        codes = jnp.where((row < half)[..., None], packed >> 4, packed & 15)
        return (_look_up(self.table, codes) * self.float_absmax()[block]).astype(self.dtype)

    def float_absmax(self) -> Array:
        """absmax in float32, in the layout of its codes where it is quantised itself."""
        if self.nested_absmax is None or self.offset is None:
            return jnp.asarray(self.absmax)
        depth = len(self.stack_shape)
        shape = self.absmax.shape[depth:]
        nested = jnp.repeat(self.nested_absmax, NESTED_BLOCK, axis=-1)[..., : math.prod(shape)]
        if self.blocked:  # flat in the order of [out, in / block_size]
            nested = nested.reshape(*self.stack_shape, *reversed(shape)).swapaxes(-1, -2)
        offset = self.offset.reshape(*self.stack_shape, *(1,) * len(shape))
        centred = jnp.asarray(codebooks.dynamic_map())[self.absmax.astype(jnp.int32)] * nested
        # The clamp changes nothing but keeps compilers from fusing the multiplication with the sum:
        # bitsandbytes rounds in between, and that shows where an absmax is far below the offset.
        largest = np.finfo(np.float32).max
        return lax.clamp(-largest, centred, largest) + offset

    def partition_specs(self, spec: PartitionSpec) -> FourBit:
        """Blocks follow the kernel; flat ones and the small nested absmax are replicated."""
        stack, inputs, outputs = self.matrix_specs(spec)
        core = (inputs, outputs) if self.blocked else (None,)
        return self.replace(
            packed=PartitionSpec(*stack, *core),
            absmax=PartitionSpec(*stack, *core),
            nested_absmax=None if self.nested_absmax is None else PartitionSpec(*stack, None),
            offset=None if self.offset is None else PartitionSpec(*stack),
        )


@leaf
class NF4(FourBit):
    """A kernel in four-bit NormalFloat (Dettmers et al. 2023, "QLoRA")."""

    table: ClassVar[np.ndarray] = codebooks.NF4


@leaf
class FP4(FourBit):
    """A kernel in four-bit floating point: one sign, two exponent and one mantissa bit."""

    table: ClassVar[np.ndarray] = codebooks.FP4


def _look_up(table: np.ndarray, codes: Array) -> Array:
    """`table[codes]` in float32; on a TPU, where gathers are slow, by selects on the bits."""
    return lax.platform_dependent(
        codes,
        tpu=lambda codes: _select(table, codes),
        default=lambda codes: jnp.asarray(table)[codes.astype(jnp.int32)],
    )


def _select(table: np.ndarray, codes: Array) -> Array:
    values = [jnp.float32(value) for value in table]
    bit = 1
    while len(values) > 1:
        is_set = (codes & bit) != 0
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2])]
        bit *= 2
    return values[0]
