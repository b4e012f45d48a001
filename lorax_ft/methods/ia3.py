"""IA3: gains on the keys, the values and the inner activations (Liu et al. 2022).

"Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning":
`gain * k`, `gain * v` and `(gain * act(up(x))) @ down`, every gain 1 at first. A gain on a product
scales the bias that the model adds to it too, so it sits on that bias where there is one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax_ft import trees
from lorax_ft.leaves import Array, as_matrix, dense, from_matrix, leaf, static_field
from lorax_ft.methods.targets import Targets, Uses, bias_of, find, matrix_shape
from lorax_ft.methods.wrapper import Wrapper, row, stack_spec


@leaf
class IA3(Wrapper):
    """A kernel whose inputs or outputs are scaled: `base(gain * x)`, or `gain * base(x)`."""

    base: Any  # [*stack, *core] array or leaf
    gain: Array  # [*stack, in_size] or [*stack, out_size]
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))
    on_inputs: bool = static_field(default=False)

    trainable: ClassVar[tuple[str, ...]] = ("gain",)

    @property
    def stack_depth(self) -> int:
        return self.gain.ndim - 1

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        if self.on_inputs:
            return self.base_linear(x * row(self.gain, x), options)
        y = self.base_linear(x, options)
        return y * row(self.gain, y)

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        if not self.on_inputs:
            return self.base_linear(x * row(self.gain, x), options, transposed=True)
        y = self.base_linear(x, options, transposed=True)
        return y * row(self.gain, y)

    def take(self, ids: Array, *, mode: str | None = None) -> Array:
        rows = self.base_take(ids, mode)
        if self.on_inputs:
            return rows * self.gain.at[ids].get(mode=mode)[..., None].astype(rows.dtype)
        return rows * row(self.gain, rows)

    def dense(self) -> Array:
        def scaled(base: Any, gain: Array) -> Array:
            matrix = as_matrix(base, self.in_axes)
            gain = gain.astype(matrix.dtype)
            matrix = matrix * (gain[:, None] if self.on_inputs else gain[None])
            return from_matrix(matrix, self.core_shape, self.in_axes)

        for _ in range(self.stack_depth):
            scaled = jax.vmap(scaled)
        return scaled(dense(self.base), self.gain)

    def partition_specs(self, spec: PartitionSpec) -> IA3:
        return self.replace(base=self.base_specs(spec), gain=stack_spec(spec, self.stack_depth))


@leaf
class IA3Bias(Wrapper):
    """A bias that scales what it is added to: `gain * (y + base)`.

    It stands for `gain * base` together with a kernel whose outputs are scaled alike, which `merge`
    sees to.
    """

    base: Any  # [*stack, out_size]
    gain: Array  # [*stack, out_size]
    kernel: str = static_field()  # path of the kernel to whose product the bias is added
    kernel_in_axes: tuple[int, ...] = static_field(default=(-2,))
    base_in_axes: tuple[int, ...] = static_field(default=())

    trainable: ClassVar[tuple[str, ...]] = ("gain",)

    @property
    def stack_depth(self) -> int:
        return self.gain.ndim - 1

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        raise TypeError("an IA3Bias leaf is added, not multiplied with")

    def add_to(self, y: Array) -> Array:
        return (y + row(self.base.reshape(-1), y)) * row(self.gain, y)

    def dense(self) -> Array:
        return self.base * self.gain.reshape(self.base.shape).astype(self.base.dtype)

    def partition_specs(self, spec: PartitionSpec) -> IA3Bias:
        return self.replace(base=spec, gain=stack_spec(spec, self.stack_depth))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config:
    """Which kernels get a gain on their outputs and which on their inputs."""

    outputs: Targets = ("key", "value")
    inputs: Targets = ("down",)
    modules_to_save: tuple[str, ...] = ()  # modules trained whole, such as a new classifier


def add_ia3(
    params: Any, config: IA3Config, key: jax.Array, uses: Uses = None, quantization: Any = None
) -> Any:
    """Puts gains of ones where `config` says. Raises ValueError where a target matches nothing."""
    del key, quantization
    parameters = trees.flatten(params)
    fields: dict[str, Any] = {}
    if not config.outputs and not config.inputs:
        raise ValueError("IA3Config: both outputs and inputs are empty.")
    inputs = config.inputs and find(params, config.inputs, (), uses, field="IA3Config.inputs")
    outputs = config.outputs and find(params, config.outputs, (), uses, field="IA3Config.outputs")
    for path in inputs:
        fields[path] = _kernel(path, parameters[path], uses, on_inputs=True)
    for path in outputs:
        bias = bias_of(path, parameters, uses)
        if path in fields:
            raise ValueError(f"IA3Config: {path} is among the inputs and among the outputs.")
        if bias is None:
            fields[path] = _kernel(path, parameters[path], uses, on_inputs=False)
            continue
        shape = matrix_shape(path, parameters[path], uses)
        fields[bias] = IA3Bias(
            base=parameters[bias],
            gain=jnp.ones((*shape.stack, shape.out_size)),
            kernel=path,
            kernel_in_axes=shape.in_axes,
        )
    return trees.with_fields(params, fields)


def _kernel(path: str, value: Any, uses: Uses, *, on_inputs: bool) -> IA3:
    shape = matrix_shape(path, value, uses)
    gain = jnp.ones((*shape.stack, shape.in_size if on_inputs else shape.out_size))
    return IA3(base=value, gain=gain, base_in_axes=shape.in_axes, on_inputs=on_inputs)
