"""`quantize`: puts quantised leaves in place of the kernels that patterns name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.jaxprs import is_concrete
from lorax_ft.leaves import as_matrix, is_leaf
from lorax_ft.quantization.bitsandbytes import LEAVES
from lorax_ft.quantization.encoding import NESTED_BLOCK, compress_absmax, encode_matrix, is_blocked
from lorax_ft.quantization.int8 import Int8, encode_int8
from lorax_ft.quantization.quantized import Quantized

PyTree = Any
KINDS = (*LEAVES, "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Which kernels are kept in few bits, and how."""

    kind: str = "nf4"  # "nf4", "fp4" or "int8"
    block_size: int = 64  # of nf4 and fp4: values that share one absmax
    double_quantization: bool = True  # of nf4 and fp4: absmax in eight bits too
    targets: str | tuple[str, ...] = r".*/kernel"  # regex over the whole "/"-joined path
    exclude: str | tuple[str, ...] = r".*(embeddings?|lm_head|classifier|pooler|score)(/.*)?"
    dtype: str | None = None  # what the model sees and computes in; None: the array's own

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"QuantizationConfig.kind must be one of {KINDS}, got {self.kind!r}.")
        size = self.block_size
        if not 32 <= size <= 4096 or size & (size - 1):
            raise ValueError(
                f"QuantizationConfig.block_size must be a power of two from 32 to 4096, got {size}."
            )
        if self.dtype is not None and not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise ValueError(
                "QuantizationConfig.dtype must be a floating-point type or None, "
                f"got {self.dtype!r}."
            )


def quantize(
    params: PyTree, config: QuantizationConfig, uses: Mapping[str, Any] | None = None
) -> PyTree:
    """Params with a quantised leaf for each kernel that `config` targets and does not exclude.

    `uses`, from `inspect`, says which axes a model contracts; without it a kernel is
    `[*stack, d_in, d_out]`. On `ShapeDtypeStruct`s it answers leaves of `ShapeDtypeStruct`s. Raises
    ValueError where a pattern of `targets` matches nothing, where nothing is left to quantise, and
    for a parameter that is a leaf already or that the model does not multiply with.

    >>> params = {"query": {"kernel": jnp.ones((128, 16)), "bias": jnp.zeros(16)}}
    >>> kernel = quantize(params, QuantizationConfig())["query"]["kernel"]
    >>> trees.kind(kernel), kernel.shape, kernel.packed.shape
    ('NF4', (128, 16), (64, 16))
    """
    paths = trees.select(trees.flatten(params), config.targets, field="QuantizationConfig.targets")
    chosen = {path for path in paths if not trees.matches(path, config.exclude)}
    if not chosen:
        raise ValueError(
            f"QuantizationConfig.exclude: {config.exclude!r} leaves nothing of the {len(paths)} "
            f"parameters that {config.targets!r} matches: {', '.join(paths[:5])}."
        )

    def rewrite(path: str, value: Any) -> Any:
        if path not in chosen:
            return value
        if uses is None:
            return quantize_array(value, config, path=path)
        use = uses[path]
        if use.kind not in ("kernel", "embedding"):
            raise ValueError(
                f"{path}: the model uses it as {use.kind!r}, so a product cannot dequantise it. "
                "Leave it out of QuantizationConfig.targets."
            )
        return quantize_array(value, config, path=path, in_axes=use.in_axes, stack=use.stack)

    return trees.map_with_path(rewrite, params)


def quantize_array(
    array: Any,
    config: QuantizationConfig,
    *,
    path: str = "array",
    in_axes: tuple[int, ...] = (-2,),
    stack: int | None = None,
) -> Quantized:
    """One kernel as a leaf, whatever the patterns of `config` say of its path.

    Args:
      array: `[*stack, *core]`, of numpy or JAX, and the leaf's fields are of the same; or a
        `ShapeDtypeStruct`, for a leaf of those.
      path: its name in error messages.
      in_axes: the axes of the core that products contract, counted from the end.
      stack: how many leading axes are stacked layers; by default all that `in_axes` leaves
        beyond two.

    Raises TypeError for what is not a concrete floating-point array, ValueError for one with
    values that are not finite or with no axis to contract.
    """
    _check(array, path, in_axes, stack)
    depth = len(array.shape) - max(2, -min(in_axes)) if stack is None else stack
    static: dict[str, Any] = {
        "kernel_shape": tuple(array.shape[depth:]),
        "kernel_in_axes": tuple(in_axes),
        "shown_dtype": jnp.dtype(config.dtype or array.dtype),
    }
    if config.kind != "int8":
        static["block_size"] = config.block_size
    leaf_type: Any = Int8 if config.kind == "int8" else LEAVES[config.kind]
    return leaf_type(**_fields(array, config, path, in_axes, depth), **static)


def bits_per_parameter(params: PyTree) -> float:
    """Bits of all arrays, or `ShapeDtypeStruct`s, over the numbers that they stand for.

    >>> shapes = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    >>> config = QuantizationConfig(targets="kernel", double_quantization=False)
    >>> bits_per_parameter(shapes), bits_per_parameter(quantize(shapes, config))
    (16.0, 4.5)
    """
    counts = trees.count(params)
    return 8 * counts.bytes / counts.total


def _check(array: Any, path: str, in_axes: tuple[int, ...], stack: int | None) -> None:
    if is_leaf(array):
        raise ValueError(
            f"{path} is a {trees.kind(array)} leaf already. Quantise once, before adding a method."
        )
    if not isinstance(array, jax.ShapeDtypeStruct) and not is_concrete(array):
        raise TypeError(
            f"{path} is traced. Quantising is done once, on the host, outside jit; for shapes "
            "alone pass jax.ShapeDtypeStruct in place of arrays."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{path} has dtype {array.dtype}; only floating-point arrays can be quantised."
        )
    core = len(array.shape) - (stack or 0)
    if core < 2 or not in_axes or -min(in_axes) > core:
        raise ValueError(
            f"{path} of shape {list(array.shape)} is no kernel whose axes {in_axes} a product "
            "contracts. Leave it out of QuantizationConfig.targets."
        )


def _fields(
    array: Any, config: QuantizationConfig, path: str, in_axes: tuple[int, ...], depth: int
) -> dict[str, Any]:
    """The leaf's fields `[*stack, ...]`, quantised core by core, of numpy or JAX as `array` is."""
    stack, core_shape = tuple(array.shape[:depth]), tuple(array.shape[depth:])
    if isinstance(array, jax.ShapeDtypeStruct):
        in_size = math.prod(core_shape[axis] for axis in in_axes)
        shapes = _field_shapes(in_size, math.prod(core_shape) // in_size, config)
        return {
            name: jax.ShapeDtypeStruct(stack + shape, dtype)
            for name, (shape, dtype) in shapes.items()
        }
    place = jnp.asarray if isinstance(array, jax.Array) else np.asarray
    try:
        encoded = [
            _encode(as_matrix(core, in_axes), config)
            for core in np.asarray(array).reshape(-1, *core_shape)
        ]
    except ValueError as error:
        raise ValueError(f"{path} cannot be quantised: {error}.") from None
    return {
        name: place(np.stack([fields[name] for fields in encoded]).reshape(stack + field.shape))
        for name, field in encoded[0].items()
    }


def _encode(matrix: Any, config: QuantizationConfig) -> dict[str, Any]:
    """The fields of one matrix `[in, out]`."""
    if config.kind == "int8":
        quantized, absmax = encode_int8(matrix)
        return {"quantized": quantized, "absmax": absmax}
    packed, absmax = encode_matrix(matrix, LEAVES[config.kind].table, config.block_size)
    if not config.double_quantization:
        return {"packed": packed, "absmax": absmax}
    in_torch_order = absmax.T.reshape(-1)  # that of [out, in]
    codes, nested_absmax, offset = compress_absmax(in_torch_order)
    return {
        "packed": packed,
        "absmax": codes.reshape(absmax.shape[::-1]).T,
        "nested_absmax": nested_absmax,
        "offset": offset,
    }


def _field_shapes(
    in_size: int, out_size: int, config: QuantizationConfig
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each field that `_encode` makes."""
    if config.kind == "int8":
        return {"quantized": ((in_size, out_size), jnp.int8), "absmax": ((out_size,), jnp.float32)}
    size, block_size = in_size * out_size, config.block_size
    if is_blocked(in_size, block_size):
        packed, absmax = (in_size // 2, out_size), (in_size // block_size, out_size)
    else:
        packed, absmax = (-(-size // 2),), (-(-size // block_size),)
    if not config.double_quantization:
        return {"packed": (packed, jnp.uint8), "absmax": (absmax, jnp.float32)}
    return {
        "packed": (packed, jnp.uint8),
        "absmax": (absmax, jnp.uint8),
        "nested_absmax": ((-(-math.prod(absmax) // NESTED_BLOCK),), jnp.float32),
        "offset": ((), jnp.float32),
    }
