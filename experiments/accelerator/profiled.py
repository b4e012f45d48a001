"""What the device did in a step, by operation: from a trace of JAX's profiler."""

from __future__ import annotations

import collections
import csv
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax

# Kernels of GPUs by their names; the first that is found says what it is.
KINDS = {
    "attention": r"sdpa|fmha|flash",
    "product": r"nvjet|gemm|cutlass|cublas|splitK|\bdot",
    "copy": r"memcpy|memset|copy|transpose",
    "reduction": r"reduce",
    "elementwise": r"fusion|wrapped|loop|input|select|slice|concatenate",
}


def profile(run: Callable[[], object], steps: int, path: str) -> None:
    """Writes a table of the operations of a step, by a run of so many; prints the sums of kinds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        seconds, calls, sources = _sums(next(pathlib.Path(folder).rglob("*.xplane.pb")))
    kinds: collections.Counter[str] = collections.Counter()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "kernel", "milliseconds", "calls", "operation"])
        for name, total in seconds.most_common():
            kind = next((kind for kind, text in KINDS.items() if re.search(text, name)), "other")
            kinds[kind] += total / steps
            row = kind, name[:90], f"{1e3 * total / steps:.3f}", calls[name] / steps
            writer.writerow([*row, sources[name][-140:]])
    told = ", ".join(f"{kind} {1e3 * total:.1f}" for kind, total in kinds.most_common())
    print(f"milliseconds of a step: {told}; of all {1e3 * kinds.total():.1f}", flush=True)


def _sums(
    path: pathlib.Path,
) -> tuple[collections.Counter[str], collections.Counter[str], dict[str, str]]:
    """(seconds, calls, where in the program) of each of the device's operations."""
    seconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    sources: dict[str, str] = {}
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")] or planes
    for plane in devices[:1] if devices is not planes else devices:
        for line in plane.lines:
            if devices is not planes and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = {key: value for key, value in event.stats if key is not None}
                if "hlo_op" not in stats:
                    continue
                name = f"{stats['hlo_op']} {event.name}"
                seconds[name] += event.duration_ns / 1e9
                calls[name] += 1
                sources[name] = str(stats.get("tf_op", stats.get("name", "")))
    return seconds, calls, sources
