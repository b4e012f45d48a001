"""Attention by JAX's splash attention, a kernel for TPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.axes import SEQUENCE
from lorax_ft.leaves import PRODUCT
from lorax_ft.models.attending.kernel import (
    Kernel,
    Products,
    Seen,
    axis_of_heads,
    is_constant,
    mesh_and_sizes,
    rows_of,
)
from lorax_ft.models.layers import Array

LANES = 128  # of a TPU: lengths that are computed are multiples of it


def attend(
    query: Array, key: Array, value: Array, seen: Seen, products: Products, interpret: bool = False
) -> Array:
    """Attention that leaves out blocks of which no query sees anything.

    Padding sees padding: what is computed there differs from other kernels', and nothing reads it.
    On a mesh each device computes the rows, heads and queries that it has. Tests `interpret` it.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    length, heads, head_dim = query.shape[1:]
    mesh, sizes = mesh_and_sizes()
    parts, by_head = sizes.get(SEQUENCE, 1), axis_of_heads(sizes, key.shape[2])
    missing = -length % (LANES * parts)
    window = None if seen.window is None else int(seen.window)
    shape = (heads, (length + missing) // parts, length + missing)
    shards = {"head_shards": 1 if by_head is None else sizes[by_head], "q_seq_shards": parts}
    kernel = _kernel(shape, seen.is_causal, window, products.softcap, interpret=interpret, **shards)

    def compute(kernel: Any, query: Array, key: Array, value: Array, own: Array, whole: Array):
        each = jax.vmap(lambda q, k, v, own, whole: kernel(q, k, v, SegmentIds(own, whole)))
        query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        return each(query, key, value, own, whole).transpose(0, 2, 1, 3)

    query = query * jnp.asarray(products.factor(head_dim), query.dtype)
    query, key, value = (
        checkpoint_name(jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))), PRODUCT)
        for x in (query, key, value)
    )
    run: Callable[..., Array] = compute
    segments = _segments(seen, query.shape[0], length)
    segments = jnp.pad(segments, ((0, 0), (0, missing)), constant_values=-1)
    if math.prod(sizes.values()) > 1:
        rows, places = rows_of(sizes), SEQUENCE if parts > 1 else None
        of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(by_head, places)))
        of_queries = PartitionSpec(rows, places, by_head, None)
        of_keys = PartitionSpec(rows, None, by_head, None)
        ids = PartitionSpec(rows, places), PartitionSpec(rows)
        run = jax.shard_map(
            compute,
            mesh=mesh,
            in_specs=(of_kernel, of_queries, of_keys, of_keys, *ids),
            out_specs=of_queries,
            check_vma=False,
        )
    y = run(kernel, query, key, value, segments, segments)
    return y[:, :length].astype(value.dtype)


def _kernel(
    shape: tuple[int, int, int],
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    **options: Any,
) -> Any:
    """The kernel for `shape`: heads, queries that a device has, and keys."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    heads, queries, keys = shape
    if window is not None:
        sides = (window - 1, 0 if is_causal else window - 1)
        mask = kernels.LocalMask((keys, keys), sides, 0)
    else:
        mask = (kernels.CausalMask if is_causal else kernels.FullMask)((keys, keys))
    block = next(size for size in (512, 256, LANES) if queries % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=PRODUCT,
        **options,
    )


def _segments(seen: Seen, batch: int, length: int) -> Array:
    """`[batch, length]`: the number of each place's text, 0 where the mask hides it."""
    ones = jnp.ones((batch, length), jnp.int32)
    segments = ones if seen.segments is None else seen.segments.astype(jnp.int32)
    return segments if seen.mask is None else jnp.where(seen.mask[:, 0, 0], segments, 0)


def _lacks(query: Array, seen: Seen, products: Products) -> str | None:
    if products.bias is not None:
        return "bias of positions, which this model has"
    if seen.window is not None and not is_constant(seen.window):
        return "windows that differ between layers which are scanned or computed again"
    return None


def _serves(query: Array, key: Array, seen: Seen, products: Products) -> bool:
    is_whole = not seen.crosses and query.shape[1] == key.shape[1] and seen.first is None
    windowed_texts = seen.segments is not None and seen.window is not None and not seen.is_causal
    return is_whole and products.dropout_key is None and not windowed_texts


KERNEL = Kernel(attend, _lacks, _serves, shortest=lambda *_: 256)
