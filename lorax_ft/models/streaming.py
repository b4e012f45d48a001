"""Parameters read layer by layer to where they lie, quantised on the way.

On the host there are never more than about two of a checkpoint's tensors above what is kept: the
layers of a stack are written, one after another, into the array that holds them all. On a mesh a
process reads the slices of its own devices.
"""

from __future__ import annotations

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


def read_parameter(
    model: Model,
    checkpoint: Checkpoint,
    path: str,
    shape: jax.ShapeDtypeStruct,
    *,
    transform: Transform | None = None,
    quantization: QuantizationConfig | None = None,
    shardings: Any = None,
    interleaved_rotary: bool = False,
) -> Any:
    """One parameter, in our orientation and dtype; layers stacked.

    `shardings` is that of the array, or the leaf that it becomes with one for each of its arrays.
    """
    names = tensor_names(model, path, shape.shape)
    if len({checkpoint.is_four_bit(name) for name in names.values()}) > 1:
        raise ValueError(
            f"{checkpoint.directory}: the layers of {path} are not all kept alike, some of "
            "them in four bits: they cannot be stacked. Pass scan_layers=False."
        )
    stacked = None not in names
    of_layer = shape if not stacked else jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
    layer_shardings = jax.tree.map(_of_layer, shardings) if stacked else shardings
    quantized = quantization if quantizes(quantization, path) else None
    rotated = interleaved_rotary and split_layer(path)[0].startswith(ROTATED)

    def read(name: str, index: Index) -> np.ndarray:
        turned = is_turned(model.family.tables, path)
        if rotated:  # its rows are reordered, so that a slice is from all over it
            array = halved_rows(checkpoint.read(name), model.config.size_of_head)
            array = (array.T if turned else array)[index]
        else:
            array = checkpoint.read(name, index[::-1] if turned else index)
            array = array.T if turned else array
        return array.astype(shape.dtype, copy=False)

    def layer(name: str) -> Any:
        if checkpoint.is_four_bit(name):
            if rotated:
                raise ValueError(
                    f"{checkpoint.where(name)}: a four-bit weight cannot be reordered."
                )
            if shardings is None:
                leaf = jax.tree.map(jnp.asarray, checkpoint.read(name))
            else:
                leaf = checkpoint.place_four_bit(name, layer_shardings)
            return leaf.astype(shape.dtype)
        if shardings is None:
            array = read(name, (slice(None),) * len(of_layer.shape))
            if quantized is not None:
                leaf = quantize_array(array, quantized, path=path)
                return jax.tree.map(jnp.asarray, leaf)
            array = jnp.asarray(array)
            return array if transform is None else transform(path, array)
        get = functools.partial(read, name)
        if quantized is None:
            return place_slices(get, of_layer.shape, layer_shardings)
        try:
            return quantize_slices(get, of_layer, quantized, layer_shardings)
        except ValueError as error:
            raise ValueError(f"{path} cannot be quantised: {error}.") from None

    if not stacked:
        return layer(names[None])
    stack = None
    for i, name in enumerate(names.values()):
        part = layer(name)
        stack = _empty(part, len(names), shardings) if stack is None else stack
        stack = jax.block_until_ready(_with_layer(stack, part, i))
    return stack


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
