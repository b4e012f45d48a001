"""The DoRA leaf: a kernel with a low-rank update, whose columns have trained lengths.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation":
`W' = magnitude * V / ||V||`, `V = W + scale * a.T @ b`, the norm taken over the inputs of each
output. As in the paper (section 4.3) and in Hugging Face PEFT the norm is held constant in the
gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.leaves import Array, Leaf, as_matrix, dense, from_matrix, leaf
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.wrapper import factor_specs


@leaf
class DoRA(Leaf):
    """`magnitude * base / ||base||` for a LoRA base; magnitude is `[*stack, out_size]`."""

    base: LoRA
    magnitude: Array

    trainable: ClassVar[tuple[str, ...]] = ("magnitude",)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self.base.stack_shape

    @property
    def core_shape(self) -> tuple[int, ...]:
        return self.base.core_shape

    @property
    def in_axes(self) -> tuple[int, ...]:
        return self.base.in_axes

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def astype(self, dtype: Any) -> DoRA:
        return self.replace(base=self.base.astype(dtype))

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        y = self.base.linear(x, precision=precision, preferred_element_type=preferred_element_type)
        return _scaled(y, self._gain())

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        return self.base.linear_transposed(
            _scaled(x, self._gain()),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    def take(self, ids: Array, *, mode: str | None = None) -> Array:
        return _scaled(self.base.take(ids, mode=mode), self._gain())

    def dense(self) -> Array:
        def scaled(base: LoRA, magnitude: Array) -> Array:
            matrix = as_matrix(base.dense(), self.in_axes)
            matrix = _scaled(matrix, magnitude / column_norms(base))
            return from_matrix(matrix, self.core_shape, self.in_axes)

        for _ in self.stack_shape:
            scaled = jax.vmap(scaled)
        return scaled(self.base, self.magnitude)

    def partition_specs(self, spec: PartitionSpec) -> DoRA:
        _, b, stack = factor_specs(spec, len(self.stack_shape), self.ndim, self.in_axes)
        magnitude = PartitionSpec(*stack, b[-1])
        return self.replace(base=self.base.partition_specs(spec), magnitude=magnitude)

    def gathered_as(self, sharding: NamedSharding) -> DoRA:
        return self.replace(base=self.base.gathered_as(sharding))

    def _gain(self) -> Array:
        return self.magnitude / lax.stop_gradient(column_norms(self.base))


def add_magnitude(base: LoRA) -> DoRA:
    """The DoRA leaf that equals `base`: its magnitudes are the lengths that the columns have."""
    norms = column_norms
    for _ in base.stack_shape:
        norms = jax.vmap(norms)
    return DoRA(base=base, magnitude=norms(base))


def column_norms(base: LoRA) -> Array:
    """Lengths `[out_size]` of the columns of `W + s a.T b`, of a leaf without stack axes, in
    float32.

    From `||w||^2 + 2 s b.(a w) + s^2 b.(a a.T) b`, so that the sum itself is never stored.
    """
    weight = as_matrix(dense(base.base), base.in_axes).astype(jnp.float32)
    a, b = base.a.astype(jnp.float32), base.b.astype(jnp.float32)
    cross = jnp.sum(b * (a @ weight), axis=0)
    square = jnp.sum(b * ((a @ a.T) @ b), axis=0)
    total = jnp.sum(weight * weight, axis=0) + 2 * base.scale * cross + base.scale**2 * square
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(jnp.float32).tiny))


def _scaled(y: Array, gain: Array) -> Array:
    return y * gain.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
