"""Shares: which rows of every batch a process loads, and arrays that processes hold parts of."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lorax_ft.axes import ROWS

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The rows of a batch that a process loads: one of `count` equal shares."""

    index: int = 0
    count: int = 1
    parts: tuple[int, ...] = (0,)  # which of the mesh's data × fsdp parts of a batch they are


@functools.lru_cache(maxsize=8)
def share_of(mesh: Mesh | None) -> Share:
    """This process's share of a batch on a mesh, which is one process's where there is none.

    Processes whose devices compute with the same rows, each with its part of the texts or of the
    layers, have the same share. Raises ValueError where the rows of two processes overlap and are
    not the same.
    """
    if mesh is None:
        return Share()
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    rows = math.prod(mesh.shape[axis] for axis in ROWS)  # the mesh's first axes
    return find_share(owners.reshape(rows, -1), jax.process_index())


def find_share(owners: np.ndarray, process: int) -> Share:
    """The share of a process, where `owners` `[parts, devices of each]` are their processes.

    >>> owners = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])  # tensor = 2 within each process
    >>> find_share(owners, 1)
    Share(index=1, count=2, parts=(2, 3))
    >>> find_share(np.array([[0, 1]]), 1)  # tensor = 2 across them: both need every row
    Share(index=0, count=1, parts=(0,))
    """
    held = {p: tuple(np.flatnonzero((owners == p).any(axis=1))) for p in np.unique(owners)}
    shares = sorted({tuple(map(int, parts)) for parts in held.values()})
    if sum(map(len, shares)) != len(owners) or len({len(parts) for parts in shares}) != 1:
        raise ValueError(
            f"The mesh splits a batch into {len(owners)} parts, and processes hold {shares} of "
            "them: these overlap. Choose mesh.sequence × mesh.tensor so that it divides the "
            "devices of a process, or is a multiple of them."
        )
    parts = tuple(map(int, held[process]))
    return Share(index=shares.index(parts), count=len(shares), parts=parts)


def place_rows(array: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """The batch of which `array` is this process's share, by a sharding that splits its rows."""
    share = share_of(sharding.mesh)  # type: ignore[arg-type]
    total = array.shape[0] * share.count
    size = array.shape[0] // len(share.parts)

    def local(index: Any) -> np.ndarray:  # a slice for each axis
        start, stop, _ = index[0].indices(total)
        first = share.parts.index(start // size) * size
        return array[first : first + stop - start, *index[1:]]

    return jax.make_array_from_callback((total, *array.shape[1:]), sharding, local)


def gather(tree: PyTree) -> PyTree | None:
    """The tree with every array whole, on the first process; None on the others.

    All must call it. An array on several processes becomes one of a local device; those that are
    not the first meet one such array at a time.
    """

    def whole(array: Any) -> Any:
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return array
        if array.is_fully_replicated:
            return jnp.asarray(np.asarray(array))
        from jax.experimental import multihost_utils

        found = multihost_utils.process_allgather(array, tiled=True)
        return jnp.asarray(found) if jax.process_index() == 0 else None

    found = jax.tree.map(whole, tree)
    return found if jax.process_index() == 0 else None
