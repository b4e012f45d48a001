"""What leaves share that put something small beside a kernel or bias that stays as it is."""

from __future__ import annotations

import abc
from typing import Any

from jax.sharding import PartitionSpec

from lorax_ft.leaves import Array, Leaf, as_matrix
from lorax_ft.methods.lora_leaf import base_product, take_rows


class Wrapper(Leaf):
    """A leaf round `base`, an array or leaf `[*stack, *core]` whose inputs are `base_in_axes`."""

    base: Any
    base_in_axes: tuple[int, ...]

    @property
    @abc.abstractmethod
    def stack_depth(self) -> int:
        """How many stack axes there are, read off a field whose own axes are known."""

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape[: self.stack_depth])

    @property
    def core_shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape[self.stack_depth :])

    @property
    def in_axes(self) -> tuple[int, ...]:
        return self.base_in_axes

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def astype(self, dtype: Any) -> Any:
        return self.replace(base=self.base.astype(dtype))

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        raise TypeError(f"a {type(self).__name__} leaf cannot be multiplied with transposed")

    def take(self, ids: Array, *, mode=None) -> Array:
        raise TypeError(f"a {type(self).__name__} leaf is no table to look things up in")

    def base_linear(self, x: Array, options: dict[str, Any], transposed: bool = False) -> Array:
        """`x @ base` or `x @ base.T`, for x [..., d]."""
        base = self.base if isinstance(self.base, Leaf) else as_matrix(self.base, self.in_axes)
        rows = x.reshape(-1, x.shape[-1])
        pair = (options["precision"], options["preferred_element_type"])
        y = base_product(pair, base, rows, transposed=transposed)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def base_take(self, ids: Array, mode: str | None) -> Array:
        return take_rows(self.base, self.in_axes, ids, mode)

    def base_specs(self, spec: PartitionSpec) -> Any:
        return self.base.partition_specs(spec) if isinstance(self.base, Leaf) else spec


def row(vector: Array, y: Array) -> Array:
    """A vector `[d]` in the dtype and rank of `y` [..., d]."""
    return vector.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def stack_spec(spec: PartitionSpec, depth: int) -> PartitionSpec:
    """The spec of a field that is sharded along its stack axes alone."""
    return PartitionSpec(*tuple(spec)[:depth])
