"""Attention by cuDNN's kernel for NVIDIA's cards."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lorax_ft.axes import SEQUENCE
from lorax_ft.leaves import PRODUCT
from lorax_ft.models.attending.kernel import (
    Kernel,
    Products,
    Seen,
    axis_of_heads,
    is_of_members,
    mesh_and_sizes,
    rows_of,
)
from lorax_ft.models.attending.plain import whole_mask
from lorax_ft.models.layers import Array


def attend(query: Array, key: Array, value: Array, seen: Seen, products: Products) -> Array:
    """Attention in half precision; on a mesh each device has its rows and heads.

    It has a causal mask and lengths of its own; any other mask is `[batch, 1, length, keys]` in
    half precision, and its gradient as much again. What is behind a length is zero.
    """
    length, keys = query.shape[1], key.shape[1]
    mask, lengths, is_causal = seen.mask, None, seen.is_causal
    if _is_by_place(seen, length, keys):
        mask, is_causal = whole_mask(seen, length, keys), False
    elif mask is not None and seen.hides_ends:
        lengths = jnp.sum(mask[:, 0, 0], axis=1, dtype=jnp.int32)
        mask, lengths = None, jnp.broadcast_to(lengths, query.shape[:1])
    if mask is not None:  # cuDNN does not broadcast it over queries
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, keys))
    bias = None if products.bias is None else products.bias.astype(query.dtype)
    query, key, value = (checkpoint_name(x, PRODUCT) for x in (query, key, value))

    def compute(query: Array, key: Array, value: Array, mask: Any, lengths: Any, bias: Any):
        of_queries = None
        if lengths is not None:
            lengths = _mapped_with(query, lengths)
            of_queries = None if seen.crosses else lengths - (keys - length)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            query_seq_lengths=of_queries,
            key_value_seq_lengths=lengths,
            is_causal=is_causal,
            scale=products.scale,
            implementation="cudnn",
        )

    mesh, sizes = mesh_and_sizes()
    if math.prod(sizes.values()) > 1:
        rows, by_head = rows_of(sizes), axis_of_heads(sizes, key.shape[2])
        each = PartitionSpec(rows, None, by_head, None)
        of_mask = PartitionSpec(rows if mask is not None and mask.shape[0] > 1 else None)
        of_lengths = PartitionSpec(rows)
        of_bias = PartitionSpec(rows if bias is not None and bias.shape[0] > 1 else None, by_head)
        compute = jax.shard_map(
            compute,
            mesh=mesh,
            in_specs=(each, each, each, of_mask, of_lengths, of_bias),
            out_specs=each,
            check_vma=False,
        )
    return compute(query, key, value, mask, lengths, bias)


def _is_by_place(seen: Seen, length: int, keys: int) -> bool:
    """Whether the mask has to say for each query what it sees.

    cuDNN's own causal mask is of as many keys as queries. Its own window goes unused: JAX tests it
    without lengths alone.
    """
    is_shifted = seen.is_causal and keys != length
    return seen.window is not None or seen.segments is not None or is_shifted


def _mapped_with(query: Array, lengths: Array) -> Array:
    """The lengths; mapped where the queries are, as those of a sweep's members: JAX 0.10 takes all
    that goes into cuDNN's kernel for mapped then."""
    return jnp.where(query[:, 0, 0, 0] > 0, lengths, lengths)


def _largest_head() -> int:
    """The greatest head_dim that cuDNN's kernels have forward and backward on this process' card,
    by NVIDIA's support matrix; 0 for others' cards and for those before Ampere.

    JAX asks the process as well. So a plan for a card that is not here has what all cards have, and
    tells too much of Hopper's, where head_dim is above 128.
    """
    card = jax.local_devices()[0]
    if card.platform != "gpu":
        return 128
    generation = str(getattr(card, "compute_capability", "")).partition(".")[0]
    if not generation.isdigit() or int(generation) < 8:
        return 0
    return 256 if generation == "9" else 128


def _lacks(query: Array, seen: Seen, products: Products) -> str | None:
    if products.softcap is not None:
        return "softcap, which this model has"
    if query.dtype.itemsize != 2:
        return "float32, only bfloat16 and float16"
    head_dim, largest = query.shape[-1], _largest_head()
    if not largest:
        return "card like this one, only NVIDIA's from Ampere on"
    if head_dim % 8 or head_dim > largest:
        return f"head_dim of {head_dim} here, only multiples of 8 up to {largest}"
    return None


def _serves(query: Array, key: Array, seen: Seen, products: Products) -> bool:
    _, sizes = mesh_and_sizes()
    length, keys = query.shape[1], key.shape[1]
    # A bias has no gradient where lengths are odd; nobody asks for one through a cache.
    is_biased = _is_biased(query, key, seen, products)
    is_odd = seen.first is None and is_biased and (length % 2 == 1 or keys % 2 == 1)
    # JAX maps cuDNN's kernel by making one batch of all, but leaves biases as they are.
    is_mapped = is_biased and is_of_members()
    has_it = products.dropout_key is None and sizes.get(SEQUENCE, 1) == 1
    return has_it and not is_odd and not is_mapped


def _shortest(*call: Any) -> int:
    """By times on an H200."""
    return 256 if _is_biased(*call) else 128


def _is_biased(query: Array, key: Array, seen: Seen, products: Products) -> bool:
    """Whether it is given a matrix of all queries and keys, as which it takes a mask, too."""
    is_by_place = _is_by_place(seen, query.shape[1], key.shape[1])
    is_masked = seen.mask is not None and not seen.hides_ends
    return is_by_place or is_masked or products.bias is not None


KERNEL = Kernel(attend, _lacks, _serves, _shortest)
