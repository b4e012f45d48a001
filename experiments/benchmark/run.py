"""Training steps of LoRA, QLoRA and full fine-tuning, beside another framework's where it is given.

    python experiments/benchmark/run.py
    python experiments/benchmark/run.py --peer_python=PEER/bin/python --peer_script=train_step.py

`--peer_script` takes `--model --method --targets --batch --seq --steps` and prints a JSON object as
`step.py` does. The two run by turns, never together; ratios are of medians over `--rounds`.
`roofline` is the share of our step, `peer_roofline` of the other's, that the arithmetic of our
matrix products would take at the best rate for large ones that any case saw this machine at. Writes
results.csv and results.md beside this file. With `--remat` both compute layers again in the
backward pass, the other by its `--grad-ckpt`, and the tables are remat.csv and remat.md.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

from absl import app, flags

HERE = pathlib.Path(__file__).resolve().parent
CASES = [
    (model, method, targets)
    for model in ("minilm", "bert", "llama")
    for method, targets in (
        ("lora", "default"),
        ("lora", "all-linear"),
        ("qlora", "all-linear"),
        ("full", "default"),
    )
]

_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Python of the other framework")
_PEER_SCRIPT = flags.DEFINE_string("peer_script", None, "script that times its step")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "times that each case is run, by turns")
_STEPS = flags.DEFINE_integer("steps", 6, "timed steps of a run")
_BATCH = flags.DEFINE_integer("batch", 8, "rows")
_LENGTH = flags.DEFINE_integer("length", 128, "tokens a row")
_MODELS = flags.DEFINE_list("models", ["minilm", "bert", "llama"], "which shapes")
_REMAT = flags.DEFINE_bool("remat", False, "both compute layers again in the backward pass")
_METHODS = flags.DEFINE_list("methods", ["lora", "qlora", "full"], "which methods")
_HUGE_PAGES = flags.DEFINE_bool("huge_pages", True, "glibc's huge pages, for both frameworks")


def run(command: list[str], folder: str | None = None) -> dict:
    """Runs a process and reads the JSON object in the last line that it prints."""
    environment = dict(os.environ)
    if _HUGE_PAGES.value:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=environment, text=True, cwd=folder
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(model: str, method: str, targets: str) -> dict:
    options = {"batch": _BATCH.value, "length": _LENGTH.value, "steps": _STEPS.value}
    flags_ = [f"--{name}={value}" for name, value in options.items()]
    case = [f"--model={model}", f"--method={method}", f"--targets={targets}"]
    case += ["--remat=full", "--scan_layers"] if _REMAT.value else []
    return run([sys.executable, str(HERE / "step.py"), *case, *flags_])


def peer(model: str, method: str, targets: str) -> dict | None:
    if not (_PEER_PYTHON.value and _PEER_SCRIPT.value):
        return None
    options = {"batch": _BATCH.value, "seq": _LENGTH.value, "steps": _STEPS.value}
    flags_ = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    case = ["--model", model, "--method", method, "--targets", targets]
    case += ["--grad-ckpt"] if _REMAT.value else []
    python, script = (os.path.abspath(flag.value) for flag in (_PEER_PYTHON, _PEER_SCRIPT))
    with tempfile.TemporaryDirectory() as folder:  # for what it may leave behind
        return run([python, script, *case, *flags_], folder)


def measure(model: str, method: str, targets: str) -> dict:
    """One row: medians over rounds in which the two take turns."""
    case = (model, method, targets)
    rounds = [(ours(*case), peer(*case)) for _ in range(_ROUNDS.value)]
    mine, other = [r[0] for r in rounds], [r[1] for r in rounds if r[1]]

    def median(runs: list[dict], name: str) -> float:
        return round(statistics.median(run[name] for run in runs), 1)

    row = {
        "model": model,
        "method": method,
        "targets": targets,
        "trainable": mine[0]["trainable_params"],
        "step_ms": median(mine, "step_ms_median"),
        "tokens_per_s": median(mine, "tokens_per_s"),
        "compile_s": median(mine, "compile_s"),
        "peak_mb": median(mine, "steps_peak_rss_mb"),
        "gflop": mine[0]["gflop"],
        "product_gflops": max(run["product_gflops"] for run in mine),
    }
    if other:
        row["peer_step_ms"] = median(other, "step_ms_median")
        row["peer_peak_mb"] = median(other, "steps_peak_rss_mb")
        row["speed"] = round(row["peer_step_ms"] / row["step_ms"], 2)
        row["memory"] = round(row["peak_mb"] / row["peer_peak_mb"], 2)
    return row


def add_rooflines(rows: list[dict]) -> None:
    """Says of each step what share of it its products would take at the best rate of all cases."""
    best = max(row["product_gflops"] for row in rows)
    for row in rows:
        for name in ("", "peer_"):
            if step := row.get(f"{name}step_ms"):
                row[f"{name}roofline"] = round(1e3 * row["gflop"] / best / step, 2)


def table(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    rows = []
    for case in CASES:
        if case[0] in _MODELS.value and case[1] in _METHODS.value:
            rows.append(measure(*case))
            print(rows[-1], flush=True)
    add_rooflines(rows)
    head = (
        f"{processor()}, batch {_BATCH.value}, length {_LENGTH.value}, float32; speed and memory "
    )
    head += "are ratios to the peer's: more speed is better, less memory is better.\n\n"
    name = "remat" if _REMAT.value else "results"
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (HERE / f"{name}.md").write_text(head + table(rows))
    print(table(rows))


def processor() -> str:
    """The processor's name, its cores and the widest of its vector units that matter here."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((x.split(": ", 1)[1] for x in text.splitlines() if x.startswith("model name")), "")
    units = [u for u in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if u in text]
    return f"{name}, {os.cpu_count()} cores, {units[0] if units else 'no AVX2'}"


if __name__ == "__main__":
    app.run(main)
