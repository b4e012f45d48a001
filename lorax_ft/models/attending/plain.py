"""Attention by plain products, which any compiler has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lorax_ft.leaves import PRODUCT
from lorax_ft.models.attending.kernel import Kernel, Products, Seen
from lorax_ft.models.layers import Array, drop
from lorax_ft.products import einsum_float32, softcapped


def attend(query: Array, key: Array, value: Array, seen: Seen, products: Products) -> Array:
    """Attention, with the softmax in float32.

    It is `jax.nn.dot_product_attention` with dropout of the attention weights and a softcap of the
    products beside, and gradients of bfloat16 that are not mixed products.
    """
    batch, length, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    factor = jnp.asarray(products.factor(head_dim), query.dtype)
    # Heads first, and the queries that share a key's head as more rows of it: every product is then
    # a plain batched one, which XLA:CPU computes a third faster than with heads inside.
    query = (query * factor).reshape(batch, length, kv_heads, -1, head_dim)
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    query, key, value = (checkpoint_name(x, PRODUCT) for x in (query, key, value))
    scores = einsum_float32("bktd,bksd->bkts", query, key)
    scores = scores.reshape(batch, kv_heads, -1, length, keys)
    if products.softcap is not None:
        scores = softcapped(scores, products.softcap)
    if products.bias is not None:
        bias = products.bias.astype(jnp.float32)
        scores = scores + bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
    if (mask := whole_mask(seen, length, keys)) is not None:
        # The lowest number swallows any score, as `where` would; but a TPU's compiler writes the
        # condition of a `where` out for every head, and reads it again in the backward pass.
        scores = scores + jnp.where(mask[:, :, None], 0.0, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if products.dropout_key is not None:
        weights = drop(weights, products.dropout_rate, products.dropout_key)
    weights = weights.astype(value.dtype).reshape(batch, kv_heads, -1, keys)
    y = jnp.einsum("bkts,bksd->bktd", weights, value)
    y = y.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)
    return checkpoint_name(y, PRODUCT)


def whole_mask(seen: Seen, length: int, keys: int) -> Array | None:
    """`[batch or 1, 1, length or 1, keys]`, True where seen; None where all is."""
    mask, window = seen.mask, seen.window
    if seen.segments is not None:
        mask, window = _within_segments(mask, seen.segments, keys, window), None
    by_place = seen_keys(length, keys, seen.is_causal, window, seen.first)
    if by_place is None:
        return mask
    by_place = by_place[None, None]
    return by_place if mask is None else mask & by_place


def seen_keys(
    length: int,
    keys: int,
    is_causal: bool,
    window: int | Array | None,
    first: int | Array | None = None,
) -> Array | None:
    """Which keys each query sees: `[length, keys]`; None where all. The first stands at `first`."""
    if window is None and not is_causal:
        return None
    first = keys - length if first is None else first
    behind = first + jnp.arange(length)[:, None] - jnp.arange(keys)[None]
    if window is None:
        return behind >= 0
    seen = behind < window
    return seen & (behind >= 0) if is_causal else seen & (behind > -window)


def _within_segments(
    mask: Array | None, segments: Array, keys: int, window: int | Array | None
) -> Array:
    """The mask `[batch, 1, 1, keys]` as `[batch, 1, length, keys]`: only what is of one segment is
    seen, and the keys that stand before all segments, which stand right before each of them: both
    within the window."""
    before = keys - segments.shape[1]
    places = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    places = before + places - lax.cummax(jnp.where(begins, places, 0), axis=1)
    padding = ((0, 0), (before, 0))
    of_keys = jnp.pad(segments, padding, constant_values=-1)[:, None, None, :]
    seen = (segments[:, None, :, None] == of_keys) | (of_keys == -1)
    if window is not None:
        first = jnp.broadcast_to(jnp.arange(before)[None], (len(segments), before))
        place_of_keys = jnp.concatenate([first, places], axis=1)[:, None, None, :]
        seen &= places[:, None, :, None] - place_of_keys < window
    return seen if mask is None else seen & mask


KERNEL = Kernel(attend)
