"""Targets: from the name of a device to devices that compile and hold nothing.

XLA's compilers for TPUs and GPUs need no such hardware, only a description of it. What JAX calls
these descriptions is kept here (0.10 to 0.12 agree).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from lorax_ft.devices import Device, find_device

# What libtpu asks the cloud or its own machine for, and here is neither.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held, so nobody need wait for one
}
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
EXTRAS = {"tpu": "libtpu", "gpu": "jax's CUDA plugin"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """So many devices of one kind; `device` is None for CPUs, whose memory is this machine's."""

    name: str  # as it was asked for
    device: Device | None
    count: int
    topology: str | None = None  # of TPUs: how their chips are wired

    @property
    def kind(self) -> str:
        return "cpu" if self.device is None else self.device.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiler:
    """Devices to compile for, and whose compiler it is; `stands_in` says why it is not theirs."""

    name: str
    devices: tuple[Any, ...]
    stands_in: str | None = None


def parse_target(text: str) -> Target:
    """The target that `--device` names: `a6000`, `h100:8`, `tpu-v5e:4x4`, `cpu:2`.

    A TPU without a topology is one chip. Raises ValueError for a device that the table does not
    have and for a number or a topology that cannot be.

    >>> parse_target("h100:8").count, parse_target("tpu-v5e:4x4").count
    (8, 16)
    """
    name, colon, size = text.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*" if colon else "", size):
        raise ValueError(
            f"--device={text}: expected a number of devices after the colon, as in h100:8, or the "
            "topology of TPUs, as in tpu-v5e:4x4."
        )
    device = None if name == "cpu" else find_device(name)
    if device is None or device.kind == "gpu":
        if "x" in size:
            raise ValueError(
                f"--device={text}: {size} is a topology, and only TPUs have one. Expected a number."
            )
        return Target(name=text, device=device, count=int(size or 1))
    if not device.topologies:
        raise ValueError(f"--device={text}: the table has its peak alone, and no plan can be made.")
    if "x" not in size and int(size or 1) != 1:
        raise ValueError(
            f"--device={text}: how are {size} chips wired? Expected a topology, such as "
            f"{', '.join(f'{name}:{t}' for t in device.topologies)}."
        )
    axes = len(device.topologies[0].split("x"))
    if "x" in size and len(size.split("x")) != axes:
        raise ValueError(
            f"--device={text}: the chips of a {device.title} are wired in {axes} dimensions, as in "
            f"{', '.join(device.topologies)}."
        )
    if "x" not in size:
        return Target(name=text, device=device, count=1, topology=device.topologies[0])
    chips = math.prod(map(int, size.split("x")))
    return Target(name=text, device=device, count=chips * _per_chip(name), topology=size)


def prepare_process(target: Target) -> None:
    """Lets this process stand in for a target: to be called before JAX meets its own devices.

    Plans need no accelerator, and take none that is here from those who use it.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver is asked
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # no device, no reading back
    if target.count > 1 and (target.kind == "cpu" or missing(target)):
        jax.config.update("jax_num_cpu_devices", target.count)


def missing(target: Target) -> str | None:
    """Why the target's own compiler cannot be asked, in a sentence; None where it can."""
    if target.kind == "cpu":
        return None
    names = ("libtpu",) if target.kind == "tpu" else _CUDA_PLUGINS
    if any(map(_is_installed, names)) or (target.kind == "tpu" and os.getenv("TPU_LIBRARY_PATH")):
        return None
    extra = {"tpu": "tpu", "gpu": "cuda"}[target.kind]
    return (
        f"{EXTRAS[target.kind]} is not installed (pip install 'lorax_ft[{extra}]'), so this "
        "machine's own compiler stands in: counts of arrays are exact, temporaries are not the "
        "target's"
    )


def compiler(target: Target) -> Compiler:
    """Whom to ask about a target: its own compiler, or this machine's where that is missing.

    Raises ValueError where the compiler does not know the topology, or this machine's has too few
    devices to stand in.
    """
    if target.kind == "cpu" or (reason := missing(target)):
        reason = None if target.kind == "cpu" else reason
        return Compiler(name="XLA for CPU", devices=_cpus(target), stands_in=reason)
    if target.kind == "tpu":
        return Compiler(name=f"XLA for TPU, libtpu {_version('libtpu')}", devices=_tpus(target))
    return Compiler(name="XLA for GPU, without a device to tune on", devices=_gpus(target))


def target_config(target: Target) -> str:
    """XLA's `GpuTargetConfigProto` of a card, as text."""
    device = target.device
    assert device is not None
    gpu = device.gpu
    assert gpu is not None
    major, minor = gpu.capability
    capability = {"major": major, "minor": minor, "feature_extension": gpu.feature_extension}
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_memory,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(device.bandwidth),
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": device.memory,
        "shared_memory_per_block_optin": gpu.shared_memory_optin,
        "cuda_compute_capability": capability,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "compile_time_toolkit_version": '"13.0.0"',
    }
    return _text_proto(
        {
            "gpu_device_info": info,
            "platform_name": '"CUDA"',
            "dnn_version_info": {"major": 9, "minor": 10, "patch": 0},
            "device_description_str": f'"{device.title}"',
        }
    )


def _text_proto(fields: dict[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in fields.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name} {{\n{_text_proto(value, indent + '  ')}{indent}}}\n")
        else:
            lines.append(f"{indent}{name}: {value}\n")
    return "".join(lines)


def _tpus(target: Target) -> tuple[Any, ...]:
    from jax.experimental import topologies

    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = f"{target.name.partition(':')[0].removeprefix('tpu-')}:{target.topology}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # the compiler's own, of a type that JAX does not export everywhere
        assert target.device is not None
        raise ValueError(
            f"--device={target.name}: the TPU compiler knows no topology {name}; some that it "
            f"knows: {', '.join(target.device.topologies)}. It says: {_first_line(error)}"
        ) from error
    return _taken(target, found.devices)


def _gpus(target: Target) -> tuple[Any, ...]:
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.name.partition(":")[0],
        target_config=target_config(target),
        topology=f"1x1x{target.count}",
    )
    return _taken(target, found.devices)


def _cpus(target: Target) -> tuple[Any, ...]:
    devices = jax.devices("cpu")
    if len(devices) < target.count:
        raise ValueError(
            f"--device={target.name}: {target.count} devices are wanted of this machine's "
            f"compiler, and this process has {len(devices)}. Set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={target.count} before it starts."
        )
    return tuple(devices[: target.count])


def _taken(target: Target, devices: Sequence[Any]) -> tuple[Any, ...]:
    if len(devices) < target.count:
        raise ValueError(
            f"--device={target.name}: {target.count} devices were expected of it, and its compiler "
            f"has {len(devices)}."
        )
    return tuple(devices[: target.count])


def _per_chip(name: str) -> int:
    """How many devices a chip is to a program."""
    return 2 if name == "tpu7x" else 1


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
