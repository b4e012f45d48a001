"""Kernels quantised, or read in few bits, slice by slice, straight to where they lie on a mesh.

A process reads and encodes what its own devices hold of a kernel. Only the absolute maxima that are
over the whole of it are exchanged: a 64th of the kernel, or a number for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.quantization.bitsandbytes import LEAVES, blocks_in_columns
from lorax_ft.quantization.encoding import compress_absmax, encode_matrix, is_blocked
from lorax_ft.quantization.int8 import encode_int8, int8_absmax
from lorax_ft.quantization.nf4 import FourBit
from lorax_ft.quantization.quantize import QuantizationConfig, quantize_array

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


def quantize_slices(
    read: Read, like: jax.ShapeDtypeStruct, config: QuantizationConfig, shardings: Any
) -> Any:
    """The leaf of a kernel `[in, out]`, bit for bit that of `quantize_array` of the whole.

    Args:
        read: gives a slice of the kernel.
        like: its shape, and the dtype that the leaf shows where the config names none.
        shardings: the leaf with a `NamedSharding` in place of each array.

    Raises ValueError for values that are not finite.
    """
    leaf = quantize_array(like, config)
    in_size, out_size = like.shape
    if config.kind == "int8":
        fields = _int8(read, (in_size, out_size), shardings)
    elif is_blocked(in_size, config.block_size):
        fields = _blocks(read, (in_size, out_size), config, shardings)
    else:  # blocks over the flat array, which lie whole on every device
        whole: Any = quantize_array(read((slice(None), slice(None))), config)
        fields = {name: getattr(whole, name) for name in ("packed", "absmax")}
        if config.double_quantization:
            fields |= {"nested_absmax": whole.nested_absmax, "offset": whole.offset}
    return leaf.replace(
        **{name: place(value, getattr(shardings, name)) for name, value in fields.items()}
    )


def convert_slices(
    read: Callable[[str, tuple[int, int], Index], np.ndarray], kernel: FourBit, shardings: Any
) -> FourBit:
    """A blocked leaf of bitsandbytes' tensors, bit for bit that of `from_bitsandbytes`.

    Args:
        read: `(name, shape, index)` gives a slice of `weight`, bytes `[out, in / 2]`, and of
            `weight.absmax`, `[out, in / block_size]`.
        kernel: the leaf as `without_codes` gives it.
        shardings: the leaf with a `NamedSharding` in place of each array.
    """
    out_size, half = kernel.out_size, kernel.block_size // 2
    blocks = kernel.in_size // kernel.block_size

    def packed(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(blocks * half)
        first, last = start // half, -(-stop // half)
        whole = index[1], slice(first * half, last * half)
        rows = blocks_in_columns(read("weight", (out_size, blocks * half), whole), 2 * half)
        return rows[start - first * half : stop - first * half]

    def absmax(index: Index) -> np.ndarray:
        return read("weight.absmax", (out_size, blocks), index[::-1]).T

    nested = jax.tree.map(place, kernel, shardings.replace(packed=None, absmax=None))
    return nested.replace(
        packed=place_slices(packed, (blocks * half, out_size), shardings.packed),
        absmax=place_slices(absmax, (blocks, out_size), shardings.absmax),
    )


def place(value: Any, sharding: NamedSharding) -> jax.Array:
    """A host array that every process has, or an array that lies so already, on the mesh."""
    if isinstance(value, jax.Array):
        return value
    value = np.asarray(value)
    return place_slices(lambda index: value[index], value.shape, sharding)


def place_slices(read: Read, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    """An array of which each device gets its own slice; copies of a slice are read once."""
    held: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = _resolved(index, shape)
        if key not in held:
            held[key] = np.asarray(read(index), order="C")
        return held[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _blocks(
    read: Read, shape: tuple[int, int], config: QuantizationConfig, shardings: Any
) -> dict[str, Any]:
    """The fields of a four-bit leaf whose blocks lie within columns."""
    size, (in_size, out_size) = config.block_size, shape
    blocks, half = in_size // size, size // 2
    encoded: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def region(first: int, last: int, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        key = first, last, columns.indices(out_size)
        if key not in encoded:
            rows = read((slice(first * size, last * size), columns))
            encoded[key] = encode_matrix(rows, LEAVES[config.kind].table, size)
        return encoded[key]

    def packed(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(blocks * half)
        first, last = start // half, -(-stop // half)
        return region(first, last, index[1])[0][start - first * half : stop - first * half]

    def absmax(index: Index) -> np.ndarray:
        first, last, _ = index[0].indices(blocks)
        return region(first, last, index[1])[1]

    fields: dict[str, Any] = {
        "packed": place_slices(packed, (blocks * half, out_size), shardings.packed),
        "absmax": place_slices(absmax, (blocks, out_size), shardings.absmax),
    }
    if config.double_quantization:
        whole = on_host(fields["absmax"])
        codes, nested_absmax, offset = compress_absmax(whole.T.reshape(-1))  # as in [out, in]
        fields["absmax"] = codes.reshape(whole.shape[::-1]).T
        fields |= {"nested_absmax": nested_absmax, "offset": offset}
    return fields


def _int8(read: Read, shape: tuple[int, int], shardings: Any) -> dict[str, Any]:
    """The fields of an eight-bit leaf: maxima of what the devices hold first, then of all rows.

    What was read for its maxima is kept until it is encoded.
    """
    sharding = shardings.quantized
    shard_shape = sharding.shard_shape(shape)
    parts = shape[0] // shard_shape[0]
    spec = PartitionSpec(*(*sharding.spec, None, None)[:2])
    held: dict[Any, np.ndarray] = {}

    def maxima(index: Index) -> np.ndarray:
        first, last, _ = index[0].indices(parts)
        index = slice(first * shard_shape[0], last * shard_shape[0]), index[1]
        part = held[_resolved(index, shape)] = read(index)
        return int8_absmax(part)[None]

    def codes(index: Index) -> np.ndarray:
        return encode_int8(held.pop(_resolved(index, shape)), absmax[index[1]])[0]

    partial = place_slices(maxima, (parts, shape[1]), NamedSharding(sharding.mesh, spec))
    absmax = on_host(partial).max(axis=0)
    return {"quantized": place_slices(codes, shape, sharding), "absmax": absmax}


def _resolved(index: Index, shape: tuple[int, ...]) -> Any:
    """The same for every way to write a slice."""
    return tuple(s.indices(n) for s, n in zip(index, shape))


def on_host(array: Any) -> np.ndarray:
    """The whole of an array, also one that lies on devices of other processes."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
