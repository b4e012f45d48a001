"""Clipping a gradient by its global norm, all of it at once or part by part."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
PyTree = Any


class ClipState(NamedTuple):
    """What clipping remembers: a number of the state, as the others of `build_optimizer`."""

    value: Array  # the largest norm


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with its number in the state."""

    def init(params):
        del params
        return ClipState(jnp.asarray(largest, jnp.float32))

    def update(updates, state, params=None):
        del params
        return scaled(updates, factor(updates, state)), state

    return optax.GradientTransformation(init, update)


def factor(gradient: PyTree, state: ClipState) -> Array:
    """What a gradient of this norm is multiplied by: 1 where it is small enough."""
    with jax.numpy_dtype_promotion("standard"):
        norm = optax.tree.norm(gradient).astype(jnp.float32)
    return jnp.where(norm < state.value, 1.0, state.value / norm)


def scaled(gradient: PyTree, factor: Array, like: PyTree | None = None) -> PyTree:
    """The gradient times a factor in float32, and then in its own dtypes or those of `like`."""
    return jax.tree.map(
        lambda g, p: (g.astype(jnp.float32) * factor).astype(p.dtype),
        gradient,
        gradient if like is None else like,
    )
