"""Huge pages for the arrays of a process that computes on a CPU, which Linux gives when asked.

XLA allocates what a step needs anew each time, and the kernel then clears it page by page: with
pages of 4 KiB that was a fifth to a third of a small BERT's training step. glibc asks for pages of
2 MiB where its tunable `glibc.malloc.hugetlb` says so, which it reads when a process starts and
never again.
"""

from __future__ import annotations

import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence

TUNABLE = "glibc.malloc.hugetlb=1"
MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd")  # in /dev: NVIDIA, TPU, TPU, AMD


def restart() -> None:
    """Starts this process's command anew with huge pages, if they would be of use to it.

    Says so on stderr. Does nothing where it was done, where an accelerator computes, and where
    the system has no such pages to give or gives them to everyone.
    """
    if not would_help(os.environ, libc=platform.libc_ver(), mode=_mode(), devices=_devices()):
        return
    tunables = [os.environ.get("GLIBC_TUNABLES"), TUNABLE]
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, tunables))
    print(
        f"Started again with GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}, since steps on this "
        "CPU are faster with huge pages; --nohuge_pages leaves it as it is.",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def would_help(
    environment: Mapping[str, str],
    *,
    libc: tuple[str, str],
    mode: str,
    devices: Sequence[str] = (),
) -> bool:
    """Whether a process with this environment should ask for huge pages and does not yet.

    `libc` is its (name, version), `mode` the kernel's setting, with the choice in brackets, and
    `devices` are the machine's accelerators.
    """
    name, version = libc
    knows_tunable = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    platforms = environment.get("JAX_PLATFORMS", "")
    on_cpu = platforms == "cpu" or (not platforms and not devices)
    is_set = "glibc.malloc.hugetlb" in environment.get("GLIBC_TUNABLES", "")
    return knows_tunable and on_cpu and "[madvise]" in mode and not is_set


def _mode() -> str:
    try:
        return MODE.read_text()
    except OSError:
        return ""


def _devices() -> list[str]:
    found = [path for pattern in ACCELERATORS for path in pathlib.Path("/dev").glob(pattern)]
    return [str(path) for path in found]
