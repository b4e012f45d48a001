"""Attention to a sequence itself, whole or after what is in a cache, or to another one; rotary
positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from lorax_ft.models.attending import Products, Seen, attend
from lorax_ft.models.layers import (
    Array,
    ComputeConfig,
    Dense,
    RMSNorm,
    dropout_key,
)


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
    """Multi-head self-attention, with as many or fewer heads for keys and values as for queries.

    Where the collection "cache" is mutable, it keeps keys and values there, in as many slots as the
    mask has keys: a first call starts it, each further one goes on behind what is kept.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    compute: ComputeConfig
    use_bias: bool = True
    use_output_bias: bool | None = None  # as use_bias where None
    is_fused: bool = False  # one kernel "qkv" [d, query + key + value] in place of three
    norm_epsilon: float | None = None  # where given, each head's queries and keys are normalised
    is_causal: bool = False
    scale: float | None = None  # of the products; 1 / sqrt(head_dim) where None
    softcap: float | None = None  # where given, products become softcap * tanh(product / softcap)
    dropout_rate: float = 0.0  # of the attention weights
    stddev: float = 0.02
    query_stddev: float | None = None  # of the query's kernel; stddev where None

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        rotary: tuple[Array, Array] | None = None,
        past: tuple[Array, Array] | None = None,
        window: int | Array | None = None,
        bias: Array | None = None,
        segments: Array | None = None,
    ) -> Array:
        """`[batch, length, d]` to the same.

        Args:
            x: what attends to itself.
            mask: `[batch, 1, 1, keys]`, True for seen keys.
            rotary: cosines and sines of the positions, as `rotary_angles` gives them.
            past: keys and values `[n, kv_heads * head_dim]` that stand before those of `x`; they
                are kept in a cache like others, so that only the first call gives them.
            window: how many keys a query sees, itself among them; all where None.
            bias: `[1 or batch, heads, length, keys]`, added to the products.
            segments: `[batch, length]`, the number of the text that each place is of, which sees
                that text alone and the `past`.
        """
        query, key, value = self._project(x)
        if self.norm_epsilon is not None:
            query = RMSNorm(self.norm_epsilon, self.compute, name="query_norm")(query)
            key = RMSNorm(self.norm_epsilon, self.compute, name="key_norm")(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past is not None:
            key, value = (_after(p, present) for p, present in zip(past, (key, value)))
        first = None
        if self.is_mutable_collection("cache") and not self.is_initializing():
            before = key.shape[1] - x.shape[1]
            key, value, start = self._keep(key, value, mask)
            first = start + before
        y = attend(
            query,
            key,
            value,
            Seen(
                mask=mask,
                hides_ends=self.compute.right_padded and first is None,
                is_causal=self.is_causal,
                window=window,
                first=first,
                segments=segments,
            ),
            Products(
                scale=self.scale,
                softcap=self.softcap,
                bias=bias,
                dropout_rate=self.dropout_rate,
                dropout_key=dropout_key(self, self.dropout_rate),
            ),
            kernel=self.compute.attention,
            platform=self.compute.platform,
        )
        use_bias = self.use_bias if self.use_output_bias is None else self.use_output_bias
        y = y.reshape(*y.shape[:-2], -1)
        return self._dense(x.shape[-1], use_bias, "output")(y)

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, `[batch, length, heads, head_dim]` each."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        sizes = [count * self.head_dim for count in counts]
        if self.is_fused:
            together = self._dense(sum(sizes), self.use_bias, "qkv")(x)
            parts = jnp.split(together, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        else:
            names = ("query", "key", "value")
            parts = [self._dense(n, self.use_bias, name)(x) for n, name in zip(sizes, names)]
        query, key, value = (
            y.reshape(*y.shape[:-1], count, self.head_dim) for y, count in zip(parts, counts)
        )
        return query, key, value

    def _keep(self, key: Array, value: Array, mask: Array | None) -> tuple[Array, Array, Any]:
        """Puts keys and values into the cache: all that it holds, and the slot of the first new."""
        assert mask is not None  # it says how many slots there are
        start = self.get_variable("cache", "index", 0)
        held = []
        for name, present in {"key": key, "value": value}.items():
            if self.has_variable("cache", name):
                kept = self.get_variable("cache", name)
                all_of_it = lax.dynamic_update_slice_in_dim(kept, present, start, axis=1)
            else:
                free = mask.shape[-1] - present.shape[1]
                all_of_it = jnp.pad(present, ((0, 0), (0, free), (0, 0), (0, 0)))
            self.put_variable("cache", name, all_of_it)
            held.append(all_of_it)
        self.put_variable("cache", "index", jnp.asarray(start + key.shape[1], jnp.int32))
        return held[0], held[1], start

    def _dense(self, features: int, use_bias: bool, name: str) -> Dense:
        stddev = _stddev(name, self.stddev, self.query_stddev)
        return Dense(features, self.compute, use_bias, stddev, name=name)


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to another one, such as what an encoder made.

    Where the collection "cache" is mutable, the first call keeps the keys and values there, and
    further ones may leave the other sequence out.
    """

    num_heads: int
    head_dim: int
    compute: ComputeConfig
    scale: float | None = None  # of the products; 1 / sqrt(head_dim) where None
    dropout_rate: float = 0.0  # of the attention weights
    stddev: float = 0.02
    query_stddev: float | None = None  # of the query's kernel; stddev where None

    @nn.compact
    def __call__(
        self,
        x: Array,
        memory: Array | None,
        mask: Array | None,
        past: tuple[Array, Array] | None = None,
    ) -> Array:
        """`[batch, length, d]` to the same.

        Args:
            x: what attends.
            memory: `[batch, keys, d_memory]`, what is attended to; None where it is in the cache.
            mask: `[batch, 1, 1, n + keys]`, True for seen keys.
            past: keys and values `[n, heads * head_dim]` that stand before those of `memory`.
        """
        query = self._heads("query", x)
        if memory is None:
            key, value = self.get_variable("cache", "key"), self.get_variable("cache", "value")
        else:
            key, value = self._heads("key", memory), self._heads("value", memory)
            if past is not None:
                key, value = (_after(p, present) for p, present in zip(past, (key, value)))
        if self.is_mutable_collection("cache") and not self.is_initializing():
            self.put_variable("cache", "key", key)
            self.put_variable("cache", "value", value)
        products = Products(
            scale=self.scale,
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key(self, self.dropout_rate),
        )
        y = attend(
            query,
            key,
            value,
            Seen(mask=mask, hides_ends=self.compute.right_padded, crosses=True),
            products,
            kernel=self.compute.attention,
            platform=self.compute.platform,
        )
        dense = Dense(x.shape[-1], self.compute, False, self.stddev, name="output")
        return dense(y.reshape(*y.shape[:-2], -1))

    def _heads(self, name: str, x: Array) -> Array:
        """Queries, keys or values: `[batch, length, heads, head_dim]`."""
        stddev = _stddev(name, self.stddev, self.query_stddev)
        y = Dense(self.num_heads * self.head_dim, self.compute, False, stddev, name=name)(x)
        return y.reshape(*y.shape[:-1], self.num_heads, self.head_dim)


def _stddev(name: str, stddev: float, of_query: float | None) -> float:
    return of_query if name == "query" and of_query is not None else stddev


def _after(past: Array, present: Array) -> Array:
    """Keys or values `[batch, length, heads, head_dim]` with others `[n, heads * head_dim]` before
    them."""
    batch, _, heads, head_dim = present.shape
    past = past.astype(present.dtype).reshape(1, -1, heads, head_dim)
    past = jnp.broadcast_to(past, (batch, *past.shape[1:]))
    return jnp.concatenate([past, present], axis=1)


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


def halved_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows `[heads * head_dim, ...]` whose pairs are (2i, 2i + 1), in the order of `rotate`.

    Meta's own LLaMA files have queries and keys so; Hugging Face's have them as `rotate` does.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


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
