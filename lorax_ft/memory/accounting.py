"""Accounting: what a step's trees weigh on one device, by part, to the byte.

Leaves know their fields: what is packed, what are its constants, what was put beside a base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lorax_ft import trees
from lorax_ft.leaves import is_leaf
from lorax_ft.quantization.quantized import Quantized
from lorax_ft.training.paging import HOST

PyTree = Any

# Of a quantised leaf, the fields with its values in few bits; its other fields are their constants.
PACKED = ("packed", "quantized")
# Subtrees that methods put beside a model's own parameters.
ADDED = ("prompt", "prefix")

# What the trees of a step are made of, in the order in which it is told.
STATE_PARTS: Mapping[str, str] = {
    "packed": "weights in few bits",
    "absmax": "their absmax",
    "weights": "plain weights",
    "trained": "trained weights",
    "adapters": "adapters",
    "optimizer": "optimizer states",
    "batch": "batch and key",
}


def local_bytes(array: Any) -> int:
    """Bytes on each device of an array or `ShapeDtypeStruct`, by its sharding where it has one.

    Of what its sharding keeps on the host, the bytes there that are a device's.

    >>> local_bytes(jax.ShapeDtypeStruct((4, 8), jax.numpy.bfloat16))
    64
    """
    sharding = getattr(array, "sharding", None)
    size = trees.array_bytes(array)
    if sharding is None or not size:
        return size
    local = math.prod(sharding.shard_shape(array.shape))
    return size * local // math.prod(array.shape)


def tree_bytes(tree: PyTree) -> int:
    """Bytes on each device of all arrays of a tree that are not on the host."""
    return sum(local_bytes(array) for array in jax.tree.leaves(tree) if not _is_on_host(array))


def host_bytes(tree: PyTree) -> int:
    """Bytes in the host's memory, for each device, of the arrays of a tree that are there."""
    return sum(local_bytes(array) for array in jax.tree.leaves(tree) if _is_on_host(array))


def state_parts(
    train: PyTree, frozen: PyTree, opt_state: PyTree, *others: PyTree
) -> dict[str, int]:
    """Bytes on each device of a step's arguments by `STATE_PARTS`, zeros among them.

    `train` and `frozen` are the halves of `trees.partition`; `others` are batch and key. All may be
    of arrays or of `ShapeDtypeStruct`s. The sum is that of all arrays, but for what is on the host.
    """
    parts = dict.fromkeys(STATE_PARTS, 0)
    for path, value in trees.flatten(frozen).items():
        for part, content in _frozen_parts(path, value):
            parts[part] += tree_bytes(content)
    for path, value in trees.flatten(train).items():
        added = is_leaf(value) or path.split("/")[0] in ADDED
        parts["adapters" if added else "trained"] += tree_bytes(value)
    parts["optimizer"] += tree_bytes(opt_state)
    parts["batch"] += tree_bytes(others)
    return parts


def _is_on_host(array: Any) -> bool:
    return getattr(getattr(array, "sharding", None), "memory_kind", None) == HOST


def _frozen_parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(part, arrays) of what one parameter keeps frozen."""
    if not is_leaf(value):
        yield ("adapters" if path.split("/")[0] in ADDED else "weights"), value
        return
    for field in dataclasses.fields(value):
        if field.metadata.get("static"):
            continue
        content = getattr(value, field.name)
        if is_leaf(content):
            yield from _frozen_parts(path, content)
        elif isinstance(value, Quantized):
            yield ("packed" if field.name in PACKED else "absmax"), content
        else:
            yield ("weights" if field.name == "base" else "adapters"), content
