"""Cross-entropy over a vocabulary whose logits are never there all at once.

The logits of a piece of the text are computed, scored and forgotten before those of the next. Their
gradients are taken in the same pass, while they are there: the backward pass multiplies what was
kept of them, as large as the vectors are, and never meets the head again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_ft.lift import lift
from lorax_ft.logits import Logits

Array = jax.Array
PyTree = Any


def cross_entropy(logits: Array | Logits, targets: Array, weights: Array) -> tuple[Array, Array]:
    """The weighted sum of `-log softmax(logits)[target]`, and what is likeliest at each place.

    Args:
        logits: `[..., classes]`, or `Logits` `[batch, length, vocabulary]`, which are cut along
            their length where in float32 they come to more than their `most_bytes`.
        targets: `[...]`, classes.
        weights: `[...]` float32.

    Returns a float32 scalar and int32 `[...]`. Cut logits have a gradient, but no forward
    derivative; adapters drop of each piece for itself.
    """
    if not isinstance(logits, Logits):
        return _score(logits, targets, weights)
    pieces = math.ceil(4 * math.prod(logits.shape) / logits.most_bytes)
    if pieces <= 1 or targets.ndim != 2:
        return _score(lift(Logits.dense)(logits), targets, weights)
    return _in_pieces(min(pieces, targets.shape[1]), logits, targets, weights)


def _score(logits: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """`cross_entropy` of logits that are there.

    The target's logit is summed out, not looked up: shards of a vocabulary then send each other
    sums, and no scatter is left to the gradient.
    """
    logits = logits.astype(jnp.float32)
    classes = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    of_target = jnp.sum(jnp.where(classes == targets[..., None], logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - of_target
    return jnp.sum(weights * losses), jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(pieces: int, logits: Logits, targets: Array, weights: Array) -> tuple[Array, Array]:
    """`_score` of one piece of the length after another."""
    head = dataclasses.replace(logits, x=None)

    def step(total, piece):
        number, x, targets, weights = piece
        loss, predictions = _score(_dense(x, head, number), targets, weights)
        return total + loss, predictions

    cut = _cut(pieces, (logits.x, targets, weights))
    total, predictions = lax.scan(step, jnp.zeros((), jnp.float32), (jnp.arange(pieces), *cut))
    return total, _joined(predictions, targets.shape[1])


def _forward(pieces: int, logits: Any, targets: Any, weights: Any):
    """As `_in_pieces`, keeping the gradient by everything that is differentiated."""
    is_wanted = jax.tree.map(
        lambda array: array.perturbed and jnp.issubdtype(array.value.dtype, jnp.floating),
        (dataclasses.replace(logits, x=None), weights),
    )
    has_x = logits.x.perturbed
    logits, targets, weights = jax.tree.map(lambda array: array.value, (logits, targets, weights))
    head = dataclasses.replace(logits, x=None)
    of_head, of_weights = is_wanted
    wanted = jax.tree.map(lambda field, is_one: field if is_one else None, head, of_head)

    def step(sums, piece):
        number, x, targets, weights = piece

        def score(x, wanted, weights):
            here = jax.tree.map(
                lambda new, old: old if new is None else new, wanted, head, is_leaf=_is_none
            )
            return _score(_dense(x, here, number), targets, weights)

        loss, pull, predictions = jax.vjp(score, x, wanted, weights, has_aux=True)
        by_x, by_head, by_weights = pull(jnp.ones((), jnp.float32))
        total, gradient = sums
        gradient = jax.tree.map(lambda g, new: g + new.astype(jnp.float32), gradient, by_head)
        kept = (by_x if has_x else None, by_weights if of_weights else None)
        return (total + loss, gradient), (predictions, *kept)

    zeros = jax.tree.map(lambda field: jnp.zeros(field.shape, jnp.float32), wanted)
    cut = _cut(pieces, (logits.x, targets, weights))
    (total, by_head), found = lax.scan(
        step, (jnp.zeros((), jnp.float32), zeros), (jnp.arange(pieces), *cut)
    )
    predictions, by_x, by_weights = (
        None if array is None else _joined(array, targets.shape[1]) for array in found
    )
    by_head = jax.tree.map(lambda g, field: g.astype(field.dtype), by_head, wanted)
    return (total, predictions), (by_x, by_head, by_weights)


def _backward(pieces: int, kept: Any, cotangents: Any) -> tuple[Any, None, Any]:
    del pieces
    cotangent, _ = cotangents
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    by_x, by_head, by_weights = jax.tree.map(
        lambda g: (g.astype(jnp.float32) * cotangent).astype(g.dtype), kept
    )
    return dataclasses.replace(by_head, x=by_x), None, by_weights


_in_pieces.defvjp(_forward, _backward, symbolic_zeros=True)


def _dense(x: Array, head: Logits, number: Array) -> Array:
    """The logits of a piece, whose number keys of dropout are folded with."""

    def own(field: Array) -> Array:
        is_key = jnp.issubdtype(field.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(field, number) if is_key else field

    return lift(Logits.dense)(dataclasses.replace(jax.tree.map(own, head), x=x))


def _cut(pieces: int, arrays: PyTree) -> PyTree:
    """Arrays `[batch, length, ...]` as `[pieces, batch, length / pieces, ...]`, zeros behind.

    Piece i takes every `pieces`-th place, from place i: shards of a length cut what they hold.
    """

    def cut(array: Array) -> Array:
        batch, length, *rest = array.shape
        size = math.ceil(length / pieces)
        padding = ((0, 0), (0, pieces * size - length), *((0, 0),) * len(rest))
        return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, size, pieces, *rest), 2, 0)

    return jax.tree.map(cut, arrays)


def _joined(array: Array, length: int) -> Array:
    """The inverse of `_cut`."""
    array = jnp.moveaxis(array, 0, 2)
    return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]


def _is_none(value: Any) -> bool:
    return value is None
