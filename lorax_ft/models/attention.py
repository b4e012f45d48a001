"""Self-attention, for a whole sequence at a time, and rotary positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax_ft.models.layers import Array, ComputeConfig, Dense, drop, einsum_float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary positions (Su et al. 2021) and how they are stretched; names as in transformers."""

    rope_type: str = "default"  # default, linear, dynamic or llama3
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None  # llama3 alone

    def __post_init__(self):
        if self.rope_type not in ROTARY_FREQUENCIES:
            raise ValueError(
                f"RotaryConfig.rope_type {self.rope_type!r} is not handled, only "
                f"{', '.join(map(repr, ROTARY_FREQUENCIES))}."
            )
        if self.rope_type == "llama3":
            if self.original_max_position_embeddings is None:
                raise ValueError(
                    "RotaryConfig.original_max_position_embeddings must be given for rope_type "
                    "'llama3'."
                )
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(
                    f"RotaryConfig.low_freq_factor ({self.low_freq_factor}) must be less than "
                    f"high_freq_factor ({self.high_freq_factor})."
                )
        if self.factor < 1:
            raise ValueError(f"RotaryConfig.factor must be at least 1, got {self.factor}.")


class Attention(nn.Module):
    """Multi-head self-attention, with as many or fewer heads for keys and values as for queries."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    compute: ComputeConfig
    use_bias: bool = True
    is_causal: bool = False
    dropout_rate: float = 0.0  # of the attention weights
    stddev: float = 0.02

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        rotary: tuple[Array, Array] | None = None,
        past: tuple[Array, Array] | None = None,
    ) -> Array:
        """`[batch, length, d]` to the same; `mask` `[batch, 1, 1, keys]`, True for seen keys.

        `past` are keys and values `[n, kv_heads * head_dim]` that stand before those of `x`.
        """

        def heads(name: str, count: int) -> Array:
            y = self._dense(count * self.head_dim, name)(x)
            return y.reshape(*y.shape[:-1], count, self.head_dim)

        query = heads("query", self.num_heads)
        key = heads("key", self.num_kv_heads)
        value = heads("value", self.num_kv_heads)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past is not None:
            key, value = (_after(p, present) for p, present in zip(past, (key, value)))
        if self.dropout_rate > 0 and self.has_rng("dropout"):
            rate, dropout_key = self.dropout_rate, self.make_rng("dropout")
            y = attend(query, key, value, mask, self.is_causal, rate, dropout_key)
        elif self.compute.attention == "cudnn":
            y = attend_fused(query, key, value, mask, self.is_causal)
        else:
            y = attend(query, key, value, mask, self.is_causal)
        return self._dense(x.shape[-1], "output")(y.reshape(*y.shape[:-2], -1))

    def _dense(self, features: int, name: str) -> Dense:
        return Dense(features, self.compute, self.use_bias, self.stddev, name=name)


def _after(past: Array, present: Array) -> Array:
    """Keys or values `[batch, length, heads, head_dim]` with others `[n, heads * head_dim]` before
    them."""
    batch, _, heads, head_dim = present.shape
    past = past.astype(present.dtype).reshape(1, -1, heads, head_dim)
    past = jnp.broadcast_to(past, (batch, *past.shape[1:]))
    return jnp.concatenate([past, present], axis=1)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    is_causal: bool,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Scaled dot-product attention by plain products, the softmax in float32.

    `query` is `[batch, length, heads, head_dim]`, `key` and `value` have fewer heads or as many;
    where they are longer, what stands first in them is before every query. It is
    `jax.nn.dot_product_attention` with dropout of the attention weights beside, and gradients of
    bfloat16 that are not mixed products.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    scale = jnp.asarray(1 / math.sqrt(head_dim), query.dtype)
    # Heads first, and the queries that share a key's head as more rows of it: every product is then
    # a plain batched one, which XLA:CPU computes a third faster than with heads inside.
    query = (query * scale).reshape(batch, length, kv_heads, -1, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = einsum_float32("bktd,bksd->bkts", query, key)
    scores = scores.reshape(batch, kv_heads, -1, length, key.shape[2])
    lowest = jnp.finfo(jnp.float32).min
    if is_causal:
        keys = scores.shape[-1]
        seen = jnp.tri(length, keys, keys - length, dtype=bool)
        scores = jnp.where(seen[None, None, None], scores, lowest)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, lowest)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None:
        weights = drop(weights, dropout_rate, dropout_key)
    weights = weights.astype(value.dtype).reshape(batch, kv_heads, -1, key.shape[2])
    y = jnp.einsum("bkts,bksd->bktd", weights, value)
    y = y.reshape(batch, heads, length, head_dim)
    return y.transpose(0, 2, 1, 3)


def attend_fused(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool
) -> Array:
    """Attention by cuDNN's fused kernel, which keeps no matrix of weights."""
    length, keys = query.shape[1], key.shape[1]
    if mask is not None:  # cuDNN does not broadcast it over queries
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
    if is_causal and keys != length:
        seen = jnp.tri(length, keys, keys - length, dtype=bool)[None, None]
        mask, is_causal = seen if mask is None else mask & seen, False
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=is_causal, implementation="cudnn"
    )


# --- Rotary positions -----------------------------------------------------------------------------


def rotary_angles(position_ids: Array, head_dim: int, config: RotaryConfig) -> tuple[Array, Array]:
    """Float32 cosines and sines `[batch, length, 1, head_dim / 2]` by positions."""
    frequencies = config.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
    frequencies = ROTARY_FREQUENCIES[config.rope_type](frequencies, config).astype(np.float32)
    angles = position_ids[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Turns pairs (i, i + head_dim / 2) of `[batch, length, heads, head_dim]` by their angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _llama3(frequencies: np.ndarray, config: RotaryConfig) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    waves = config.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = np.clip((waves - low) / (high - low), 0, 1)  # 1 for short waves, 0 for long ones
    return frequencies * (kept + (1 - kept) / config.factor)


# "dynamic" stretches only what is longer than max_position_embeddings, and such input is refused.
ROTARY_FREQUENCIES: Mapping[str, Callable[[np.ndarray, RotaryConfig], np.ndarray]] = {
    "default": lambda frequencies, config: frequencies,
    "dynamic": lambda frequencies, config: frequencies,
    "linear": lambda frequencies, config: frequencies / config.factor,
    "llama3": _llama3,
}
