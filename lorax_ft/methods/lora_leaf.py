"""The LoRA leaf: a frozen kernel or embedding with a trainable low-rank update beside it.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models":
`y = base(x) + scale * (dropout(x) @ a.T) @ b`, with `a` kept `[rank, in]` as Hugging Face PEFT
keeps it.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.axes import even
from lorax_ft.leaves import PRODUCT, Array, dense, from_matrix, leaf, static_field
from lorax_ft.methods.dropping import drop
from lorax_ft.methods.wrapper import (
    Options,
    Wrapper,
    base_product,
    factor_count,
    factor_specs,
    matrix_of,
)


@leaf
class LoRA(Wrapper):
    """`base + scale * a.T @ b`.

    Seen as a matrix the base is `[in_size, out_size]`; `a` is `[*stack, r, in_size]`, `b`
    `[*stack, r, out_size]`. Layers of one stack may differ in rank: the factors of a lower one end
    in rows of zeros, whose gradients are exactly zero, and `rank` says how many rows are real.
    """

    base: Any  # [*stack, *core] array or leaf
    a: Array
    b: Array
    scale: Array  # [*stack] float32: alpha / rank, or alpha / sqrt(rank) with rsLoRA
    rank: Array  # [*stack] int32
    dropout: Array | None = (
        None  # [*stack] float32: share of inputs dropped before `a`; None: no dropout
    )
    key: Array | None = None  # [*stack] PRNG keys; None: evaluation, nothing is dropped
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))
    within_product: NamedSharding | None = static_field(default=None)  # of the core

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")

    @property
    def stack_depth(self) -> int:
        return self.a.ndim - 2

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = (precision, preferred_element_type)
        rows = x.reshape(-1, x.shape[-1])
        base = matrix_of(self.base, self.in_axes)
        a, b = self._gathered()
        y: Any = _linear(options, base, a, b, self.scale, rows, *self._dropping())
        return y.reshape(*x.shape[:-1], -1)

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        # x @ (base + s a.T b).T = base.T(x) + s (x @ b.T) @ a: the same map with a and b changed
        # over
        options = (precision, preferred_element_type)
        rows = x.reshape(-1, x.shape[-1])
        y = base_product(options, matrix_of(self.base, self.in_axes), rows, transposed=True)
        hidden = _scaled(rows @ _turned(self.b, x.dtype), self.scale)
        update = hidden @ self.a.astype(x.dtype)
        return (y + update.astype(y.dtype)).reshape(*x.shape[:-1], -1)

    def take(self, ids: Array, *, mode: str | None = None) -> Array:
        rows = self.base_take(ids, mode)
        factors = self.a.at[:, ids].get(mode=mode)  # [r, *ids]
        update = jnp.einsum("r...,rd->...d", factors, self.b) * self.scale
        return rows + update.astype(rows.dtype)

    def dense(self) -> Array:
        update = jnp.einsum("...ri,...ro->...io", self.a, self.b) * self.scale[..., None, None]
        shaped = functools.partial(from_matrix, core_shape=self.core_shape, in_axes=self.in_axes)
        for _ in self.stack_shape:
            shaped = jax.vmap(shaped)
        base = dense(self.base)
        return base + shaped(update).astype(base.dtype)

    def partition_specs(self, spec: PartitionSpec) -> LoRA:
        a, b, stack = factor_specs(spec, len(self.stack_shape), self.ndim, self.in_axes)
        return self.replace(
            base=self.base_specs(spec),
            a=a,
            b=b,
            scale=stack,
            rank=stack,
            dropout=None if self.dropout is None else stack,
            key=None if self.key is None else stack,
        )

    def gathered_as(self, sharding: NamedSharding) -> LoRA:
        return super().gathered_as(sharding).replace(within_product=sharding)

    def _gathered(self) -> tuple[Array, Array]:
        """The factors as they lie within a product. Left to itself XLA for TPU sends small shards
        round the devices one by one, each beside a piece of the product."""
        if self.within_product is None:
            return self.a, self.b
        mesh, spec = self.within_product.mesh, self.within_product.spec

        def place(factor: Array, spec: PartitionSpec) -> Array:
            lies = NamedSharding(mesh, even(spec, factor.shape, mesh))
            return lax.with_sharding_constraint(factor, lies)

        a, b, _ = factor_specs(spec, 0, len(self.core_shape), self.in_axes)
        return place(self.a, a), place(self.b, b)

    def trainable_count(self) -> int:
        return factor_count(self.a, self.b, self.rank)

    def _dropping(self) -> tuple[Any, Any]:
        return (
            (None, None) if self.key is None or self.dropout is None else (self.key, self.dropout)
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    options: Options, base: Any, a: Array, b: Array, scale: Array, x: Array, key: Any, rate: Any
) -> Array:
    """`base(x) + scale * (drop(x) @ a.T) @ b` for x [n, in]: one backward pass for base and update
    together."""
    return _linear_forward(options, base, a, b, scale, x, key, rate)[0]


def _linear_forward(
    options: Options, base: Any, a: Array, b: Array, scale: Array, x: Array, key: Any, rate: Any
):
    y = base_product(options, base, x)
    hidden = checkpoint_name(drop(key, rate, x) @ _turned(a, x.dtype), PRODUCT)
    update = _scaled(hidden, scale) @ b.astype(x.dtype)
    return y + update.astype(y.dtype), (base, a, b, scale, x, hidden, key, rate)


def _linear_backward(options: Options, saved: Any, dy: Array):
    """Keeps the large products as `g @ W.T` and `small.T @ large`, which XLA:CPU runs at full
    speed.

    Only the small matrices are transposed, each behind a barrier, or XLA would fold the transpose
    into the product and fall off its fast path. Only they are scaled, too: to multiply all of `dy`
    costs a TPU half as much as the update. Gradients that nobody asks for (of a frozen base, of the
    scale) are removed by the compiler.
    """
    base, a, b, scale, x, hidden, key, rate = saved
    _, base_vjp = jax.vjp(lambda base, x: base_product(options, base, x), base, x)
    d_base, dx = base_vjp(dy)
    dy = dy.astype(x.dtype)
    back = dy @ _turned(b, x.dtype)  # [n, r], as hidden
    d_hidden = _scaled(back, scale)
    da = _turned(d_hidden) @ drop(key, rate, x)
    db = _turned(_scaled(hidden, scale)) @ dy
    d_scale = jnp.sum(hidden.astype(jnp.float32) * back.astype(jnp.float32))
    through_update = d_hidden @ a.astype(x.dtype)
    if key is not None:  # the same mask on the way back
        through_update = drop(key, rate, through_update)
    return (
        d_base,
        da.astype(a.dtype),
        db.astype(b.dtype),
        d_scale.astype(scale.dtype),
        dx + through_update.astype(dx.dtype),
        None,
        None,
    )


_linear.defvjp(_linear_forward, _linear_backward)


def _scaled(hidden: Array, scale: Array) -> Array:
    """`scale * hidden` in the dtype of `hidden`, multiplied in float32."""
    return (hidden.astype(jnp.float32) * scale).astype(hidden.dtype)


def _turned(small: Array, dtype: Any = None) -> Array:
    return lax.optimization_barrier(small.astype(dtype or small.dtype).T)
