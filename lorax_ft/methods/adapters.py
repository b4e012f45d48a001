"""Adapters: small bottleneck nets inside the layers.

In series they follow a sublayer's last operation, `y + up(f(down(y)))`: after attention and after
the feed-forward net (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"), or
after the feed-forward net alone (Pfeiffer et al. 2021, "AdapterFusion"). In parallel they see the
input of a linear layer and add to its output (He et al. 2022, "Towards a Unified View of
Parameter-Efficient Transfer Learning"; by linear layers as in Hu et al. 2023, "LLM-Adapters").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax_ft import trees
from lorax_ft.leaves import Array, leaf, static_field
from lorax_ft.methods.targets import (
    Targets,
    Uses,
    bias_of,
    find,
    key_of,
    matrix_shape,
    norms,
)
from lorax_ft.methods.wrapper import Wrapper, row, stack_spec

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

TARGETS = {  # where the adapters of each kind are: the last kernel of a sublayer, or a whole net's
    "houlsby": ("output", "down"),
    "pfeiffer": ("down",),
    "parallel": ("up", "down"),
}


class _Bottleneck(Wrapper):
    """A base with a net from `d` to `size` and on: fields as in `Adapter`."""

    down: Array
    down_bias: Array
    up: Array
    up_bias: Array
    activation: str

    trainable: ClassVar[tuple[str, ...]] = ("down", "down_bias", "up", "up_bias")

    @property
    def stack_depth(self) -> int:
        return self.down.ndim - 2

    def bottleneck(self, x: Array) -> Array:
        """`f(x @ down + down_bias) @ up + up_bias`: [..., d] to [..., d_out]."""
        hidden = x.reshape(-1, x.shape[-1]) @ self.down.astype(x.dtype)
        hidden = ACTIVATIONS[self.activation](hidden + row(self.down_bias, hidden))
        y = hidden @ self.up.astype(x.dtype) + row(self.up_bias, hidden)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def dense(self) -> Array:
        raise ValueError(
            f"a {type(self).__name__} leaf is no linear map and cannot be merged into a kernel or "
            "a bias. Keep it beside the model, or use LoRA where merging is wanted."
        )

    def partition_specs(self, spec: PartitionSpec) -> Any:
        stack = stack_spec(spec, self.stack_depth)
        fields = dict.fromkeys(self.trainable, stack)
        return self.replace(base=self.base_specs(spec), **fields)


@leaf
class Adapter(_Bottleneck):
    """A kernel or bias with a net behind it: `y + up(f(down(y)))` for `y = base(x)` or `x + base`.

    It begins as the identity, for `up` and `up_bias` begin at zero.
    """

    base: Any  # [*stack, *core] kernel, or [*stack, d] bias
    down: Array  # [*stack, d, size]
    down_bias: Array  # [*stack, size]
    up: Array  # [*stack, size, d]
    up_bias: Array  # [*stack, d]
    activation: str = static_field(default="relu")
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        y = self.base_linear(x, options)
        return y + self.bottleneck(y)

    def add_to(self, y: Array) -> Array:
        y = y + row(self.base.reshape(-1), y)
        return y + self.bottleneck(y)


@leaf
class ParallelAdapter(_Bottleneck):
    """A kernel with a net beside it: `base(x) + scale * up(f(down(x)))`."""

    base: Any  # [*stack, *core] array or leaf
    down: Array  # [*stack, in_size, size]
    down_bias: Array  # [*stack, size]
    up: Array  # [*stack, size, out_size]
    up_bias: Array  # [*stack, out_size]
    scale: Array  # [*stack]
    activation: str = static_field(default="relu")
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        y = self.base_linear(x, options)
        return y + (self.bottleneck(x) * self.scale.astype(x.dtype)).astype(y.dtype)

    def partition_specs(self, spec: PartitionSpec) -> Any:
        specs = super().partition_specs(spec)
        return specs.replace(scale=stack_spec(spec, self.stack_depth))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Where the adapters are and how wide."""

    kind: str = "houlsby"  # houlsby, pfeiffer, parallel
    targets: Targets | None = None  # kernels that they are behind or beside; None: by kind
    size: int = 64  # width of the bottleneck
    reduction: float | None = None  # ... or the width that it reduces, divided by this
    activation: str = "relu"  # gelu, relu, silu, tanh
    scale: float = 1.0  # of parallel adapters' outputs
    stddev: float = 0.01  # of `down`, cut off at two deviations; `up` starts at zero
    norms: Targets | None = None  # norms trained beside, as Houlsby: r"(.*/)?layers.*"; None: none
    modules_to_save: tuple[str, ...] = ()  # modules trained whole, such as a new classifier

    def __post_init__(self):
        for field, table in (("kind", TARGETS), ("activation", ACTIVATIONS)):
            if getattr(self, field) not in table:
                raise ValueError(
                    f"AdapterConfig.{field} is {getattr(self, field)!r}, expected one of "
                    f"{', '.join(table)}."
                )
        if self.size < 1:
            raise ValueError(f"AdapterConfig.size must be at least 1, got {self.size}.")
        if self.reduction is not None and not self.reduction > 0:
            raise ValueError(f"AdapterConfig.reduction must be positive, got {self.reduction}.")

    def width(self, features: int) -> int:
        """Width of the bottleneck of an adapter that reads `features` numbers."""
        return self.size if self.reduction is None else max(1, int(features // self.reduction))


def add_adapters(
    params: Any, config: AdapterConfig, key: jax.Array, uses: Uses = None, quantization: Any = None
) -> Any:
    """Puts adapters where `config` says; the model computes what it did until they are trained.

    One in series sits on the bias that the model adds to the target's product, or on the target
    itself where there is none. Raises ValueError where a target matches nothing.
    """
    del quantization
    parameters = trees.flatten(params)
    targets = TARGETS[config.kind] if config.targets is None else config.targets
    fields = {}
    for path in find(params, targets, (), uses, field="AdapterConfig.targets"):
        kernel, shape = parameters[path], matrix_shape(path, parameters[path], uses)
        own_key = key_of(key, path)
        if config.kind == "parallel":
            net = _net(own_key, shape.stack, shape.in_size, shape.out_size, config)
            scale, axes = jnp.full(shape.stack, config.scale), shape.in_axes
            fields[path] = ParallelAdapter(base=kernel, scale=scale, base_in_axes=axes, **net)
            continue
        net = _net(own_key, shape.stack, shape.out_size, shape.out_size, config)
        bias = bias_of(path, parameters, uses)
        where, axes = (path, shape.in_axes) if bias is None else (bias, ())
        fields[where] = Adapter(base=parameters[where], base_in_axes=axes, **net)
    return trees.with_fields(params, fields)


def trained_norms(params: Any, config: AdapterConfig, uses: Uses = None) -> list[str]:
    """Paths of the norms that are trained beside the adapters."""
    if config.norms is None:
        return []
    return norms(params, config.norms, uses, field="AdapterConfig.norms")


def _net(
    key: jax.Array, stack: tuple[int, ...], d_in: int, d_out: int, config: AdapterConfig
) -> dict[str, Any]:
    size = config.width(d_in)
    down = jax.random.truncated_normal(key, -2.0, 2.0, (*stack, d_in, size)) * config.stddev
    return {
        "down": down,
        "down_bias": jnp.zeros((*stack, size)),
        "up": jnp.zeros((*stack, size, d_out)),
        "up_bias": jnp.zeros((*stack, d_out)),
        "activation": config.activation,
    }
