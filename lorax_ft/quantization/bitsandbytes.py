"""Four-bit leaves to and from the tensors of a bitsandbytes checkpoint, every bit kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.quantization.codebooks import dynamic_map
from lorax_ft.quantization.encoding import NESTED_BLOCK, is_blocked
from lorax_ft.quantization.nf4 import FP4, NF4, FourBit

LEAVES: dict[str, type[FourBit]] = {"nf4": NF4, "fp4": FP4}
"""The leaf class of each `quant_type`."""

_STATE = "weight.quant_state.bitsandbytes__"  # and the `quant_type`: the name of a JSON as bytes


def to_bitsandbytes(kernel: FourBit) -> dict[str, np.ndarray]:
    """The state dict of a `Linear4bit` weight: `weight`, `weight.absmax` and so on.

    The weight is torch's, `[out, in]`. Raises ValueError for a stack of kernels: convert its layers
    one by one.
    """
    if kernel.stack_shape:
        raise ValueError(
            f"to_bitsandbytes: the leaf is a stack {list(kernel.stack_shape)} of kernels. Slice it "
            "first: jax.tree.map(lambda field: field[i], leaf)."
        )
    name = kind_of(kernel)
    packed, absmax = np.asarray(kernel.packed), np.asarray(kernel.absmax)
    if kernel.blocked:
        blocks = packed.reshape(absmax.shape[0], -1, kernel.out_size)
        codes = np.concatenate([blocks >> 4, blocks & 15], axis=1).reshape(-1, kernel.out_size).T
        packed = (codes[:, ::2] << 4) | codes[:, 1::2]
        absmax = absmax.T
    state: dict[str, Any] = {
        "quant_type": name,
        "blocksize": kernel.block_size,
        "dtype": str(kernel.dtype),
        "shape": [kernel.out_size, kernel.in_size],
    }
    tensors = {
        "weight": packed.reshape(-1, 1),
        "weight.absmax": np.ascontiguousarray(absmax).reshape(-1),
        "weight.quant_map": kernel.table,
    }
    if kernel.nested_absmax is not None and kernel.offset is not None:
        tensors["weight.nested_absmax"] = np.asarray(kernel.nested_absmax)
        tensors["weight.nested_quant_map"] = dynamic_map()
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(kernel.offset),
        }
    tensors[f"{_STATE}{name}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def from_bitsandbytes(
    tensors: Mapping[str, np.ndarray],
    *,
    kernel_shape: tuple[int, ...] | None = None,
    in_axes: tuple[int, ...] = (-2,),
    dtype: Any = None,
) -> FourBit:
    """The leaf, of numpy arrays, of one `Linear4bit` weight; keys as `to_bitsandbytes` names them.

    By default the kernel is `[in, out]`; give `kernel_shape` and `in_axes` for another arrangement
    of it, and `dtype` for another than the one that was quantised. Raises ValueError where a part
    is missing, unknown or of another scheme.
    """
    state, kernel = _state(tensors), without_codes(tensors)
    out_size, in_size = state["shape"]
    packed = (
        np.ascontiguousarray(tensors["weight"]).reshape(-1).view(np.uint8)
    )  # may be stored as bfloat16
    absmax = np.asarray(tensors["weight.absmax"])
    if is_blocked(in_size, kernel.block_size):
        packed = blocks_in_columns(packed.reshape(out_size, -1), kernel.block_size)
        absmax = np.ascontiguousarray(absmax.reshape(out_size, -1).T)
    return kernel.replace(
        packed=packed,
        absmax=absmax,
        kernel_shape=kernel_shape or (in_size, out_size),
        kernel_in_axes=tuple(in_axes),
        shown_dtype=jnp.dtype(dtype or state["dtype"]),
    )


def without_codes(tensors: Mapping[str, Any]) -> FourBit:
    """The leaf of `from_bitsandbytes`, None for `packed` and `absmax`.

    Of `weight` and `weight.absmax` only the names are looked at. Raises as it does.
    """
    state = _state(tensors)
    _check_parts(tensors)
    leaf_type: Any = LEAVES[state["quant_type"]]
    _check_map("quant_map", tensors["weight.quant_map"], leaf_type.table)
    out_size, in_size = state["shape"]
    nested_absmax, offset = _nested(tensors, state)
    return leaf_type(
        packed=None,
        absmax=None,
        nested_absmax=nested_absmax,
        offset=offset,
        block_size=state["blocksize"],
        kernel_shape=(in_size, out_size),
        kernel_in_axes=(-2,),
        shown_dtype=jnp.dtype(state["dtype"]),
    )


def blocks_in_columns(packed: np.ndarray, block_size: int) -> np.ndarray:
    """Bytes of whole blocks from bitsandbytes' order, `[out, in / 2]`, to ours, `[in / 2, out]`."""
    out_size = packed.shape[0]
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(out_size, -1).T
    halves = codes.reshape(-1, 2, block_size // 2, out_size)
    return ((halves[:, 0] << 4) | halves[:, 1]).reshape(-1, out_size)


def kind_of(kernel: FourBit) -> str:
    """The `quant_type` of a leaf."""
    return next(name for name, leaf_type in LEAVES.items() if isinstance(kernel, leaf_type))


def _state(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    names = [key for key in tensors if key.startswith(_STATE)]
    if len(names) != 1 or names[0].removeprefix(_STATE) not in LEAVES:
        raise ValueError(
            f"from_bitsandbytes: expected one tensor named {_STATE}nf4 or {_STATE}fp4, "
            f"got {sorted(tensors)}."
        )
    return json.loads(np.asarray(tensors[names[0]]).tobytes())


def _check_parts(tensors: Mapping[str, np.ndarray]) -> None:
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    wanted = {"weight", "weight.absmax", "weight.quant_map"}
    wanted |= nested if nested & set(tensors) else set()
    found = {name for name in tensors if not name.startswith(_STATE)}
    if found != wanted:
        raise ValueError(
            f"from_bitsandbytes: missing are {sorted(wanted - found)} and unknown are "
            f"{sorted(found - wanted)}."
        )


def _nested(tensors: Mapping[str, np.ndarray], state: dict[str, Any]) -> tuple[Any, Any]:
    """(nested_absmax, offset), or two None without double quantisation."""
    if "weight.nested_absmax" not in tensors:
        return None, None
    if state["nested_blocksize"] != NESTED_BLOCK:
        raise ValueError(
            f"from_bitsandbytes: nested_blocksize is {state['nested_blocksize']}, "
            f"expected {NESTED_BLOCK}."
        )
    _check_map("nested_quant_map", tensors["weight.nested_quant_map"], dynamic_map())
    return np.asarray(tensors["weight.nested_absmax"]), np.float32(state["nested_offset"])


def _check_map(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.allclose(found, expected, rtol=1e-6, atol=0):
        raise ValueError(f"from_bitsandbytes: weight.{name} is not bitsandbytes' own table.")
