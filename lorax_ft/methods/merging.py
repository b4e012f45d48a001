"""Merging: a tree of leaves as plain arrays, the way back, and how far a merged model drifts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft import trees
from lorax_ft.leaves import dense, is_leaf
from lorax_ft.lift import lift
from lorax_ft.methods.adalora import AdaLoRA
from lorax_ft.methods.dropping import set_dropout_key
from lorax_ft.methods.ia3 import IA3, IA3Bias
from lorax_ft.methods.lora_leaf import LoRA


def merge(params: Any, dtype: Any = None) -> Any:
    """The plain tree in which every leaf is the array that it stands for.

    A quantised base is dequantised, and not quantised again: merging into four bits degrades the
    output. `dtype` is that of the merged kernels, by default the one each leaf computes in. Raises
    ValueError naming a parameter that holds what no kernel can express, such as an adapter.
    """

    gains = {
        value.kernel: value
        for value in trees.flatten(params).values()
        if isinstance(value, IA3Bias)
    }

    def merged(path: str, value: Any) -> Any:
        if path in gains:
            scaled = gains[path]
            value = IA3(base=value, gain=scaled.gain, base_in_axes=scaled.kernel_in_axes)
        if not is_leaf(value):
            return value
        try:
            array = dense(value)
        except ValueError as error:
            raise ValueError(f"merge: {path}: {error}") from None
        return array if dtype is None else array.astype(dtype)

    return trees.map_with_path(merged, params)


def unmerge(merged: Any, params: Any) -> Any:
    """The adapters of `params` round bases such that they merge to `merged` again.

    The bases are floats, also where those of `params` are quantised. Raises ValueError for a leaf
    other than LoRA and AdaLoRA: DoRA's merged columns, for one, no longer tell how long they were.
    """
    arrays = trees.flatten(merged)

    def unmerged(path: str, value: Any) -> Any:
        if not isinstance(value, (LoRA, AdaLoRA)):
            if not is_leaf(value) or not hasattr(value, "base"):
                return arrays[path]
            raise ValueError(
                f"unmerge: {path} is a {type(value).__name__} leaf, whose merge cannot be undone. "
                "Keep its base."
            )
        update = value.replace(base=jnp.zeros(value.shape, value.dtype)).dense()
        return value.replace(base=arrays[path] - update.astype(arrays[path].dtype))

    return trees.map_with_path(unmerged, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """How far two outputs of shape [...] lie apart."""

    largest: float  # of the absolute differences
    mean: float
    relative: float  # norm of the difference over norm of the unmerged output


def drift(apply: Callable[..., Any], params: Any, merged: Any, *inputs: Any) -> Drift:
    """What merging changed, measured on some inputs: the output of `params` beside that of
    `merged`."""
    before = lift(apply)(set_dropout_key(params, None), *inputs)
    difference = jax.tree.leaves(
        jax.tree.map(lambda a, b: _float(a) - _float(b), apply(merged, *inputs), before)
    )
    difference = jnp.concatenate([d.reshape(-1) for d in difference])
    reference = jnp.concatenate([_float(b).reshape(-1) for b in jax.tree.leaves(before)])
    return Drift(
        largest=float(jnp.max(jnp.abs(difference))),
        mean=float(jnp.mean(jnp.abs(difference))),
        relative=float(jnp.linalg.norm(difference) / jnp.linalg.norm(reference)),
    )


def _float(x: Any) -> Any:
    return jnp.asarray(x).astype(jnp.float32)
