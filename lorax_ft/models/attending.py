"""Attention of queries to keys: one function that chooses a kernel, and the same numbers from all.

Plain products serve everywhere. cuDNN's kernel for NVIDIA's cards and splash attention for TPUs
keep no matrix of weights, which for long texts is most of what a layer takes; but neither knows
everything that a model may ask for, and then plain products are computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.axes import ROWS, SEQUENCE, TENSOR
from lorax_ft.leaves import PRODUCT
from lorax_ft.models.layers import Array, drop
from lorax_ft.products import einsum_float32, softcapped

LANES = 128  # of a TPU: lengths that splash attention computes are multiples of it
SHORTEST = 256  # keys from which on a kernel that keeps no weights is chosen by itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """Which keys each query sees."""

    mask: Array | None = None  # [batch, 1, 1, keys], True for seen keys
    hides_ends: bool = False  # by its making the mask hides nothing but what is behind a text
    is_causal: bool = False
    window: int | Array | None = None  # how many keys a query sees, itself among them
    first: int | Array | None = None  # the key that the first query stands at; None: ends are level
    segments: Array | None = None  # [batch, length]: a query sees its own and what is before all
    crosses: bool = False  # the keys are of another text, whose mask says nothing of the queries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """What is made of the products of queries and keys before and after the softmax."""

    scale: float | None = None  # 1 / sqrt(head_dim) where None
    softcap: float | None = None
    bias: Array | None = None  # [1 or batch, heads, length, keys]
    dropout_rate: float = 0.0
    dropout_key: Array | None = None  # without it nothing is dropped

    def factor(self, head_dim: int) -> float:
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale


def attend(
    query: Array,
    key: Array,
    value: Array,
    seen: Seen = Seen(),
    products: Products = Products(),
    *,
    kernel: str = "xla",
    platform: str = "",
) -> Array:
    """Scaled dot-product attention: `[batch, length, heads, head_dim]` of queries to the same.

    `key` and `value` `[batch, keys, kv_heads, head_dim]` have fewer heads or as many. `kernel` is
    one of `KERNELS`, or "auto" for that of the platform, by default this process' own. A kernel
    that has not what a call asks for (dropout, a cache, keys of a prefix) leaves it to plain
    products; raises ValueError where one that was asked for by name has not what the model always
    needs. What comes out for a query that is padding differs between them.
    """
    if _is_constant(seen.window) and seen.window >= key.shape[1]:
        seen = dataclasses.replace(seen, window=None)  # it hides nothing
    if kernel == "auto":
        kernel = OF_PLATFORM.get(platform or jax.default_backend(), "xla")
        one = KERNELS[kernel]
        usable = not one.lacks(query, seen, products) and one.serves(query, key, seen, products)
        kernel = kernel if usable and key.shape[1] >= SHORTEST else "xla"
    elif reason := KERNELS[kernel].lacks(query, seen, products):
        raise ValueError(f"ComputeConfig.attention {kernel!r} knows no {reason}: say 'xla'.")
    elif not KERNELS[kernel].serves(query, key, seen, products):
        kernel = "xla"
    return KERNELS[kernel].attend(query, key, value, seen, products)


# --- Plain products -------------------------------------------------------------------------------


def plain(query: Array, key: Array, value: Array, seen: Seen, products: Products) -> Array:
    """`attend` by products that any compiler has, the softmax in float32.

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
    return y.reshape(batch, heads, length, head_dim).transpose(0, 2, 1, 3)


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


# --- cuDNN ----------------------------------------------------------------------------------------


def cudnn(query: Array, key: Array, value: Array, seen: Seen, products: Products) -> Array:
    """`attend` by cuDNN's fused kernel, of half precision; on a mesh each device has its rows and
    heads.

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

    mesh, sizes = _mesh()
    if math.prod(sizes.values()) > 1:
        rows, by_head = _rows(sizes), _by_head(sizes, key.shape[2])
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


def _mesh() -> tuple[Any, Mapping[str, int]]:
    """The context's mesh and the sizes of its axes, none where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh, {} if mesh.empty else dict(mesh.shape)


def _rows(sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in ROWS if axis in sizes)


def _by_head(sizes: Mapping[str, int], kv_heads: int) -> str | None:
    """The axis that splits heads; None where it does not divide those of keys."""
    return TENSOR if TENSOR in sizes and kv_heads % sizes[TENSOR] == 0 else None


# --- Splash attention -----------------------------------------------------------------------------


def splash(
    query: Array, key: Array, value: Array, seen: Seen, products: Products, interpret: bool = False
) -> Array:
    """`attend` by JAX's splash attention, which leaves out blocks that no query sees.

    Padding sees padding: what is computed there differs from other kernels', and nothing reads it.
    On a mesh each device computes the rows, heads and queries that it has. Tests `interpret` it.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    length, heads, head_dim = query.shape[1:]
    mesh, sizes = _mesh()
    parts, by_head = sizes.get(SEQUENCE, 1), _by_head(sizes, key.shape[2])
    missing = -length % (LANES * parts)
    window = None if seen.window is None else int(seen.window)
    shape = (heads, (length + missing) // parts, length + missing)
    shards = {"head_shards": 1 if by_head is None else sizes[by_head], "q_seq_shards": parts}
    kernel = _splash_kernel(
        shape, seen.is_causal, window, products.softcap, interpret=interpret, **shards
    )

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
        rows, places = (
            tuple(axis for axis in ROWS if axis in sizes),
            SEQUENCE if parts > 1 else None,
        )
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


def _splash_kernel(
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


# --- The table ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention: what it has not, ever and in a call."""

    attend: Callable[[Array, Array, Array, Seen, Products], Array]
    lacks: Callable[[Array, Seen, Products], str | None] = lambda *_: None
    serves: Callable[[Array, Array, Seen, Products], bool] = lambda *_: True


def _cudnn_lacks(query: Array, seen: Seen, products: Products) -> str | None:
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


def _cudnn_serves(query: Array, key: Array, seen: Seen, products: Products) -> bool:
    _, sizes = _mesh()
    length, keys = query.shape[1], key.shape[1]
    is_masked = _is_by_place(seen, length, keys) or (seen.mask is not None and not seen.hides_ends)
    # A mask is a bias to it, and a bias has no gradient where lengths are odd; nobody asks for one
    # through a cache.
    is_biased = is_masked or products.bias is not None
    is_odd = seen.first is None and is_biased and (length % 2 == 1 or keys % 2 == 1)
    return products.dropout_key is None and sizes.get(SEQUENCE, 1) == 1 and not is_odd


def _splash_lacks(query: Array, seen: Seen, products: Products) -> str | None:
    if products.bias is not None:
        return "bias of positions, which this model has"
    if seen.window is not None and not _is_constant(seen.window):
        return "windows that differ between layers which are scanned or computed again"
    return None


def _splash_serves(query: Array, key: Array, seen: Seen, products: Products) -> bool:
    is_whole = not seen.crosses and query.shape[1] == key.shape[1] and seen.first is None
    windowed_texts = seen.segments is not None and seen.window is not None and not seen.is_causal
    return is_whole and products.dropout_key is None and not windowed_texts


def _is_constant(window: int | Array | None) -> TypeGuard[int]:
    """Whether a window is known when the program is made: a layer's own, of those that are scanned
    or computed again, is not."""
    return isinstance(window, (int, np.integer))


KERNELS: Mapping[str, Kernel] = {
    "xla": Kernel(plain),
    "cudnn": Kernel(cudnn, _cudnn_lacks, _cudnn_serves),
    "splash": Kernel(splash, _splash_lacks, _splash_serves),
}
OF_PLATFORM: Mapping[str, str] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
