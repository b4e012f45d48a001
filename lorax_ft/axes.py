"""Axes: those of a mesh, which models and the placement of arrays share, and what they divide; and
that of a sweep's members."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

ROWS = ("data", "fsdp")  # split the rows of a batch; "fsdp" the parameters too
SEQUENCE = "sequence"  # splits the places of a text
TENSOR = "tensor"  # splits the arithmetic of a layer, its heads among it
AXES = (*ROWS, SEQUENCE, TENSOR)  # outermost first

MEMBER = "member"  # of a sweep, those of one device, which `jax.vmap` computes side by side


def even(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec without the axes that do not divide."""

    def parts(names: Any) -> int:
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(mesh.shape[name] for name in names)

    return PartitionSpec(*(n if size % parts(n) == 0 else None for n, size in zip(spec, shape)))
