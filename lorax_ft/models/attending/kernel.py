"""What a kernel of attention is asked for, and what it tells of itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import numpy as np

from lorax_ft.axes import AXES, MEMBER, ROWS, TENSOR
from lorax_ft.models.layers import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """Which keys each query sees."""

    mask: Array | None = None  # [batch, 1, 1, keys], True for seen keys
    hides_ends: bool = False  # by its making the mask hides nothing but what is behind a text
    is_causal: bool = False
    window: int | Array | None = None  # how many keys a query sees, itself among them
    first: int | Array | None = None  # the key that the first query stands at; None: ends are level
    segments: Array | None = None  # [batch, length]: a query sees its own and what is before all
    crosses: bool = False  # the keys are of another text, whose mask says nothing of the queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """What is made of the products of queries and keys before and after the softmax."""

    scale: float | None = None  # 1 / sqrt(head_dim) where None
    softcap: float | None = None
    bias: Array | None = None  # [1 or batch, heads, length, keys]
    dropout_rate: float = 0.0
    dropout_key: Array | None = None  # without it nothing is dropped

    def factor(self, head_dim: int) -> float:
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention: what it has not, ever and in a call, and where it is chosen."""

    attend: Callable[[Array, Array, Array, Seen, Products], Array]
    lacks: Callable[[Array, Seen, Products], str | None] = lambda *_: None
    serves: Callable[[Array, Array, Seen, Products], bool] = lambda *_: True
    shortest: Callable[[Array, Array, Seen, Products], int] = lambda *_: 0  # keys from which on


def is_constant(window: int | Array | None) -> TypeGuard[int]:
    """Whether a window is known when the program is made: a layer's own, of those that are scanned
    or computed again, is not."""
    return isinstance(window, (int, np.integer))


# --- Where a call stands --------------------------------------------------------------------------


def is_of_members() -> bool:
    """Whether members of a sweep are computed side by side, by `jax.vmap`."""
    try:
        jax.lax.axis_size(MEMBER)
    except NameError:  # no such axis here
        return False
    return True


def mesh_and_sizes() -> tuple[Any, Mapping[str, int]]:
    """The context's mesh and the sizes of those of its axes that split a model's arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh, {axis: mesh.shape[axis] for axis in AXES if axis in mesh.shape}


def rows_of(sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in ROWS if axis in sizes)


def axis_of_heads(sizes: Mapping[str, int], kv_heads: int) -> str | None:
    """The axis that splits heads; None where it does not divide those of keys."""
    return TENSOR if TENSOR in sizes and kv_heads % sizes[TENSOR] == 0 else None
