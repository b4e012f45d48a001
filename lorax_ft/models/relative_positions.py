"""Relative positions, a bias on attention by buckets of distance (Raffel et al. 2020)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax_ft.models.layers import Array, ComputeConfig


class PositionBias(nn.Module):
    """What is added to attention's products, by how far a key is from the query."""

    num_heads: int
    buckets: int
    longest: int  # a key farther than this is in the last bucket
    compute: ComputeConfig
    stddev: float

    @nn.compact
    def __call__(self, length: int, keys: int, first: int | Array, *, is_causal: bool) -> Array:
        """`[1, heads, length, keys]`, the first query standing at key `first`."""
        shape, dtype = (self.buckets, self.num_heads), jnp.dtype(self.compute.param_dtype)
        table = self.param("embedding", nn.initializers.normal(self.stddev), shape, dtype)
        distance = jnp.arange(keys)[None] - (first + jnp.arange(length)[:, None])
        bucket = position_buckets(distance, self.buckets, self.longest, is_causal=is_causal)
        bias = jnp.take(table, bucket, axis=0).astype(self.compute.dtype)
        return bias.transpose(2, 0, 1)[None]


def position_buckets(distance: Array, buckets: int, longest: int, *, is_causal: bool) -> Array:
    """The numbers of the buckets that distances from queries to keys fall in, of the same shape.

    Half of the buckets of a direction are of one distance each, the others are ever wider up to
    `longest`; what is farther is in the last. Where all keys are before their query, all buckets
    are of that direction; else the second half is of keys behind.
    """
    if is_causal:
        return _bucket(jnp.maximum(-distance, 0), buckets, longest)
    half = buckets // 2
    return jnp.where(distance > 0, half, 0) + _bucket(jnp.abs(distance), half, longest)


def _bucket(distance: Array, buckets: int, longest: int) -> Array:
    """The buckets of one direction, looked up: a device's logarithm need not hit their edges."""
    exact, every = buckets // 2, np.arange(longest + 1)
    steps = np.log(np.maximum(every, 1) / exact) / math.log(longest / exact) * (buckets - exact)
    table = np.where(every < exact, every, np.minimum(exact + steps.astype(int), buckets - 1))
    return jnp.take(jnp.asarray(table, jnp.int32), jnp.minimum(distance, longest))
