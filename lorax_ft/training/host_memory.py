"""The memory of the host: how much of it is free, and whether arrays fit into it."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax

PyTree = Any


def available(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that this process may still take of the machine, or of the container it runs in.

    Linux says so in `/proc/meminfo` and, of a container, in `/sys/fs/cgroup`; None where nothing
    does.
    """
    found = []
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    group = root / "sys/fs/cgroup"
    limit, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        cached = dict(line.split() for line in _read(group / "memory.stat").splitlines())
        taken = int(used) - int(cached.get("inactive_file", 0))  # that part is given back if asked
        found.append(max(0, int(limit) - taken))
    return min(found, default=None)


def needed(shapes: PyTree, shardings: PyTree, kind: str) -> int:
    """Bytes that arrays of these shapes take of a kind of memory, over this process' devices."""

    def size(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
        if sharding.memory_kind != kind:
            return 0
        one = math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
        return one * len(sharding.addressable_devices)

    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))


def check_room(needed: int, what: str) -> None:
    """Raises MemoryError where the host has fewer bytes available than are needed."""
    free = available()
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} need {needed:,} bytes ({needed / 2**30:.2f} GiB) of the host's memory, and "
            f"{free:,} bytes ({free / 2**30:.2f} GiB) of it are available. Set "
            'optimizer.state_dtype="int8", which takes about a quarter, train fewer parameters, '
            "shard them over more hosts, or set optimizer.paged=False where the devices have room."
        )


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
