"""The leaf protocol: small frozen dataclasses that stand in a parameter tree where an array would.

A leaf is a linear map that knows more about itself than an array does: that it is stored in four
bits, or that it is a frozen kernel with a trainable low-rank update. Leaves nest: the `base` of a
LoRA leaf may be an NF4 leaf.

Every array field of a leaf carries the *stack* axes first (layers under `nn.scan`, experts, members
of a sweep), so slicing a leaf is slicing each of its fields, as `scan` and `vmap` do with any
pytree. What is left after the stack axes is the *core*: the shape the model sees inside the loop.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import typing
from typing import Any, ClassVar, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array
PRODUCT = "product"  # the `checkpoint_name` of what is dear to compute and cheap to keep
_T = TypeVar("_T", bound=type)
_L = TypeVar("_L", bound="Leaf")


class Leaf(abc.ABC):
    """What a parameter tree may hold in place of an array; make one with the `leaf` decorator.

    Seen as a matrix a leaf maps `in_size` inputs to `out_size` outputs. `in_axes` are the axes of
    its core that a product `x @ kernel` contracts, counted from the end: `(-2,)` for a `[d_in,
    d_out]` kernel or a `[vocabulary, d]` embedding, `(-1,)` for `[d_out, d_in]`, `(-3, -2)` for a
    `[heads, head_dim, d_out]` kernel.
    """

    trainable: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that are trained; everything else is frozen."""

    @property
    @abc.abstractmethod
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the leading stack axes, `()` inside a layer."""

    @property
    @abc.abstractmethod
    def core_shape(self) -> tuple[int, ...]:
        """Shape of the array that the leaf stands for, without its stack axes."""

    @property
    @abc.abstractmethod
    def in_axes(self) -> tuple[int, ...]:
        """Axes of the core that are inputs, as increasing negative numbers."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The dtype the leaf shows to the model, and computes in."""

    @abc.abstractmethod
    def astype(self, dtype: Any) -> Leaf:
        """The same leaf shown as, and computing in, `dtype`; stored fields keep their precision."""

    @abc.abstractmethod
    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        """`x @ kernel`: `[..., in_size]` to `[..., out_size]`. Only for a leaf without stack
        axes."""

    @abc.abstractmethod
    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        """`x @ kernel.T`: `[..., out_size]` to `[..., in_size]`. Only for a leaf without stack
        axes."""

    @abc.abstractmethod
    def take(self, ids: Array, *, mode=None) -> Array:
        """Rows of the matrix, as an embedding look-up: ids `[...]` to `[..., out_size]`."""

    def add_to(self, y: Array) -> Array:
        """What a leaf on a bias `[d]` makes of the `[..., d]` that the model adds the bias to.

        Only for a leaf without stack axes. Raises TypeError for a leaf that stands for no bias.
        """
        raise TypeError(f"a {type(self).__name__} leaf is nothing that can be added")

    @abc.abstractmethod
    def dense(self) -> Array:
        """The array `[*stack_shape, *core_shape]` that the leaf stands for, in `dtype`.

        Raises ValueError for a leaf that is no linear map, and so stands for no array.
        """

    @abc.abstractmethod
    def partition_specs(self, spec: PartitionSpec) -> Leaf:
        """The leaf with a `PartitionSpec` in each array field, given the one of the array it stands
        for."""

    def gathered_as(self, sharding: NamedSharding) -> Leaf:
        """The leaf with its word on how the kernel that it holds is to lie within a product.

        `sharding` is the core's. A leaf that stores a kernel in fewer bits than it multiplies with
        is then sent between devices as it is stored; others are as they were.
        """
        del sharding
        return self

    def replace(self: _L, **changes: Any) -> _L:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def trainable_count(self) -> int:
        """How many numbers of the leaf, and of the leaves in it, are trained."""
        return sum(
            content.trainable_count() if isinstance(content, Leaf) else math.prod(content.shape)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(content := getattr(self, field.name), Leaf)
            or field.name in self.trainable
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack_shape + self.core_shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def out_axes(self) -> tuple[int, ...]:
        """Axes of the core that are outputs, as increasing negative numbers."""
        return tuple(a for a in range(-len(self.core_shape), 0) if a not in self.in_axes)

    @property
    def is_bias(self) -> bool:
        """Whether the leaf is added, and not multiplied with: a bias has outputs alone."""
        return not self.in_axes

    @property
    def in_size(self) -> int:
        return math.prod(self.core_shape[a] for a in self.in_axes)

    @property
    def out_size(self) -> int:
        return math.prod(self.core_shape[a] for a in self.out_axes)


def static_field(**kwargs: Any) -> Any:
    """A hashable dataclass field that belongs to a leaf's structure, not to its arrays."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@typing.dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, static_field)
)
def leaf(cls: _T) -> _T:
    """Class decorator: a frozen, keyword-only dataclass that is a pytree of its array fields.

    Fields made with `static_field` are part of the tree structure (and so of the compiled program).
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.metadata.get("static")]
    return jax.tree_util.register_dataclass(
        cls, data_fields=[f.name for f in fields if f.name not in static], meta_fields=static
    )


def is_leaf(value: Any) -> bool:
    """Whether `value` is a leaf; the `is_leaf` of `jax.tree` functions that must not look
    inside."""
    return isinstance(value, Leaf)


def dense(parameter: Array | Leaf) -> Array:
    """The array that a parameter is or stands for."""
    return parameter.dense() if isinstance(parameter, Leaf) else parameter


def as_matrix(core: Array, in_axes: tuple[int, ...]) -> Array:
    """A core array `[...]` as the matrix `[in_size, out_size]`, whose inputs are `in_axes`."""
    axes = tuple(a % core.ndim for a in in_axes)
    others = tuple(a for a in range(core.ndim) if a not in axes)
    in_size = math.prod(core.shape[a] for a in axes)
    if axes + others != tuple(range(core.ndim)):
        core = core.transpose(axes + others)
    return core.reshape(in_size, -1)


def from_matrix(matrix: Array, core_shape: tuple[int, ...], in_axes: tuple[int, ...]) -> Array:
    """The inverse of `as_matrix`: `[in_size, out_size]` as an array of `core_shape`."""
    axes = tuple(a % len(core_shape) for a in in_axes)
    order = axes + tuple(a for a in range(len(core_shape)) if a not in axes)
    array = matrix.reshape(tuple(core_shape[a] for a in order))
    if order == tuple(range(len(core_shape))):
        return array
    return array.transpose(tuple(order.index(a) for a in range(len(core_shape))))
