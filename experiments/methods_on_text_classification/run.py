"""LoRA, QLoRA, full fine-tuning and the head alone on TREC and CoLA: every run, one table, one
figure.

    python experiments/methods_on_text_classification/run.py --data=../shared/data --seeds=0,1,2

Each run is `lorax-ft train` with a config of `configs/`. One that has a row in results.csv is not
run again (delete the row for that), one that was stopped goes on. Writes results.csv, results.md
and results.png beside this file.
"""

from __future__ import annotations

import csv
import itertools
import json
import pathlib
import statistics
import subprocess
import sys

from absl import app, flags

HERE = pathlib.Path(__file__).resolve().parent
METHODS = ("head", "full", "lora", "qlora")
SOURCES = {
    "trec": {"train": "trec/train_5500.label", "test": "trec/TREC_10.label"},
    "cola": {"train": "cola/train.tsv", "validation": "cola/dev.tsv"},
}
SCORES = {"trec": ("test", "accuracy"), "cola": ("validation", "matthews")}

# transformers + PEFT on the same data and settings, one seed each; floors without fine-tuning.
PEERS = {
    "trec": {"head": 0.584, "full": 0.970, "lora": 0.956},
    "cola": {"full": 0.264, "lora": 0.288},
}
FLOORS = {
    "trec": ("TF-IDF + logistic regression", 0.882),
    "cola": ("TF-IDF + logistic regression", 0.152),
}

_DATA = flags.DEFINE_string("data", "data", "folder with trec/ and cola/")
_RUNS = flags.DEFINE_string("runs", "runs/methods", "where run directories go")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of every method")
_TASKS = flags.DEFINE_list("tasks", list(SOURCES), "which tasks")
_ONLY_REPORT = flags.DEFINE_bool("only_report", False, "make the table of what is finished")


def train(task: str, method: str, seed: int) -> None:
    """Runs one training in a process of its own."""
    directory = pathlib.Path(_RUNS.value) / f"{task}-{method}-{seed}"
    command = [
        sys.executable,
        "-c",
        "import sys; from lorax_ft.cli import main; sys.exit(main())",
        "train",
        f"--config=configs/{task}.py:{method}",
        f"--config.seed={seed}",
        "--config.train.tensorboard=false",
        "--config.baseline=false",
        f"--run_dir={directory}",
    ]
    for part, path in SOURCES[task].items():
        command.append(f"--config.data.source.{part}={pathlib.Path(_DATA.value) / path}")
    subprocess.run(command, check=True)


def read(directory: pathlib.Path, task: str) -> dict[str, float] | None:
    """What the table needs of a finished run."""
    path = directory / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    part, metric = SCORES[task]
    return {
        "score": results["metrics"][part][metric],
        "trainable": results["parameters"]["trainable"],
        "bytes": results["parameters"]["bytes"],
        "steps": results["step"],
        "seconds": results["seconds"],
    }


def key(row: dict) -> tuple[str, str, int]:
    """Which run a row is of."""
    return row["task"], row["method"], row["seed"]


def recorded() -> list[dict]:
    """The rows that results.csv has."""
    path = HERE / "results.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {k: v if k in ("task", "method") else json.loads(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def collect(seeds: list[int]) -> list[dict]:
    """A row for every finished run: of results.csv, and of what is finished among the run
    directories.
    """
    found = {key(row): row for row in recorded()}
    for task, method, seed in itertools.product(SOURCES, METHODS, seeds):
        row = read(pathlib.Path(_RUNS.value) / f"{task}-{method}-{seed}", task)
        if row:
            found[task, method, seed] = {"task": task, "method": method, "seed": seed, **row}
    order = list(itertools.product(SOURCES, METHODS))
    return sorted(found.values(), key=lambda row: (order.index(key(row)[:2]), row["seed"]))


def table(rows: list[dict]) -> str:
    """Means over seeds in Markdown, the peer's figure and the floor beside them."""
    lines = [
        "| task | method | trainable | parameters, MB | metric | mean ± deviation (seeds) | peer |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for task in SOURCES:
        for method in METHODS:
            chosen = [r for r in rows if (r["task"], r["method"]) == (task, method)]
            if not chosen:
                continue
            scores = [r["score"] for r in chosen]
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            peer = PEERS[task].get(method)
            first = chosen[0]
            lines.append(
                f"| {task} | {method} | {first['trainable']:,} | {first['bytes'] / 1e6:.1f} "
                f"| {SCORES[task][1]} | {statistics.mean(scores):.3f}{spread} ({len(scores)}) "
                f"| {'' if peer is None else f'{peer:.3f}'} |"
            )
        if any(r["task"] == task for r in rows):
            name, floor = FLOORS[task]
            lines.append(f"| {task} | {name} | | | {SCORES[task][1]} | {floor} | |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Each run a point, each method a column."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in SOURCES if any(r["task"] == task for r in rows)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for column, method in enumerate(METHODS):
            scores = [r["score"] for r in rows if (r["task"], r["method"]) == (task, method)]
            axis.scatter([column] * len(scores), scores, color="C0")
            if method in PEERS[task]:
                axis.scatter([column], [PEERS[task][method]], color="C1", marker="x")
        axis.axhline(FLOORS[task][1], color="grey", linestyle=":", label=FLOORS[task][0])
        axis.set_xticks(range(len(METHODS)), METHODS)
        axis.set_title(f"{task}: {SCORES[task][1]} (dots: seeds; crosses: PEFT, one seed)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    seeds = [int(seed) for seed in _SEEDS.value]
    done = {key(row) for row in collect(seeds)}
    for seed, task, method in itertools.product(seeds, _TASKS.value, METHODS):
        if (task, method, seed) not in done and not _ONLY_REPORT.value:
            train(task, method, seed)
    rows = collect(seeds)
    if not rows:
        raise app.UsageError(f"no run in {_RUNS.value} is finished")
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "results.md").write_text(table(rows))
    plot(rows, HERE / "results.png")
    print(table(rows))


if __name__ == "__main__":
    app.run(main)
