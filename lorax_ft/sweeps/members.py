"""Members: the trees of one run as a program of several takes them, and the stacks of them.

A member's arrays are its trainable half, its optimizer's state and those of its frozen arrays that
are not the base's; the base's are shared. Where members differ in size, zeros are behind those of
the smaller ones: the rows of a LoRA factor that pad a lower rank have gradients of exactly zero, as
have the units that pad a narrower adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_ft import trees
from lorax_ft.adapted import Adapted, Base, adapt
from lorax_ft.config import ExperimentConfig
from lorax_ft.leaves import Leaf, is_leaf

PyTree = Any


class Stack(NamedTuple):
    """What the members of a program have each for themselves: one tree, or many with an axis in
    front."""

    train: PyTree
    opt_state: PyTree
    own: PyTree  # frozen arrays that are not the base's; holes where the base has the array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves:
    """The parameters of one run, parted; the trees have each other's arrays as holes."""

    train: PyTree
    own: PyTree
    shared: PyTree  # the base's own arrays, not copies
    adapted: Adapted


def part(
    base: Base, config: ExperimentConfig, *, drops: bool, fingerprint: str | None = None
) -> Halves:
    """The parameters of a run on a base that others share.

    With `drops` every adapter that can drop inputs has a rate, which may be zero. Also under
    `jax.eval_shape`, which `shapes` does. Raises ValueError as `adapt` does.
    """
    adapted = adapt(base, config, fingerprint=fingerprint)
    params = _with_rates(adapted.params) if drops else adapted.params
    train, frozen = trees.partition(params, adapted.trainable)
    ids = {
        id(array)
        for path, array in trees.flatten_arrays(base.params).items()
        if path not in base.head
    }
    own = jax.tree.map(lambda x: None if id(x) in ids else x, frozen)
    shared = jax.tree.map(lambda x: x if id(x) in ids else None, frozen)
    return Halves(train=train, own=own, shared=shared, adapted=adapted)


def shapes(
    base: Base, config: ExperimentConfig, tx: optax.GradientTransformation, *, drops: bool
) -> Stack:
    """The shapes of one member's trees, without computing them."""

    def trees_of() -> Stack:
        halves = part(base, config, drops=drops, fingerprint="")
        return Stack(halves.train, tx.init(halves.train), halves.own)

    return jax.eval_shape(trees_of)


def largest(members: Sequence[PyTree]) -> PyTree:
    """The shapes that hold those of every member: along each axis the largest.

    Raises ValueError where the trees differ in more than sizes, naming the first array that does.
    """
    first = members[0]
    for other in members[1:]:
        _check_alike(first, other)
    return jax.tree.map(
        lambda *xs: jax.ShapeDtypeStruct(
            tuple(max(sizes) for sizes in zip(*(x.shape for x in xs))), xs[0].dtype
        ),
        *members,
    )


def step_sizes(members: Sequence[Stack], forward: float) -> tuple[Stack, ...]:
    """Of these shapes those that a step is to be compiled for, from small to large.

    A size of its own is worth it where it spares a tenth of the next larger one's FLOPs. For each
    row a step takes twice the base's `forward` FLOPs, there and back, and six for each weight of
    the trainable half, whose gradient is computed too.
    """

    def flops(member: Stack) -> float:
        return 2 * forward + 6 * sum(math.prod(x.shape) for x in jax.tree.leaves(member.train))

    found: list[Stack] = []
    for one in sorted(members, key=flops, reverse=True):
        if not found or flops(one) < 0.9 * flops(found[0]):
            found.insert(0, one)
    return tuple(found)


def fitting(sizes: Sequence[Stack], halves: tuple[PyTree, PyTree]) -> int:
    """The number of the smallest of the sizes that holds a (train, own)."""
    arrays = jax.tree.leaves(halves)
    for number, size in enumerate(sizes[:-1]):
        limits = jax.tree.leaves((size.train, size.own))
        if all(map(_holds, limits, arrays)):
            return number
    return len(sizes) - 1


def _holds(limit: Any, array: jax.Array) -> bool:
    return all(has <= most for has, most in zip(array.shape, limit.shape))


def pad(tree: PyTree, like: PyTree) -> PyTree:
    """The tree's arrays with zeros behind them along each axis, up to the shapes of `like`."""

    def padded(x: jax.Array, wanted: Any) -> jax.Array:
        widths = [(0, size - has) for has, size in zip(x.shape, wanted.shape)]
        return jnp.pad(x, widths) if any(after for _, after in widths) else x

    return jax.tree.map(padded, tree, like)


def unpad(tree: PyTree, like: PyTree) -> PyTree:
    """The tree's arrays cut to the shapes of `like`: what `pad` had padded."""
    return jax.tree.map(lambda x, own: x[tuple(slice(size) for size in own.shape)], tree, like)


def empty(like: PyTree, slots: int, sharding: Any = None) -> PyTree:
    """Zeros of the shapes of `like`, with an axis of `slots` in front."""
    return jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype, device=sharding), like)


def stacked_shapes(like: PyTree, slots: int) -> PyTree:
    """The shapes of `empty`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype), like)


def put(stack: PyTree, index: jax.Array, member: PyTree) -> PyTree:
    """The stack with a member in a slot."""
    return jax.tree.map(lambda s, m: s.at[index].set(m), stack, member)


def take(stack: PyTree, index: jax.Array) -> PyTree:
    """The member in a slot."""
    return jax.tree.map(lambda s: s[index], stack)


def choose(mask: jax.Array, chosen: PyTree, otherwise: PyTree) -> PyTree:
    """Stacks whose slots are those of one where `mask` [slots] holds, else of the other."""

    def either(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(either, chosen, otherwise)


def _with_rates(params: PyTree) -> PyTree:
    """Params whose adapters have a dropout rate, zero where they had none."""

    def with_rate(value: Any) -> Any:
        if not is_leaf(value):
            return value
        if hasattr(value, "base") and isinstance(value.base, Leaf):
            value = value.replace(base=with_rate(value.base))
        if getattr(value, "dropout", 0.0) is None:
            value = value.replace(dropout=jnp.zeros(value.stack_shape, jnp.float32))
        return value

    return jax.tree.map(with_rate, params, is_leaf=is_leaf)


def _check_alike(first: PyTree, other: PyTree) -> None:
    one, two = trees.flatten_arrays(first), trees.flatten_arrays(other)
    differing = [
        path
        for path in one | two
        if path not in one
        or path not in two
        or (one[path].dtype, one[path].ndim) != (two[path].dtype, two[path].ndim)
    ]
    if differing or jax.tree.structure(first) != jax.tree.structure(other):
        raise ValueError(
            "Two runs of one group have other parameters than each other, which no padding makes "
            f"alike: {', '.join(differing[:5]) or 'their structure'}. Make two sweeps of them."
        )
