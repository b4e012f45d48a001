"""A search with successive halving against the whole grid: how much sooner, and how good its best.

    python experiments/sweep_benchmark/search.py --data=../shared/data --seeds=0,1,2

MiniLM on TREC, LoRA at four ranks times eight learning rates. The grid trains all 32 runs to their
end; the search begins the same 32, in an order that the seed shuffles, and after a sixteenth and a
fourth of their steps evaluates them and lets the best quarter go on. Both choose by validation, and
what they chose is compared on the test questions. Writes search.csv and search.md beside this file.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pathlib
import resource
import shutil
import statistics
from typing import Any

from absl import app, flags
from process import seconds_of, trec_flags

from lorax_ft import huge_pages

HERE = pathlib.Path(__file__).resolve().parent
SWEEP = """import random

from lorax_ft.sweeps import Halving, SweepConfig, grid


def get_sweep():
    runs = grid({{"lora.rank": {ranks}, "optimizer.learning_rate": {rates}, "seed": [{seed}]}})
    random.Random({seed}).shuffle(runs)
    # No run is ended for answering one class: in its first steps each does.
    return SweepConfig(runs=runs, slots=8, collapse_patience=None, halving={halving})
"""
RATES = [1.25e-4 * 2**i for i in range(8)]
QUESTIONS = 500  # of the test split

_DATA = flags.DEFINE_string("data", "data", "folder with trec/")
_RUNS = flags.DEFINE_string("runs", "runs/search_benchmark", "where sweep directories go")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "of the runs, and of their order")
_STEPS = flags.DEFINE_integer("steps", 96, "of a run that goes to its end; a multiple of 16")
_RANKS = flags.DEFINE_list("ranks", ["2", "4", "8", "16"], "ranks of the grid")


def run(way: str, seed: int, *more: str) -> dict[str, Any]:
    """One sweep as a process: its seconds, its steps, and what it chose."""
    directory = pathlib.Path(_RUNS.value).absolute() / f"{way}-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    halving = f"Halving(first={_STEPS.value // 16}, factor=4)" if way == "search" else None
    ranks = [int(rank) for rank in _RANKS.value]
    file = directory / "sweep.py"
    file.write_text(SWEEP.format(ranks=ranks, rates=RATES, seed=seed, halving=halving))
    arguments = ["sweep", *trec_flags(_DATA.value, steps=_STEPS.value, eval_every=0)]
    arguments += [f"--sweep={file}", f"--sweep_dir={directory / 'sweep'}", *more]
    before = _processor_seconds()
    seconds = seconds_of(arguments, directory.parent / "cache")
    if more:
        return {}
    processor = _processor_seconds() - before
    return {"seconds": seconds, "processor_seconds": processor, **chosen(directory / "sweep")}


def _processor_seconds() -> float:
    """What ended child processes used so far; other work on the machine hardly changes it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def chosen(directory: pathlib.Path) -> dict[str, Any]:
    """All steps of a sweep's runs, and the run that validation chooses."""
    results = {
        path.name: json.loads((path / "results.json").read_text())
        for path in sorted((directory / "runs").iterdir())
    }
    ended = {name: r for name, r in results.items() if r["outcome"] == "finished"}
    if not ended:
        raise RuntimeError(f"{directory}: no run went to its end: {sorted(results)}")
    best = max(ended, key=lambda name: ended[name]["metrics"]["validation"]["accuracy"])
    return {
        "steps": sum(r["step"] for r in results.values()),
        "finished": len(ended),
        "chosen": best.partition("-")[2],
        "validation": ended[best]["metrics"]["validation"]["accuracy"],
        "test": ended[best]["metrics"]["test"]["accuracy"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Both ways by seed, and the search as a share of the grid."""
    head = "| seed | way | seconds | steps | to the end | chosen | validation | test |"
    lines = [head, "|---|---|---:|---:|---:|---|---:|---:|"]
    for row in rows:
        cells = [row["seed"], row["way"], f"{row['seconds']:.0f}", row["steps"], row["finished"]]
        cells += [row["chosen"], f"{row['validation']:.3f}", f"{row['test']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    pairs = [
        [
            next(r for r in rows if (r["seed"], r["way"]) == (seed, way))
            for way in ("search", "grid")
        ]
        for seed in sorted({row["seed"] for row in rows})
    ]
    for name in ("seconds", "processor_seconds", "steps"):
        shares = [search[name] / grid[name] for search, grid in pairs]
        unit = name.replace("_", " ")
        lines.append(f"\nThe search took {statistics.mean(shares):.2f} of the grid's {unit}.")
    differences = [search["test"] - grid["test"] for search, grid in pairs]
    accuracy = statistics.mean(grid["test"] for _, grid in pairs)
    noise = math.sqrt(2 * accuracy * (1 - accuracy) / QUESTIONS)
    lines.append(
        f"\nTest accuracy of what it chose, less that of the grid's choice: "
        f"{statistics.mean(differences):+.4f} on average "
        f"({', '.join(f'{d:+.3f}' for d in differences)}); two scores of {accuracy:.3f} on "
        f"{QUESTIONS} questions differ by {noise:.3f} (one standard deviation) by chance."
    )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    os.environ.setdefault("GLIBC_TUNABLES", huge_pages.TUNABLE)
    seeds = [int(seed) for seed in _SEEDS.value]
    run("grid", seeds[0], "--only_plan")  # fills the cache, of which both ways then have as much
    rows = []
    for seed in seeds:
        for way in ("grid", "search"):
            rows.append({"seed": seed, "way": way, **run(way, seed)})
            print(rows[-1], flush=True)
    with (HERE / "search.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    head = f"{len(_RANKS.value) * len(RATES)} runs of {_STEPS.value} steps, 8 at a time.\n\n"
    (HERE / "search.md").write_text(head + table(rows))
    print(head + table(rows))


if __name__ == "__main__":
    app.run(main)
