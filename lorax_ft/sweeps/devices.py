"""The devices of a sweep: each computes some of its members, and all have the base.

A CPU is a device for each of its cores here. One core computes a member from end to end faster
than all of them together compute its products one after another: no core waits for another, and
nobody's arrays are cut into pieces.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any
AXIS = "members"


def one_for_each_core() -> None:
    """Has JAX make a device of each core that this process may use.

    For a program that trains a sweep and nothing else. Does nothing where JAX is in use already, or
    where XLA_FLAGS says how many devices a CPU is. Workers that share a machine do not divide its
    cores: a program of more members a device is compiled otherwise, and rounds otherwise.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # its backend is there
        jax.config.update("jax_num_cpu_devices", _cores())


def mesh_of(slots: int) -> Mesh:
    """As many of this process's devices as share so many slots evenly."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if slots % n == 0)
    return Mesh(np.array(devices[:count]), (AXIS,))


def rounded_up(slots: int) -> int:
    """So many slots, or as few more as all devices share evenly."""
    count = min(slots, jax.local_device_count())
    return -(-slots // count) * count


def rounded_down(slots: int) -> int:
    """So many slots, or as few less as all devices share evenly; fewer than devices stay."""
    count = min(slots, jax.local_device_count())
    return slots // count * count


def memories(mesh: Mesh) -> int:
    """How many memories the devices have between them: those of a CPU have one."""
    return 1 if _is_cpu(mesh) else mesh.size


def in_turns(mesh: Mesh, slots: int) -> list[int]:
    """The slots in an order that gives each device one before any has two."""
    return [int(i) for i in np.arange(slots).reshape(mesh.size, -1).T.flat]


def split(mesh: Mesh) -> NamedSharding:
    """Of arrays with members in front."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def whole(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device has."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays on every device; where these have one memory, it holds them once."""
    if not _is_cpu(mesh):
        return jax.device_put(tree, whole(mesh))

    def one(x: jax.Array) -> jax.Array:
        seen = np.asarray(x)  # not a copy; nor are the devices' arrays, which only read it
        parts = [jax.device_put(seen, device, may_alias=True) for device in mesh.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, whole(mesh), parts)

    return jax.tree.map(one, tree)


def spread(
    function: Callable[..., Any],
    mesh: Mesh | None,
    *,
    common: Sequence[int],
    donate: Sequence[int] = (),
) -> Callable[..., Any]:
    """The jitted function, each device computing what it has of the members.

    All arguments but those numbered in `common`, and all results, have members in front. Without a
    mesh it is jitted and no more.
    """
    if mesh is None:
        return jax.jit(function, donate_argnums=donate)
    count = len(inspect.signature(function).parameters)
    shardings = [whole(mesh) if i in common else split(mesh) for i in range(count)]
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(sharding.spec for sharding in shardings),
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
    )
    return jax.jit(
        mapped,
        in_shardings=tuple(shardings),
        out_shardings=split(mesh),
        donate_argnums=donate,
        compiler_options=_options(mesh),
    )


def _options(mesh: Mesh) -> dict[str, Any] | None:
    """Where there is a device for every core, none of them is to use others."""
    is_full = mesh.size >= _cores()
    return {"xla_cpu_multi_thread_eigen": False} if _is_cpu(mesh) and is_full else None


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
