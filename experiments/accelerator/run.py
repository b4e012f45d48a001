"""Steps of LoRA and QLoRA on one accelerator, beside another framework's, beside their plans.

    python experiments/accelerator/run.py --output=results.csv
    python experiments/accelerator/run.py --smoke --output=/tmp/smoke.csv

Each part is a process with a time limit of its own, one after another on the device, those of most
value first; what needs no device runs beside them. A part writes its rows as it goes. One that
fails is told and the others go on. `--smoke` is the same on tiny shapes, for a CPU.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags
from common import BEGUN, read_rows, write_row
from report import text

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ("lora", "qlora", "peer_lora", "peer_qlora", "members")
PEER_VARIANTS = "checkpointing,none,none:2"  # the second needs more than 80 GB

_OUTPUT = flags.DEFINE_string("output", None, "the table, begun anew", required=True)
_PARTS = flags.DEFINE_list("parts", [*PARTS, "plan"], "which, in this order")
_SECONDS = flags.DEFINE_float("seconds", 300, "for all parts together")
_PEER = flags.DEFINE_string("peer_python", sys.executable, "Python of the other framework")
_CARD = flags.DEFINE_string("card", "", "of the plan: as of lorax-ft plan; this one where empty")
_SMOKE = flags.DEFINE_bool("smoke", False, "tiny shapes")
_CACHE = flags.DEFINE_string(
    "cache", f"{tempfile.gettempdir()}/lorax_ft_accelerator", "folder of compiled programs"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A process, and how long it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def part(name: str) -> Part:
    """How a part is run."""
    output = f"--output={_OUTPUT.value}"
    tiny = ["--model=tiny", "--rows=2", "--length=64"] if _SMOKE.value else []
    few = ["--steps=2"] if _SMOKE.value else []
    if name in ("lora", "qlora"):
        variants = "full,products" if name == "qlora" else "full,products,none,products+mask"
        words = [sys.executable, "ours.py", f"--method={name}", f"--variants={variants}"]
        return Part(name, (*words, *tiny, *few, output), 150)
    if name in ("peer_lora", "peer_qlora"):
        method = name.removeprefix("peer_")
        words = [_PEER.value, "peer.py", f"--method={method}", f"--variants={PEER_VARIANTS}"]
        return Part(name, (*words, *tiny, *few, output), 100)
    if name == "members":
        words = [sys.executable, "members.py", "--remat=products"]
        words.append("--members=1,2" if _SMOKE.value else "--members=1,16,4,2,8,32")
        return Part(name, (*words, *tiny, *few, output), 150)
    if name == "plan":
        cases = "lora:full,lora:products,lora:none,qlora:full,qlora:products"
        cases = "lora:full" if _SMOKE.value else cases
        words = [sys.executable, "planned.py", f"--cases={cases}", f"--device={card()}"]
        return Part(name, (*words, *tiny, output), 200)
    raise app.UsageError(f"--parts: {name!r} is none of {', '.join((*PARTS, 'plan'))}")


def card() -> str:
    """The card to plan for, by what the driver calls the one that is here."""
    if _CARD.value or _SMOKE.value:
        return _CARD.value or "cpu"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    from lorax_ft.devices import DEVICES  # its import loads JAX, but no device

    kinds = {kind: key for key, device in DEVICES.items() for kind in device.device_kinds}
    if name not in kinds:
        raise app.UsageError(
            f"--card: the table of devices has no {name!r}. Say which to plan for."
        )
    return kinds[name]


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        BEGUN: str(time.time()),
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": _CACHE.value,  # what was tuned for one part serves the next
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".93",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def log_of(name: str) -> pathlib.Path:
    return pathlib.Path(_OUTPUT.value).with_name(f"{name}.log")


def start(one: Part) -> subprocess.Popen:
    with log_of(one.name).open("w") as log:
        return subprocess.Popen(
            one.command, cwd=HERE, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )


def finish(one: Part, process: subprocess.Popen, seconds: float) -> None:
    """Waits for a part, ends it when its time is over, and says what came of it."""
    begun = time.perf_counter()
    try:
        code = process.wait(timeout=max(seconds, 1))
        reason = None if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        reason = f"stopped after {seconds:.0f} s"
    took = time.perf_counter() - begun
    print(f"{one.name}: {reason or 'done'}, {took:.0f} s", flush=True)
    if reason is not None:
        lines = [line for line in log_of(one.name).read_text().splitlines() if line.strip()]
        print("\n".join(lines[-12:]), flush=True)
        last = lines[-1] if lines else "it printed nothing"
        if reason.startswith("failed"):
            reason = f"{reason}: {last[:200]}"
        write_row(_OUTPUT.value, {"part": one.name, "note": reason})


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    begun, slower = time.perf_counter(), 10 if _SMOKE.value else 1
    output = pathlib.Path(_OUTPUT.value).resolve()
    flags.FLAGS.output = str(output)  # parts run elsewhere
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    parts = [part(name) for name in _PARTS.value]

    def left() -> float:
        return slower * _SECONDS.value - (time.perf_counter() - begun)

    # The other framework's libraries come from a cold disk while ours compiles; and plans, too,
    # want processors alone.
    beside = [(one, start(one)) for one in parts if one.name == "plan"]
    imports = [_PEER.value, "-c", "import torch, transformers, peft, transformers.models.llama"]
    warm = subprocess.Popen(imports, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for one in parts:
        if one.name == "plan":
            continue
        if left() < 10 * slower:
            print(f"{one.name}: left out, the {_SECONDS.value:.0f} s are over", flush=True)
            continue
        finish(one, start(one), min(slower * one.seconds, left()))
    for one, process in beside:
        finish(one, process, min(slower * one.seconds, max(left(), 20)))
    warm.kill()
    warm.wait()
    print(f"\n{text(read_rows(str(output)))}\n{time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    app.run(main)
