"""A sweep of eight runs against the same eight one by one: time from beginning to end, and where
it goes.

    python experiments/sweep_benchmark/run.py --data=../shared/data
    python experiments/sweep_benchmark/run.py --data=../shared/data --steps=4 --ranks=1,2

Four ranks of LoRA times two learning rates, MiniLM on TREC. Each way is one or more processes of
`lorax-ft`, first with an empty compilation cache and then with the one that it left. `--peer` is a
command that trains one such run in another framework, and takes `--rank --learning_rate --steps`
behind what is given:

    --peer="python experiments/methods/peer.py --data=DATA --model=MINILM --tasks=trec \
        --methods=lora --seeds=0 --output=/dev/null"

All ways have huge pages where the system gives them. Writes results.csv and results.md beside this
file.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import time

from absl import app, flags
from process import seconds_of, trec_flags

from lorax_ft import huge_pages

HERE = pathlib.Path(__file__).resolve().parent

_DATA = flags.DEFINE_string("data", "data", "folder with trec/")
_RUNS = flags.DEFINE_string("runs", "runs/sweep_benchmark", "where run directories go")
_STEPS = flags.DEFINE_integer("steps", 200, "of each run")
_RANKS = flags.DEFINE_list("ranks", ["1", "4", "16", "64"], "ranks of the grid")
_RATES = flags.DEFINE_list("rates", ["5e-4", "2e-3"], "learning rates of the grid")
_WAYS = flags.DEFINE_list("ways", ["sweep", "separate", "peer"], "what is timed")
_PEER = flags.DEFINE_string("peer", None, "command that trains one run in another framework")


def grid() -> list[tuple[int, float]]:
    return [
        (int(rank), float(rate)) for rank, rate in itertools.product(_RANKS.value, _RATES.value)
    ]


def common() -> list[str]:
    """Flags that both ways of ours have."""
    return trec_flags(_DATA.value, steps=_STEPS.value, eval_every=0)


def sweep(directory: pathlib.Path, cache: pathlib.Path) -> dict:
    """All runs as one program."""
    file = directory / "sweep.py"
    ranks, rates = ([kind(x) for x in f.value] for kind, f in ((int, _RANKS), (float, _RATES)))
    file.write_text(
        "from lorax_ft.sweeps import grid\n\n\ndef get_sweep():\n"
        f"    return grid({{'lora.rank': {ranks}, 'optimizer.learning_rate': {rates}}})\n"
    )
    where = [f"--sweep={file}", f"--sweep_dir={directory / 'sweep'}"]
    seconds = seconds_of(["sweep", *common(), *where], cache)
    return {"seconds": seconds, **training(sorted((directory / "sweep" / "runs").iterdir()))}


def separate(directory: pathlib.Path, cache: pathlib.Path) -> dict:
    """The same runs, a process each, one after the other."""
    seconds, folders = 0.0, []
    for rank, rate in grid():
        folders.append(directory / f"rank-{rank}-rate-{rate}")
        own = [f"--config.lora.rank={rank}", f"--config.optimizer.learning_rate={rate}"]
        seconds += seconds_of(["train", *common(), *own, f"--run_dir={folders[-1]}"], cache)
    return {"seconds": seconds, **training(folders)}


def peer() -> dict:
    """The same runs in another framework, a process each."""
    start = time.perf_counter()
    for rank, rate in grid():
        own = [f"--rank={rank}", f"--learning_rate={rate}", f"--steps={_STEPS.value}"]
        subprocess.run([*shlex.split(_PEER.value), *own], check=True)
    return {"seconds": time.perf_counter() - start, "training": None, "accuracy": None}


def training(folders: list[pathlib.Path]) -> dict:
    """Seconds within the loops (compiling and evaluating included), and the mean accuracy."""
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    accuracies = [result["metrics"]["test"]["accuracy"] for result in results]
    return {
        "training": sum(result["seconds"] for result in results),
        "accuracy": sum(accuracies) / len(accuracies),
    }


def measure() -> list[dict]:
    rows = []
    for way in _WAYS.value:
        if way == "peer":
            if _PEER.value:
                rows.append({"way": way, "cache": "none", **peer()})
            continue
        cache = pathlib.Path(_RUNS.value).absolute() / "cache" / way
        shutil.rmtree(cache, ignore_errors=True)
        for state in ("cold", "warm"):
            directory = pathlib.Path(_RUNS.value).absolute() / f"{way}-{state}"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            found = {"sweep": sweep, "separate": separate}[way](directory, cache)
            rows.append({"way": way, "cache": state, **found})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Times, and each as a share of separate runs with the same cache."""
    lines = ["| way | cache | seconds | in the loops | of separate runs | mean test accuracy |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    separate_ = {row["cache"]: row["seconds"] for row in rows if row["way"] == "separate"}
    for row in rows:
        base = separate_.get(row["cache"])
        cells = [
            row["way"],
            row["cache"],
            f"{row['seconds']:.1f}",
            "" if row["training"] is None else f"{row['training']:.1f}",
            "" if base is None else f"{row['seconds'] / base:.2f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    os.environ.setdefault("GLIBC_TUNABLES", huge_pages.TUNABLE)
    rows = measure()
    head = f"{len(grid())} runs of {_STEPS.value} steps, {os.cpu_count()} cores.\n\n"
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "results.md").write_text(head + table(rows))
    print(head + table(rows))


if __name__ == "__main__":
    app.run(main)
