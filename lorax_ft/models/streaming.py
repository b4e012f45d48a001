"""Parameters read layer by layer to where they lie, quantised on the way.

On the host there are never more than about two of a checkpoint's tensors above what is kept: the
layers of a stack are written, one after another, into the array that holds them all. On a mesh a
process reads the slices of its own devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.models.attention import halved_rows
from lorax_ft.models.decoders import ROTATED
from lorax_ft.models.hugging_face import is_turned, split_layer
from lorax_ft.models.layers import Array, PyTree
from lorax_ft.models.matching import Checkpoint, tensor_names
from lorax_ft.models.model import Model
from lorax_ft.quantization import QuantizationConfig, quantize_array
from lorax_ft.quantization.slices import Index, place, place_slices, quantize_slices
from lorax_ft.trees import flatten, matches

Transform = Callable[[str, Array], Any]


def quantizes(config: QuantizationConfig | None, path: str) -> bool:
    """Whether the parameter `path` is a kernel that the config wants in few bits."""
    return (
        config is not None and matches(path, config.targets) and not matches(path, config.exclude)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How a model's parameters are read from a checkpoint.

    `transform` is as in `hub.load`, and `shardings` has by path that of an array, or the leaf that
    it becomes with one for each of its arrays; without any all go to the default device.
    """

    model: Model
    checkpoint: Checkpoint
    transform: Transform | None = None
    quantization: QuantizationConfig | None = None
    shardings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    interleaved_rotary: bool = False

    def read(self, path: str, shape: jax.ShapeDtypeStruct) -> Any:
        """One parameter, in our orientation and dtype; layers stacked."""
        names = tensor_names(self.model, path, shape.shape)
        if len({self.checkpoint.is_four_bit(name) for name in names.values()}) > 1:
            raise ValueError(
                f"{self.checkpoint.directory}: the layers of {path} are not all kept alike, some "
                "of them in four bits: they cannot be stacked. Pass scan_layers=False."
            )
        shardings = self.shardings.get(path)
        if None in names:
            return self._layer(path, names[None], shape, shardings)
        of_layer = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
        own, stack = jax.tree.map(_of_layer, shardings), None
        for i, name in enumerate(names.values()):
            part = self._layer(path, name, of_layer, own)
            stack = _empty(part, len(names), shardings) if stack is None else stack
            stack = jax.block_until_ready(_with_layer(stack, part, i))
        return stack

    def _layer(self, path: str, name: str, shape: jax.ShapeDtypeStruct, shardings: Any) -> Any:
        """The tensor `name` as an array, or as a leaf in few bits, where it is to lie."""
        if self.checkpoint.is_four_bit(name):
            return self._four_bit_layer(path, name, shardings).astype(shape.dtype)
        get = functools.partial(self._slice, path, name, shape.dtype)
        quantized = self.quantization if quantizes(self.quantization, path) else None
        if shardings is None:
            array = get((slice(None),) * len(shape.shape))
            if quantized is not None:
                return jax.tree.map(jnp.asarray, quantize_array(array, quantized, path=path))
            array = jnp.asarray(array)
            return array if self.transform is None else self.transform(path, array)
        if quantized is None:
            return place_slices(get, shape.shape, shardings)
        try:
            return quantize_slices(get, shape, quantized, shardings)
        except ValueError as error:
            raise ValueError(f"{path} cannot be quantised: {error}.") from None

    def _four_bit_layer(self, path: str, name: str, shardings: Any) -> Any:
        """A tensor that the checkpoint has in four bits."""
        if self._is_rotated(path):
            raise ValueError(
                f"{self.checkpoint.where(name)}: a four-bit weight cannot be reordered."
            )
        if shardings is None:
            return jax.tree.map(jnp.asarray, self.checkpoint.read(name))
        return self.checkpoint.place_four_bit(name, shardings)

    def _slice(self, path: str, name: str, dtype: Any, index: Index) -> np.ndarray:
        """A slice of a tensor in our orientation, and so of ours."""
        turned = is_turned(self.model.family.tables, path)
        if self._is_rotated(path):  # its rows are reordered, so that a slice is from all over it
            array = halved_rows(self.checkpoint.read(name), self.model.config.size_of_head)
            array = (array.T if turned else array)[index]
        else:
            array = self.checkpoint.read(name, index[::-1] if turned else index)
            array = array.T if turned else array
        return array.astype(dtype, copy=False)

    def _is_rotated(self, path: str) -> bool:
        return self.interleaved_rotary and split_layer(path)[0].startswith(ROTATED)


def place_whole(params: PyTree, shardings: Any) -> PyTree:
    """Arrays that every process holds, as the shardings say; as they are without them."""
    if shardings is None:
        return params
    return jax.tree.map(lambda array, s: place(np.asarray(array), s), params, shardings)


def place_shapes(shapes: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s with those shardings, or without any with that of the first device."""
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: first, shapes)
    return jax.tree.map(
        lambda shape, s: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=s),
        shapes,
        shardings,
    )


def plan(
    model: Model, checkpoint: Checkpoint, quantization: QuantizationConfig | None
) -> dict[str, Any]:
    """By path, what each parameter becomes when it is read, of `ShapeDtypeStruct`s."""
    shapes = flatten(model.shapes())
    planned = quantize_chosen(shapes, quantization)
    for path, shape in shapes.items():
        names = tensor_names(model, path, shape.shape)
        first = next(iter(names.values()))
        if not checkpoint.is_four_bit(first):
            continue
        layers = () if None in names else (len(names),)
        planned[path] = jax.tree.map(
            lambda field, layers=layers: jax.ShapeDtypeStruct(layers + field.shape, field.dtype),
            checkpoint.four_bit_like(first).astype(shape.dtype),
        )
    return planned


def quantize_chosen(
    parameters: Mapping[str, Any], config: QuantizationConfig | None
) -> dict[str, Any]:
    """Arrays, or `ShapeDtypeStruct`s, by path; those that the config's patterns name as leaves."""
    return {
        path: quantize_array(value, config, path=path)
        if config is not None and quantizes(config, path)
        else value
        for path, value in parameters.items()
    }


def flatten_shardings(shardings: PyTree, planned: Mapping[str, Any]) -> dict[str, Any]:
    """By path, the sharding of an array, or the leaf of shardings that is in a leaf's place."""
    structure = {path: jax.tree.structure(value) for path, value in planned.items()}
    return {
        path: value
        if isinstance(value, NamedSharding)
        else structure[path].unflatten(jax.tree.leaves(value))
        for path, value in flatten(shardings).items()
    }


def _of_layer(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _empty(part: PyTree, layers: int, shardings: Any) -> PyTree:
    """Zeros for a stack of such parts."""

    def zeros(array: Array, sharding: Any = None) -> Array:
        return jnp.zeros((layers, *array.shape), array.dtype, device=sharding)

    return jax.tree.map(zeros, part, *([] if shardings is None else [shardings]))


def _with_layer(stack: PyTree, part: PyTree, layer: int) -> PyTree:
    """The stack with that layer written; its memory is used again."""
    return jax.tree.map(
        lambda whole, array: _writer(
            whole.sharding if isinstance(whole.sharding, NamedSharding) else None
        )(whole, array, np.int32(layer)),
        stack,
        part,
    )


@functools.lru_cache(maxsize=64)
def _writer(sharding: Any) -> Callable[..., Array]:
    def write(stack: Array, layer: Array, index: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, index, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
