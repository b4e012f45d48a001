"""A bias for a kernel that has none, so that BitFit works on models without biases."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax_ft import trees
from lorax_ft.leaves import Array, leaf, static_field
from lorax_ft.methods.selection import BitFitConfig
from lorax_ft.methods.targets import ALL_LINEAR, Uses, bias_of, find, matrix_shape
from lorax_ft.methods.wrapper import Wrapper, row, stack_spec


@leaf
class AddedBias(Wrapper):
    """`base(x) + bias`, for a kernel to whose product the model itself adds nothing."""

    base: Any  # [*stack, *core] array or leaf
    bias: Array  # [*stack, out_size]
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))

    trainable: ClassVar[tuple[str, ...]] = ("bias",)

    @property
    def stack_depth(self) -> int:
        return self.bias.ndim - 1

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        y = self.base_linear(x, options)
        return y + row(self.bias, y)

    def dense(self) -> Array:
        raise ValueError(
            "an AddedBias leaf adds to a model that has no place for a bias, and cannot be merged "
            "into the kernel."
        )

    def partition_specs(self, spec: PartitionSpec) -> AddedBias:
        return self.replace(base=self.base_specs(spec), bias=stack_spec(spec, self.stack_depth))


def add_biases(
    params: Any, config: BitFitConfig, key: jax.Array, uses: Uses = None, quantization: Any = None
) -> Any:
    """Gives kernels that have no bias one of zeros, where the config asks for it."""
    del key, quantization
    if not config.add_missing:
        return params
    parameters = trees.flatten(params)
    targets = ALL_LINEAR if isinstance(config.targets, str) else config.targets
    fields = {}
    for path in find(params, targets, (), uses, field="BitFitConfig.targets"):
        if bias_of(path, parameters, uses) is not None:
            continue
        shape = matrix_shape(path, parameters[path], uses)
        fields[path] = AddedBias(
            base=parameters[path],
            bias=jnp.zeros((*shape.stack, shape.out_size)),
            base_in_axes=shape.in_axes,
        )
    return trees.with_fields(params, fields)
