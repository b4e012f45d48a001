"""Optimizer states in eight bits: a code for each number and a scale for each block of 256.

As bitsandbytes has them (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): a
state is decoded, updated in float32 and encoded again in every step. Decoding is
`map[code] * absmax`; encoding divides by the block's largest magnitude and takes the nearest entry
of the dynamic map, signed for what has a sign and unsigned for Adam's second moment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_ft import trees
from lorax_ft.quantization.codebooks import dynamic_map
from lorax_ft.training.states import is_stacked, map_states

Array = jax.Array
PyTree = Any

BLOCK = 256
SMALLEST = 4096  # numbers of a tensor whose states are encoded; those of smaller ones stay float32
GROUP, LANES = 8, 128  # rows and columns of what a TPU moves to the host and back as it lies
UNSIGNED = ("nu",)  # fields of optax states that are never negative
_ZERO = 127  # its code in the signed map
_CELL_BITS = 16  # of a float32, that its cell does not look at
_CELLS = [int(np.float32(x).view(np.int32)) >> _CELL_BITS for x in (2.0**-25, 1)]


class Blocks(NamedTuple):
    """A state in eight bits."""

    codes: Array  # uint8, of the parameter's shape; in an optimizer's state, of `stored_shape`
    absmax: Array  # [..., blocks] float32: the largest magnitude of each block


def is_blocks(value: Any) -> bool:
    """Whether a value of an optimizer's state is in eight bits."""
    return isinstance(value, Blocks)


def in_eight_bits(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with the states of its parameters kept in eight bits, and updated in float32.

    For transformations that keep moments of the gradient, each number's its own and zero at first:
    Adam's, Lion's, a trace. A tensor of fewer than 4,096 numbers keeps float32 states; layers
    stacked at `layers/...` are tensors of their own.

    >>> tx = in_eight_bits(optax.scale_by_adam())
    >>> state = tx.init({"kernel": jnp.ones((64, 256))})
    >>> state.mu["kernel"].codes.shape, state.mu["kernel"].absmax.shape
    ((8, 8, 256), (64, 1))
    """

    def init(params):
        def encoded(field, path, value):
            large = math.prod(value.shape[is_stacked(path) :]) >= SMALLEST
            return _zeros(value.shape, field not in UNSIGNED, is_stacked(path)) if large else value

        return map_states(encoded, params, tx.init(_in_float32(params)))

    def update(updates, state, params=None):
        shapes = {path: array.shape for path, array in trees.flatten_arrays(updates).items()}

        def decoded(field, path, value):
            if not is_blocks(value):
                return value
            value = value._replace(codes=value.codes.reshape(shapes[path]))
            return decode(value, field not in UNSIGNED, is_stacked(path))

        def encoded(field, path, new, old):
            if not is_blocks(old):
                return new
            found = encode(new, field not in UNSIGNED, is_stacked(path))
            return found._replace(codes=found.codes.reshape(old.codes.shape))

        moments = map_states(decoded, updates, state, is_leaf=is_blocks)
        found, moments = tx.update(_in_float32(updates), moments, _in_float32(params))
        found = jax.tree.map(lambda u, given: u.astype(given.dtype), found, updates)
        return found, map_states(encoded, updates, moments, state)

    return optax.GradientTransformation(init, update)


def stored_shape(shape: tuple[int, ...], stacked: bool) -> tuple[int, ...]:
    """The shape in which a state has the codes of a parameter: the same bytes in the same order.

    The rows of a matrix are in groups of eight, `[..., rows / 8, 8, columns]`, and 128 numbers are
    a row where its own are not whole lanes. Such a group lies in the host's memory as on a TPU,
    which of `[..., rows, columns]` would turn the whole array over to reach a part of it. Vectors,
    and a matrix that is not whole groups, have the parameter's shape.
    """
    if len(shape) < 2 + stacked:
        return shape
    *lead, rows, columns = shape
    width = columns if rows % GROUP == 0 and columns % LANES == 0 else LANES
    groups, left = divmod(rows * columns, GROUP * width)
    return shape if left else (*lead, groups, GROUP, width)


def stored_axes(axes: Iterable[Any], shape: tuple[int, ...], stacked: bool) -> tuple[Any, ...]:
    """What is said of the axes of a parameter, such as a mesh's names, of those of its codes."""
    given, stored = tuple(axes), stored_shape(shape, stacked)
    given += (None,) * (len(shape) - len(given))
    if stored == shape:
        return given
    return (*given[:-1], None, given[-1] if stored[-1] == shape[-1] else None)


def encode(values: Array, signed: bool, stacked: bool = False) -> Blocks:
    """Float32 values of any shape in eight bits.

    Blocks run over the values in row-major order; with `stacked` they begin anew with every entry
    of the first axis. A negative value is never encoded as zero, as CUDA's kernel has it, and one
    that lies halfway between two codes takes the even one.
    """
    blocks = _blocks(values, stacked)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    shares = jnp.abs(blocks) / jnp.where(absmax > 0, absmax, 1.0)[..., None]
    codes = _nearest(shares, signed)
    if signed:
        below = jnp.clip(codes, 1, _ZERO)  # the map goes to 1, but not to -1
        codes = jnp.where(blocks < 0, _ZERO - below, _ZERO + codes)
    return Blocks(_unblocked(codes.astype(jnp.uint8), values.shape, stacked), absmax)


def decode(state: Blocks, signed: bool, stacked: bool = False) -> Array:
    """The float32 values that `encode` made codes of, with the error that it made."""
    shares = jnp.asarray(dynamic_map(signed))[state.codes.astype(jnp.int32)]
    blocks = _blocks(shares, stacked) * state.absmax[..., None]
    return _unblocked(blocks, state.codes.shape, stacked)


def _zeros(shape: tuple[int, ...], signed: bool, stacked: bool) -> Blocks:
    """`encode` of zeros, as stored. (XLA would compute it while it compiles, number by number.)"""
    absmax = jax.eval_shape(lambda: jnp.max(_blocks(jnp.zeros(shape), stacked), axis=-1))
    codes = jnp.full(stored_shape(shape, stacked), _ZERO if signed else 0, jnp.uint8)
    return Blocks(codes, jnp.zeros(absmax.shape, absmax.dtype))


def _blocks(values: Array, stacked: bool) -> Array:
    """Values as `[..., blocks, 256]`, the last block filled up with zeros.

    Where rows are whole blocks the axes before stay, so that an array which is sharded over them is
    not moved.
    """
    if values.ndim > stacked and values.shape[-1] % BLOCK == 0:
        return values.reshape(*values.shape[:-1], -1, BLOCK)
    rows = values.reshape(*values.shape[:stacked], -1)
    missing = -rows.shape[-1] % BLOCK
    rows = jnp.pad(rows, [(0, 0)] * stacked + [(0, missing)])
    return rows.reshape(*values.shape[:stacked], -1, BLOCK)


def _unblocked(blocks: Array, shape: tuple[int, ...], stacked: bool) -> Array:
    """Values of this shape, of which `_blocks` made blocks."""
    rows = blocks.reshape(*shape[:stacked], -1)
    return rows[..., : math.prod(shape[stacked:])].reshape(shape)


def _nearest(magnitudes: Array, signed: bool) -> Array:
    """The places among a map's magnitudes that are nearest to these, which are in [0, 1]; int32."""
    first, thresholds = _cells(signed)
    bits = jax.lax.bitcast_convert_type(magnitudes, jnp.int32)
    cell = jnp.clip((bits >> _CELL_BITS) - _CELLS[0], 0, len(first) - 1)
    place = jnp.asarray(first)[cell]
    return place + (magnitudes > jnp.asarray(thresholds)[place]).astype(jnp.int32)


@functools.cache
def _cells(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The place of each cell's smallest magnitude, and the threshold above each place.

    A cell is the floats of one exponent and seven bits of fraction, so narrow that it holds one
    threshold at most: a look-up and a comparison do what a search over all of them would.
    """
    thresholds = _thresholds(signed)
    edges = (np.arange(_CELLS[0], _CELLS[1] + 2, dtype=np.int32) << _CELL_BITS).view(np.float32)
    first = np.searchsorted(thresholds, edges).astype(np.int32)
    assert np.diff(first).max() == 1
    return first[:-1], np.append(thresholds, np.float32(np.inf))


@functools.cache
def _thresholds(signed: bool) -> np.ndarray:
    """The magnitudes above which the next code is nearer, rising."""
    magnitudes = dynamic_map(signed)[_ZERO if signed else 0 :]
    midpoints = (magnitudes[:-1] + magnitudes[1:]) * np.float32(0.5)
    # a tie goes to the even code: there the midpoint itself is above the threshold
    next_is_even = np.arange(midpoints.size) % 2 == (0 if signed else 1)
    return np.where(next_is_even, np.nextafter(midpoints, np.float32(0)), midpoints)


def _in_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
