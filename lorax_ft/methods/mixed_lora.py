"""The MixedLoRA leaf: one frozen parameter, several low-rank updates, and for each example of a
batch the number of the one to use.

`y[i] = base(x[i]) + scale[k] * (dropout(x[i]) @ a[k].T) @ b[k]` with `k = index[i]`: Hu et al. 2021
for every example, batched over different adapters as in Chen et al. 2023, "Punica".

The factors of each example are gathered, `[batch, r, in]` and `[batch, r, out]`, and multiplied
with its rows in one batched product. The other way is to multiply all rows with all adapters and
mask. That has as many small products again as there are adapters, holds all hidden values, and in
its sums over the whole batch one example that is not finite spoils every adapter's gradient.
Gathering does the arithmetic of one adapter however many there are, and keeps examples apart; it
costs one more buffer of the output's size.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax_ft.leaves import Array, leaf, static_field
from lorax_ft.methods.dropping import drop
from lorax_ft.methods.wrapper import (
    Wrapper,
    base_product,
    factor_count,
    factor_specs,
    matrix_of,
)

NO_ADAPTER = -1
"""The index of an example that is given to the base alone."""


@leaf
class MixedLoRA(Wrapper):
    """`base + scale[k] * a[k].T @ b[k]`, k being `index[i]` for example i.

    Seen as a matrix the base is `[in_size, out_size]`; `a` is `[*stack, adapters, r, in_size]`, `b`
    `[*stack, adapters, r, out_size]`; adapters of lower rank end in rows of zeros. Inputs have the
    batch as their first axis, or flattened into their first: `[batch, ..., in]` or `[batch * n,
    in]`. An adapter that is nobody's in a batch has gradients of exactly zero, and one that has
    diverged spoils only its own examples. An index that is no adapter's, nor -1, gives NaN.
    """

    base: Any  # [*stack, *core] array or leaf
    a: Array
    b: Array
    scale: Array  # [*stack, adapters] float32
    rank: Array  # [*stack, adapters] int32: how many rows are real
    index: Array | None = None  # [*stack, batch] int32; -1: the base alone; None: not chosen yet
    dropout: Array | None = None  # [*stack, adapters] float32: share of inputs dropped before `a`
    key: Array | None = None  # [*stack] PRNG keys; None: evaluation, nothing is dropped
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")

    @property
    def stack_depth(self) -> int:
        return self.a.ndim - 3

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        return self._product(_Dot(False, precision, preferred_element_type), x)

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        return self._product(_Dot(True, precision, preferred_element_type), x)

    def take(self, ids: Array, *, mode: str | None = None) -> Array:
        """Rows for ids `[batch, ...]`: those of example i with the update of its own adapter.

        Raises ValueError for ids without batch and length axes: positions, say, are the same for
        every example, and a table of them has one row for all.
        """
        index = self._chosen()
        if ids.ndim < 2 or ids.shape[0] != index.shape[0]:
            raise ValueError(
                f"MixedLoRA: a look-up with ids {list(ids.shape)}; for a batch of "
                f"{index.shape[0]} examples with an adapter each, ids must be "
                f"[{index.shape[0]}, length]. Leave this embedding out of the adapters' targets."
            )
        rows = self.base_take(ids, mode)
        if mode == "clip":
            ids = jnp.clip(ids, 0, self.in_size - 1)
        own = _positions(self.a, index).reshape(-1, *(1,) * (ids.ndim - 1))
        # r numbers for each id, from its own adapter's table: no [batch, r, in] is made
        factors = self.a.at[jnp.broadcast_to(own, ids.shape), :, ids].get(mode="fill", fill_value=0)
        b, scale = _of_examples(self.b, index), _scales(self.scale, index)
        update = jnp.einsum("b...r,brd->b...d", factors, b)
        return rows + (update * scale.reshape(-1, *(1,) * ids.ndim)).astype(rows.dtype)

    def dense(self) -> Array:
        raise ValueError(
            "MixedLoRA: a parameter with several adapters stands for no single array. Choose one "
            "with select(adapters, name) first, then merge."
        )

    def partition_specs(self, spec: PartitionSpec) -> MixedLoRA:
        a, b, stack = factor_specs(spec, len(self.stack_shape), self.ndim, self.in_axes)
        depth = len(self.stack_shape)
        each = PartitionSpec(*stack, None)
        return self.replace(
            base=self.base_specs(spec),
            a=PartitionSpec(*a[:depth], None, *a[depth:]),
            b=PartitionSpec(*b[:depth], None, *b[depth:]),
            scale=each,
            rank=each,
            index=None if self.index is None else each,
            dropout=None if self.dropout is None else each,
            key=None if self.key is None else stack,
        )

    def trainable_count(self) -> int:
        return factor_count(self.a, self.b, self.rank)

    def _chosen(self) -> Array:
        if self.index is None:
            raise ValueError(
                "MixedLoRA: no adapter is chosen for the examples of this batch. Call "
                "mix(adapters, index), or select(adapters, name) for one adapter."
            )
        return self.index

    def _product(self, dot: _Dot, x: Array) -> Array:
        index = self._chosen()
        _check_rows(x.shape, index.shape[0])
        rows = x.reshape(-1, x.shape[-1])
        a, b = (self.b, self.a) if dot.transposed else (self.a, self.b)
        scale = _scales(self.scale, index)
        key, rate = None, None
        # dropout is of the inputs of `a`, so a transposed product, a tied head's, has none
        if not dot.transposed and self.key is not None and self.dropout is not None:
            key, rate = self.key, _of_examples(self.dropout, index)
        base = matrix_of(self.base, self.in_axes)
        y: Any = _mixed(dot, base, a, b, scale, index, rows, key, rate)
        return y.reshape(*x.shape[:-1], -1)


class _Dot(NamedTuple):
    """The static part of a product: `x @ matrix`, or `x @ matrix.T`."""

    transposed: bool
    precision: Any
    preferred_element_type: Any

    def base(self, base: Any, x: Array) -> Array:
        options = (self.precision, self.preferred_element_type)
        return base_product(options, base, x, transposed=self.transposed)


def _check_rows(shape: tuple[int, ...], batch: int) -> None:
    """Raises ValueError where the rows of a product are not the same number for each example."""
    flattened = len(shape) == 2
    if len(shape) < 2 or (shape[0] % batch if flattened else shape[0] != batch):
        raise ValueError(
            f"MixedLoRA: a product with x {list(shape)}, whose first axis is not made up of the "
            f"{batch} examples that the adapter index is for. The batch must come first, the index "
            "be as long as it, and a parameter that the model uses for something else than "
            "examples be left out of the adapters' targets."
        )


def _of_examples(field: Array, index: Array) -> Array:
    """The adapter's part of a field `[adapters, ...]` for each example; zeros where it has none."""
    return field.at[_positions(field, index)].get(mode="fill", fill_value=0)


def _scales(scale: Array, index: Array) -> Array:
    """Scales `[batch]`: 0 for the base alone, NaN for an index that is no adapter's."""
    own = scale.at[_positions(scale, index)].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(index == NO_ADAPTER, jnp.zeros((), scale.dtype), own)


def _positions(field: Array, index: Array) -> Array:
    """The index with negative numbers out of range, for they would count from the end."""
    return jnp.where(index < 0, field.shape[0], index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(
    dot: _Dot,
    base: Any,
    a: Array,
    b: Array,
    scale: Array,
    index: Array,
    x: Array,
    key: Any,
    rate: Any,
) -> Array:
    """`base(x) + scale[i] * (drop(x) @ a[index[i]].T) @ b[index[i]]` for x `[batch * n, in]`, scale
    and rate `[batch]`: one backward pass for base and updates together."""
    return _mixed_forward(dot, base, a, b, scale, index, x, key, rate)[0]


def _mixed_forward(
    dot: _Dot,
    base: Any,
    a: Array,
    b: Array,
    scale: Array,
    index: Array,
    x: Array,
    key: Any,
    rate: Any,
):
    y = dot.base(base, x)
    hidden = jnp.einsum(
        "bnd,brd->bnr", _grouped(_dropped(key, rate, x), index), _factors(a, index, x.dtype)
    )
    update = jnp.einsum("bnr,bro->bno", hidden, _factors(b, index, x.dtype)) * _column(scale, x)
    saved = (base, a, b, scale, index, x, hidden, key, rate)
    return y + update.reshape(y.shape).astype(y.dtype), saved


def _mixed_backward(dot: _Dot, saved: Any, dy: Array):
    """Gathers the factors of each example again, and adds the gradients of one adapter's examples
    up.

    The sum is a scatter in the factors' own dtype: only an adapter's own examples reach it.
    Gradients that nobody asks for (of a frozen base, of the scales) are removed by the compiler.
    """
    base, a, b, scale, index, x, hidden, key, rate = saved
    _, base_vjp = jax.vjp(dot.base, base, x)
    d_base, dx = base_vjp(dy)
    dy = _grouped(dy.astype(x.dtype), index)
    d_hidden = jnp.einsum("bno,bro->bnr", dy, _factors(b, index, x.dtype))
    d_scale = jnp.sum(hidden.astype(jnp.float32) * d_hidden.astype(jnp.float32), axis=(1, 2))
    d_hidden = d_hidden * _column(scale, x)
    da = jnp.einsum("bnr,bnd->brd", d_hidden, _grouped(_dropped(key, rate, x), index))
    db = jnp.einsum("bnr,bno->bro", hidden * _column(scale, x), dy)
    through = jnp.einsum("bnr,brd->bnd", d_hidden, _factors(a, index, x.dtype)).reshape(x.shape)
    if key is not None:  # the same mask on the way back
        through = _dropped(key, rate, through)
    return (
        d_base,
        _summed(da, a, index),
        _summed(db, b, index),
        d_scale.astype(scale.dtype),
        None,
        dx + through.astype(dx.dtype),
        None,
        None,
    )


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _factors(factor: Array, index: Array, dtype: Any) -> Array:
    return _of_examples(factor.astype(dtype), index)


def _grouped(rows: Array, index: Array) -> Array:
    """`[batch * n, d]` as `[batch, n, d]`."""
    return rows.reshape(index.shape[0], -1, rows.shape[-1])


def _column(scale: Array, x: Array) -> Array:
    return scale.astype(x.dtype)[:, None, None]


def _dropped(key: Any, rate: Any, x: Array) -> Array:
    """Dropout of rows `[batch * n, d]` at each example's own rate."""
    if key is None:
        return x
    return drop(key, jnp.repeat(rate, x.shape[0] // rate.shape[0])[:, None], x)


def _summed(gradients: Array, factor: Array, index: Array) -> Array:
    """Gradients `[batch, r, d]` added up by adapter, `[adapters, r, d]`."""
    zeros = jnp.zeros_like(factor)
    return zeros.at[_positions(factor, index)].add(gradients.astype(factor.dtype), mode="drop")
