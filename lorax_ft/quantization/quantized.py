"""What quantised leaves have in common: a frozen kernel that is dequantised inside each product.

The product has its own backward pass, which dequantises again: between forward and backward nothing
is kept but the packed arrays, and the input only where a float field of the leaf is differentiated.

On a mesh that splits kernels over devices which have other rows of the batch, each product needs a
whole kernel. A leaf that knows how it is to lie then gathers its packed arrays; left to itself XLA
gathers what was dequantised, which is four times as much.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.axes import even
from lorax_ft.leaves import Array, Leaf, from_matrix, leaf, static_field
from lorax_ft.trees import combine


@leaf
class Quantized(Leaf):
    """A kernel in few bits; a subclass adds its array fields and how they become a matrix."""

    kernel_shape: tuple[int, ...] = static_field()  # the core's; not known from packed fields
    kernel_in_axes: tuple[int, ...] = static_field()
    shown_dtype: Any = static_field()
    within_product: NamedSharding | None = static_field(default=None)  # of the core

    @abc.abstractmethod
    def _dequantized(self) -> Array:
        """`matrix`, of fields that lie as it needs them."""

    def matrix(self) -> Array:
        """The dequantised kernel as `[*stack, in_size, out_size]`, in `dtype`."""
        return self.gathered()._dequantized()

    def gathered_as(self, sharding: NamedSharding) -> Self:
        return self.replace(within_product=sharding)

    def gathered(self) -> Self:
        """The leaf with its fields placed as `within_product` says, where it says something."""
        if self.within_product is None:
            return self
        mesh, spec = self.within_product.mesh, self.within_product.spec
        specs = self.partition_specs(PartitionSpec(*(None,) * len(self.stack_shape), *spec))

        def place(spec: PartitionSpec, field: Array) -> Array:
            lies = NamedSharding(mesh, even(spec, field.shape, mesh))
            return lax.with_sharding_constraint(field, lies)

        placed = jax.tree.map(place, specs, self, is_leaf=lambda x: isinstance(x, PartitionSpec))
        # Without a barrier XLA for GPU brings what it gathered into order only after it has widened
        # every code to four bytes.
        return lax.optimization_barrier(placed)

    @property
    def core_shape(self) -> tuple[int, ...]:
        return self.kernel_shape

    @property
    def in_axes(self) -> tuple[int, ...]:
        return self.kernel_in_axes

    @property
    def dtype(self) -> Any:
        return self.shown_dtype

    def astype(self, dtype: Any) -> Self:
        return self.replace(shown_dtype=jnp.dtype(dtype))

    def times(self, dot: Dot, x: Array) -> Array:
        """`dot(x, matrix)`, by the way that is the fastest for the leaf."""
        return dot(x, self.matrix())

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        return self._multiply(Dot(False, precision, preferred_element_type, x.dtype), x)

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        return self._multiply(Dot(True, precision, preferred_element_type, x.dtype), x)

    def _multiply(self, dot: Dot, x: Array) -> Array:
        if self.stack_shape:
            raise ValueError(
                f"A stack {list(self.stack_shape)} of kernels has no single product. Slice it, or "
                "use jax.vmap or jax.lax.scan over it."
            )
        return _product(dot, self, x)

    def take(self, ids: Array, *, mode: Any = None) -> Array:
        mode = lax.GatherScatterMode.from_any(mode)
        rows = self._rows(jnp.clip(ids, 0, self.in_size - 1))
        if mode != lax.GatherScatterMode.FILL_OR_DROP:
            return rows
        known = (ids >= 0) & (ids < self.in_size)
        return jnp.where(known[..., None], rows, jnp.array(jnp.nan, rows.dtype))

    def _rows(self, ids: Array) -> Array:
        """Rows of the matrix of a leaf without stack axes; `ids` are in range."""
        return self.matrix()[ids]

    def matrix_specs(self, spec: PartitionSpec) -> tuple[tuple[Any, ...], Any, Any]:
        """Entries for (the stack axes, inputs, outputs) of the matrix, given the spec of the array.

        Where several axes fold into one, the outermost one's entry holds if the others have none.
        """
        full = (*spec, *(None,) * (self.ndim - len(spec)))

        def folded(axes: tuple[int, ...]) -> Any:
            first, *others = (full[axis] for axis in axes)
            return None if any(others) else first

        return full[: len(self.stack_shape)], folded(self.in_axes), folded(self.out_axes)

    def dense(self) -> Array:
        restore = functools.partial(from_matrix, core_shape=self.core_shape, in_axes=self.in_axes)
        for _ in self.stack_shape:
            restore = jax.vmap(restore)
        return restore(self.matrix())


@dataclasses.dataclass(frozen=True)
class Dot:
    """The static part of a product: `x @ matrix`, or `x @ matrix.T`."""

    transposed: bool
    precision: Any
    preferred_element_type: Any
    x_dtype: Any

    def back(self, dtype: Any) -> Dot:
        """The product that takes a gradient of the output, of a dtype, to that of x."""
        return Dot(not self.transposed, self.precision, self.x_dtype, dtype)

    def __call__(self, x: Array, matrix: Array) -> Array:
        axes = ((x.ndim - 1,), (1 if self.transposed else 0,))
        return lax.dot_general(
            x,
            matrix,
            (axes, ((), ())),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dot: Dot, kernel: Quantized, x: Array) -> Array:
    return kernel.times(dot, x)


def _forward(dot: Dot, kernel: Any, x: Any) -> tuple[Array, tuple[Quantized, Array | None]]:
    differentiated = any(field.perturbed for field in jax.tree.leaves(kernel))
    kernel = jax.tree.map(lambda field: field.value, kernel)
    return kernel.times(dot, x.value), (kernel, x.value if differentiated else None)


def _backward(dot: Dot, residuals: tuple[Quantized, Array | None], grad: Any) -> tuple[Any, Any]:
    """The cotangents of the kernel, None for its integers and where nobody asks, and of x."""
    kernel, x = residuals
    if isinstance(grad, SymbolicZero):
        return None, None
    kernel = kernel.gathered()  # before the barrier: what recomputed the layer has gathered it too
    # Without a barrier XLA merges this dequantisation with the forward one and keeps its result.
    # Its CPU compiler does so in any case: there only layers under a scan keep no dense copy.
    kernel, grad = lax.optimization_barrier((kernel, grad))
    grad_x = kernel.times(dot.back(grad.dtype), grad)
    if x is None:
        return None, grad_x
    floats, integers = _split(kernel)
    matrix, pull = jax.vjp(lambda floats: combine(floats, integers).matrix(), floats)
    (grad_matrix,) = jax.linear_transpose(lambda matrix: dot(x, matrix), matrix)(grad)
    (grad_kernel,) = pull(grad_matrix)
    return grad_kernel, grad_x


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _split(kernel: Quantized) -> tuple[Quantized, Quantized]:
    """The float fields of a leaf and its integer ones, None in the other's place."""
    is_float = jax.tree.map(lambda field: jnp.issubdtype(field.dtype, jnp.floating), kernel)
    floats = jax.tree.map(lambda wanted, field: field if wanted else None, is_float, kernel)
    integers = jax.tree.map(lambda wanted, field: None if wanted else field, is_float, kernel)
    return floats, integers
