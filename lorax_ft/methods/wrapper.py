"""What leaves share that put something small beside a kernel or bias that stays as it is."""

from __future__ import annotations

import abc
from typing import Any

from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.jaxprs import is_concrete
from lorax_ft.leaves import Array, Leaf, as_matrix

Options = tuple[Any, Any]  # (precision, preferred_element_type) of the products


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
        base = matrix_of(self.base, self.in_axes)
        rows = x.reshape(-1, x.shape[-1])
        pair = (options["precision"], options["preferred_element_type"])
        y = base_product(pair, base, rows, transposed=transposed)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def base_take(self, ids: Array, mode: str | None) -> Array:
        """Rows of the base seen as a matrix: ids `[...]` to `[..., out_size]`."""
        if isinstance(self.base, Leaf):
            return self.base.take(ids, mode=mode)
        return as_matrix(self.base, self.in_axes).at[ids].get(mode=mode)

    def base_specs(self, spec: PartitionSpec) -> Any:
        return self.base.partition_specs(spec) if isinstance(self.base, Leaf) else spec

    def gathered_as(self, sharding: NamedSharding) -> Any:
        if not isinstance(self.base, Leaf):
            return self
        return self.replace(base=self.base.gathered_as(sharding))


def row(vector: Array, y: Array) -> Array:
    """A vector `[d]` in the dtype and rank of `y` [..., d]."""
    return vector.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def stack_spec(spec: PartitionSpec, depth: int) -> PartitionSpec:
    """The spec of a field that is sharded along its stack axes alone."""
    return PartitionSpec(*tuple(spec)[:depth])


def matrix_of(base: Any, in_axes: tuple[int, ...]) -> Any:
    """A base without stack axes as something `base_product` multiplies with: a leaf, or a 2-D
    array."""
    return base if isinstance(base, Leaf) else as_matrix(base, in_axes)


def base_product(options: Options, base: Any, x: Array, *, transposed: bool = False) -> Array:
    """`x @ base`, or `x @ base.T`, of a leaf or a `[in, out]` array; x is `[n, in]`."""
    precision, preferred = options
    if isinstance(base, Leaf):
        product = base.linear_transposed if transposed else base.linear
        return product(x, precision=precision, preferred_element_type=preferred)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, base, contract, precision=precision, preferred_element_type=preferred)


def factor_specs(
    spec: PartitionSpec, depth: int, ndim: int, in_axes: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    """Specs of `a` [*stack, r, in], `b` [*stack, r, out] and a [*stack] field, from the kernel's
    own.

    Factors follow their base. Where several axes are folded into one, the outermost one's spec
    stands for all if the others have none, which is the same placement.
    """
    full = (*spec, *(None,) * (ndim - len(spec)))
    stack, core = full[:depth], full[depth:]

    def folded(axes: list[int]) -> Any:
        names = [core[i] for i in axes]
        return names[0] if names and not any(names[1:]) else None

    inputs = [len(core) + i for i in in_axes]
    outputs = [i for i in range(len(core)) if i not in inputs]
    return (
        PartitionSpec(*stack, None, folded(inputs)),
        PartitionSpec(*stack, None, folded(outputs)),
        PartitionSpec(*stack),
    )


def factor_count(a: Array, b: Array, rank: Array) -> int:
    """How many numbers of low-rank factors are real and not the padding of a lower rank."""
    if not is_concrete(rank):  # shapes alone: padding cannot be told from factors
        return a.size + b.size
    return int(rank.sum()) * (a.shape[-1] + b.shape[-1])
