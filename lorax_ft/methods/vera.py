"""VeRA: random projections that are frozen and shared, with small trained vectors.

Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation":
`y = base(x) + gain * ((inner * (x @ a.T)) @ b)`. Every kernel takes its `a` and `b` from the same
two random matrices, as Hugging Face PEFT cuts them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax_ft import trees
from lorax_ft.leaves import Array, dense, from_matrix, leaf, static_field
from lorax_ft.methods.dropping import drop
from lorax_ft.methods.targets import ALL_LINEAR, Targets, Uses, find, matrix_shape
from lorax_ft.methods.wrapper import Wrapper, factor_specs, row


@leaf
class VeRA(Wrapper):
    """`base + a.T @ diag(inner) @ b @ diag(gain)`; only `inner` and `gain` are trained."""

    base: Any  # [*stack, *core] array or leaf
    a: Array  # [*stack, r, in_size]
    b: Array  # [*stack, r, out_size]
    inner: Array  # [*stack, r]
    gain: Array  # [*stack, out_size]
    dropout: Array | None = None  # [*stack]: share of inputs dropped before `a`
    key: Array | None = None  # [*stack] PRNG keys; None: evaluation
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))

    trainable: ClassVar[tuple[str, ...]] = ("inner", "gain")

    @property
    def stack_depth(self) -> int:
        return self.inner.ndim - 1

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        y = self.base_linear(x, options)
        hidden = drop(self.key, self.dropout, x) @ self.a.astype(x.dtype).T
        update = (hidden * row(self.inner, hidden)) @ self.b.astype(x.dtype)
        return y + (update * row(self.gain, update)).astype(y.dtype)

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        y = self.base_linear(x, options, transposed=True)
        hidden = (x * row(self.gain, x)) @ self.b.astype(x.dtype).T
        return y + ((hidden * row(self.inner, hidden)) @ self.a.astype(x.dtype)).astype(y.dtype)

    def take(self, ids: Array, *, mode: str | None = None) -> Array:
        rows = self.base_take(ids, mode)
        factors = self.a.at[:, ids].get(mode=mode)  # [r, *ids]
        update = jnp.einsum("r...,r,ro,o->...o", factors, self.inner, self.b, self.gain)
        return rows + update.astype(rows.dtype)

    def dense(self) -> Array:
        def shaped(a: Array, b: Array, inner: Array, gain: Array) -> Array:
            update = (a.T * inner[None]) @ b * gain[None]
            return from_matrix(update, self.core_shape, self.in_axes)

        for _ in range(self.stack_depth):
            shaped = jax.vmap(shaped)
        base = dense(self.base)
        return base + shaped(self.a, self.b, self.inner, self.gain).astype(base.dtype)

    def partition_specs(self, spec: PartitionSpec) -> VeRA:
        a, b, stack = factor_specs(spec, self.stack_depth, self.ndim, self.in_axes)
        return self.replace(
            base=self.base_specs(spec),
            a=a,
            b=b,
            inner=stack,
            gain=PartitionSpec(*stack, b[-1]),
            dropout=None if self.dropout is None else stack,
            key=None if self.key is None else stack,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig:
    """Which kernels are adapted, by projections of which rank."""

    targets: Targets = ALL_LINEAR
    exclude: Targets = ()
    rank: int = 256
    initial: float = 0.1  # of every `inner`; PEFT's d_initial
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"VeraConfig.rank must be at least 1, got {self.rank}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"VeraConfig.dropout must be in [0, 1), got {self.dropout}.")


def add_vera(
    params: Any, config: VeraConfig, key: jax.Array, uses: Uses = None, quantization: Any = None
) -> Any:
    """Puts a `VeRA` leaf round each target; `gain` is zero, so the model computes what it did."""
    del quantization
    parameters = trees.flatten(params)
    paths = find(params, config.targets, config.exclude, uses, field="VeraConfig.targets")
    shapes = {path: matrix_shape(path, parameters[path], uses) for path in paths}
    inputs = max(shape.in_size for shape in shapes.values())
    outputs = max(shape.out_size for shape in shapes.values())
    key_a, key_b = jax.random.split(key)
    a = _kaiming(key_a, (config.rank, inputs), inputs)
    b = _kaiming(key_b, (outputs, config.rank), config.rank).T

    def wrapped(path: str) -> VeRA:
        shape = shapes[path]
        stack = shape.stack
        return VeRA(
            base=parameters[path],
            a=jnp.broadcast_to(a[:, : shape.in_size], (*stack, config.rank, shape.in_size)),
            b=jnp.broadcast_to(b[:, : shape.out_size], (*stack, config.rank, shape.out_size)),
            inner=jnp.full((*stack, config.rank), config.initial),
            gain=jnp.zeros((*stack, shape.out_size)),
            dropout=jnp.full(stack, config.dropout) if config.dropout else None,
            base_in_axes=shape.in_axes,
        )

    return trees.with_fields(params, {path: wrapped(path) for path in paths})


def _kaiming(key: jax.Array, shape: tuple[int, int], fan_in: int) -> Array:
    """Uniform in +-sqrt(6 / fan_in), which is torch's kaiming_uniform with a = 0."""
    bound = math.sqrt(6.0 / fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
