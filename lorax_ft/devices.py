"""The table of devices: memory, peaks and bandwidths that plans and utilisations are reckoned with.

Peaks, capacities and bandwidths are the makers': NVIDIA's data sheets of the RTX A6000, A100, H100,
H200 and B200 and its white papers on GA102 and Ada, Google's system architecture pages of each TPU.
What else a compiler asks of a GPU is in XLA's own target configurations (`gpu_specs`), or else from
the maker too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_ft.trees import nearest

GIB = 2**30

# Of a GPU's memory, what a program can have: the driver and CUDA's context take the rest. JAX takes
# less by itself, and so much where XLA_PYTHON_CLIENT_MEM_FRACTION says so.
GPU_SHARE = 0.95
JAX_SHARE = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuCores:
    """What XLA's GPU compiler asks of a card beside its memory."""

    capability: tuple[int, int]
    feature_extension: str = "NONE"
    cores: int  # streaming multiprocessors
    fpus: int  # of a core
    threads: int  # of a core
    shared_memory: int  # bytes of a core
    shared_memory_optin: int  # bytes that one block may ask for
    l2: int  # bytes
    clock_ghz: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device as a program sees it: a card, or a chip (of TPU v7x one of a chip's two)."""

    kind: str  # "gpu", "tpu" or "cpu"
    title: str
    device_kinds: tuple[str, ...] = ()  # what `jax.Device.device_kind` calls it
    memory: int  # bytes
    reserved: int = 0  # bytes of it that the TPU's compiler, asked of each, gives to no program
    flops: float  # dense bfloat16 products, FLOP/s
    bandwidth: float  # of its memory, B/s
    link: float  # to its neighbours, all links together, one way, B/s
    gpu: GpuCores | None = None
    topologies: tuple[str, ...] = ()  # of TPUs, the smallest first: some that their compiler knows
    clock: float | None = None  # Hz, of a TPU's cycles: its peak over its products in a cycle

    @property
    def flops_per_cycle(self) -> float | None:
        return None if self.clock is None else self.flops / self.clock

    @property
    def usable(self) -> int:
        """The bytes that a program can have."""
        share = GPU_SHARE if self.kind == "gpu" else 1
        return int(self.memory * share) - self.reserved


_CONSUMER: Mapping[str, Any] = {
    "fpus": 128,
    "threads": 1536,
    "shared_memory": 102400,
    "shared_memory_optin": 101376,
}
_HOPPER: Mapping[str, Any] = {
    "fpus": 128,
    "threads": 2048,
    "shared_memory": 233472,
    "shared_memory_optin": 232448,
}
_A100 = GpuCores(
    capability=(8, 0),
    cores=108,
    fpus=64,
    threads=2048,
    shared_memory=167936,
    shared_memory_optin=166912,
    l2=41943040,
    clock_ghz=1.41,
)


def _hopper(capability: tuple[int, int], cores: int, l2: int, clock_ghz: float) -> GpuCores:
    return GpuCores(
        capability=capability,
        feature_extension="ACCELERATED_FEATURES",
        cores=cores,
        l2=l2,
        clock_ghz=clock_ghz,
        **_HOPPER,
    )


def _consumer(capability: tuple[int, int], cores: int, l2: int, clock_ghz: float) -> GpuCores:
    return GpuCores(capability=capability, cores=cores, l2=l2, clock_ghz=clock_ghz, **_CONSUMER)


DEVICES: Mapping[str, Device] = {
    "rtx-3070": Device(
        kind="gpu",
        title="NVIDIA GeForce RTX 3070 8 GB",
        device_kinds=("NVIDIA GeForce RTX 3070",),
        memory=8 * GIB,
        flops=40.6e12,
        bandwidth=448e9,
        link=32e9,  # PCIe 4
        gpu=_consumer((8, 6), 46, 4194304, 1.725),
    ),
    "rtx-4090": Device(
        kind="gpu",
        title="NVIDIA GeForce RTX 4090 24 GB",
        device_kinds=("NVIDIA GeForce RTX 4090",),
        memory=24 * GIB,
        flops=165.2e12,
        bandwidth=1008e9,
        link=32e9,  # PCIe 4
        gpu=_consumer((8, 9), 128, 75497472, 2.52),
    ),
    "a6000": Device(
        kind="gpu",
        title="NVIDIA RTX A6000 48 GB",
        device_kinds=("NVIDIA RTX A6000",),
        memory=51041271808,
        flops=155e12,
        bandwidth=768.096e9,
        link=32e9,  # PCIe 4; a bridge between two cards has 56 GB/s
        gpu=_consumer((8, 6), 84, 6291456, 1.8),
    ),
    "a100-40": Device(
        kind="gpu",
        title="NVIDIA A100 SXM 40 GB",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        memory=42331013120,
        flops=312e12,
        bandwidth=1555.2e9,
        link=300e9,
        gpu=_A100,
    ),
    "a100-80": Device(
        kind="gpu",
        title="NVIDIA A100 80 GB",
        device_kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        memory=85100068864,
        flops=312e12,
        bandwidth=2039.04e9,
        link=300e9,
        gpu=_A100,
    ),
    "h100": Device(
        kind="gpu",
        title="NVIDIA H100 SXM 80 GB",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        memory=84942979072,
        flops=989e12,
        bandwidth=3352.32e9,
        link=450e9,
        gpu=_hopper((9, 0), 132, 52428800, 1.98),
    ),
    "h100-pcie": Device(
        kind="gpu",
        title="NVIDIA H100 PCIe 80 GB",
        device_kinds=("NVIDIA H100 PCIe",),
        memory=84942979072,
        flops=756e12,
        bandwidth=2039.04e9,
        link=64e9,  # PCIe 5
        gpu=_hopper((9, 0), 114, 52428800, 1.755),
    ),
    "h200": Device(
        kind="gpu",
        title="NVIDIA H200 141 GB",
        device_kinds=("NVIDIA H200",),
        memory=151397597184,
        flops=989e12,
        bandwidth=4800e9,
        link=450e9,
        gpu=_hopper((9, 0), 132, 52428800, 1.98),
    ),
    "b200": Device(
        kind="gpu",
        title="NVIDIA B200 180 GB",
        device_kinds=("NVIDIA B200",),
        memory=191514411008,
        flops=2250e12,
        bandwidth=7672.32e9,
        link=900e9,
        gpu=_hopper((10, 0), 148, 132644864, 1.965),
    ),
    "tpu-v4": Device(
        kind="tpu",
        title="Google TPU v4",
        device_kinds=("TPU v4",),
        memory=32 * GIB,
        flops=275e12,
        bandwidth=1200e9,
        link=300e9,  # its compiler takes a chip's two cores apart, as programs do not: no topology
    ),
    "tpu-v5e": Device(
        kind="tpu",
        title="Google TPU v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        memory=16 * GIB,
        reserved=GIB // 4,
        flops=197e12,
        bandwidth=819e9,
        link=200e9,
        topologies=("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
        clock=1.5e9,
    ),
    "tpu-v5p": Device(
        kind="tpu",
        title="Google TPU v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        memory=96 * GIB,
        reserved=int(0.26 * GIB),
        flops=459e12,
        bandwidth=2765e9,
        link=600e9,
        topologies=("2x2x1", "2x2x2", "2x2x4", "4x4x4", "8x8x8"),
        clock=1.75e9,
    ),
    "tpu-v6e": Device(
        kind="tpu",
        title="Google TPU v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        memory=32 * GIB,
        reserved=GIB * 3 // 4,
        flops=918e12,
        bandwidth=1638e9,
        link=400e9,
        topologies=("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
        clock=1.75e9,
    ),
    "tpu7x": Device(
        kind="tpu",
        title="Google TPU v7x (one of a chip's two devices)",
        device_kinds=("TPU7x",),
        memory=96 * GIB,
        reserved=GIB * 5 // 4,
        flops=1153.5e12,
        bandwidth=3690e9,
        link=300e9,
        topologies=("2x2x1", "2x2x2", "4x4x4"),
    ),
}


def find_device(name: str) -> Device:
    """The device of that name in the table. Raises ValueError naming those it has."""
    if name not in DEVICES:
        near = nearest(name, DEVICES, limit=1)
        hint = f" Nearest: {near[0]}." if near else ""
        raise ValueError(
            f"--device={name}: the table has no such device, only {', '.join(DEVICES)} and cpu."
            f"{hint}"
        )
    return DEVICES[name]


def by_device_kind() -> dict[str, Device]:
    """The devices by what `jax.Device.device_kind` calls them."""
    return {kind: device for device in DEVICES.values() for kind in device.device_kinds}
