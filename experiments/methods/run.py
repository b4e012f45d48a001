"""Methods side by side on TREC and CoLA: every run, one table, one figure.

    python experiments/methods/run.py --data=DATA --seeds=0,1,2

Each run is `lorax-ft train` with a config of `configs/`, which lists the methods. One that has a
row in results.csv is not run again (delete the row for that), one that was stopped goes on. Writes
results.csv, results.md and results.png beside this file; the table has what cost.py measured too,
and what the methods reach by ../sweeps, each at its own best learning rate.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
import runpy
import statistics
import subprocess
import sys

from absl import app, flags

HERE = pathlib.Path(__file__).resolve().parent
CONFIGS = HERE.parent.parent / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A config's data, what its runs are judged by, and what others reach."""

    part: str
    metric: str
    sources: dict[str, str]  # parts of the data to files of --data
    peers: dict[str, float]  # transformers + PEFT on the same data and settings, of seed 0
    floor: tuple[str, float]  # what is reached without fine-tuning


TFIDF = "TF-IDF + logistic regression"
TASKS = {  # by the name of their config
    "trec": Task(
        part="test",
        metric="accuracy",
        sources={"train": "trec/train_5500.label", "test": "trec/TREC_10.label"},
        peers={"head": 0.584, "ia3": 0.962},
        floor=(TFIDF, 0.882),
    ),
    "cola": Task(
        part="test",
        metric="matthews",
        sources={"train": "cola/train.tsv", "test": "cola/dev.tsv"},
        peers={"full": 0.264},
        floor=(TFIDF, 0.152),
    ),
}

# Each method at the best of its own learning rates: what ../sweeps is chosen by.
SWEEPS = {"trec": "accuracy", "cola": "matthews", "shakespeare": "loss"}

_DATA = flags.DEFINE_string("data", "data", "folder with the tasks' data")
_RUNS = flags.DEFINE_string("runs", "runs/methods", "where run directories go")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of every method")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "which tasks")
_METHODS = flags.DEFINE_list("methods", None, "which methods (default: all of a task's config)")
_ONLY_REPORT = flags.DEFINE_bool("only_report", False, "make the table of what is finished")


def methods_of(task: str) -> list[str]:
    return list(runpy.run_path(str(CONFIGS / f"{task}.py"))["METHODS"])


def train(task: str, method: str, seed: int) -> None:
    """Runs one training in a process of its own."""
    directory = pathlib.Path(_RUNS.value) / f"{task}-{method}-{seed}"
    command = [
        sys.executable,
        "-c",
        "import sys; from lorax_ft.cli import main; sys.exit(main())",
        "train",
        f"--config={CONFIGS / task}.py:{method}",
        f"--config.seed={seed}",
        "--config.train.tensorboard=false",
        "--config.baseline=false",
        f"--run_dir={directory}",
    ]
    for part, path in TASKS[task].sources.items():
        command.append(f"--config.data.source.{part}={pathlib.Path(_DATA.value) / path}")
    subprocess.run(command, check=True)


def read(directory: pathlib.Path, task: str) -> dict[str, float] | None:
    """What the table needs of a finished run."""
    path = directory / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    return {
        "score": results["metrics"][TASKS[task].part][TASKS[task].metric],
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
    for task in TASKS:
        for method, seed in itertools.product(methods_of(task), seeds):
            row = read(pathlib.Path(_RUNS.value) / f"{task}-{method}-{seed}", task)
            if row:
                found[task, method, seed] = {"task": task, "method": method, "seed": seed, **row}
    order = [(task, method) for task in TASKS for method in methods_of(task)]
    return sorted(found.values(), key=lambda row: (order.index(key(row)[:2]), row["seed"]))


def peers(task: str) -> dict[str, list[float]]:
    """Scores of transformers + PEFT by method, those of peer.csv before single ones."""
    found = {method: [score] for method, score in TASKS[task].peers.items()}
    with (HERE / "peer.csv").open(newline="") as file:
        own = [row for row in csv.DictReader(file) if row["task"] == task]
    for row in own:
        if row["method"] not in TASKS[task].peers:
            found.setdefault(row["method"], []).append(float(row["score"]))
    return found


def mean_text(scores: list[float]) -> str:
    """Mean, deviation of the sample, and of how many."""
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{spread} ({len(scores)})"


def costs() -> dict[str, dict[str, str]]:
    """What cost.py found of each method."""
    path = HERE / "cost.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def swept(sweep: str, metric: str) -> dict[str, list[float]]:
    """What each method reaches on the test split at the learning rate that validation chose in a
    sweep of ../sweeps, by our names.
    """
    names = {"lora on nf4": "qlora", "adapters": "houlsby"}
    with (HERE.parent / "sweeps" / sweep / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    settings: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        settings.setdefault((row["method"], row["optimizer.learning_rate"]), []).append(row)
    sign = 1 if metric == "loss" else -1  # of a loss less is better
    best: dict[str, tuple[float, list[float]]] = {}
    for (method, _), group in settings.items():
        chosen_by = sign * statistics.mean(float(row[f"validation.{metric}"]) for row in group)
        method = names.get(method, method)
        if method not in best or chosen_by < best[method][0]:
            best[method] = chosen_by, [float(row[f"test.{metric}"]) for row in group]
    return {method: scores for method, (_, scores) in best.items()}


def table(rows: list[dict]) -> str:
    """What the methods cost and reach at their own best learning rate; then what each reaches by
    the configs' settings, the peer's and the floor.
    """
    cost = costs()
    best = [swept(f"{task}_methods", metric) for task, metric in SWEEPS.items()]
    lines = [
        "| method | trainable | share | parameters, MB | optimizer, MB | temporaries of a step, MB "
        "| step, of full's | prediction, of full's | TREC, accuracy (seeds) "
        "| CoLA, Matthews (seeds) | Shakespeare, loss (seeds) |",
        "|---" + "|---:" * 10 + "|",
    ]
    for method in dict.fromkeys([*cost, *(m for scores in best for m in scores)]):
        if row := cost.get(method):
            how = "merged" if row["merged"] == "True" else "as it is"
            cells = [
                f"{int(row['trainable']):,}",
                f"{float(row['share']):.2%}",
                f"{float(row['parameters_mb']):.1f}",
                f"{float(row['optimizer_mb']):.2f}",
                f"{float(row['temporary_mb']):.0f}",
                f"{float(row['step']):.2f}",
                f"{float(row['predict']):.2f} ({how})",
            ]
        else:
            cells = [""] * 7
        cells += [mean_text(scores[method]) if method in scores else "" for scores in best]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    groups = {k: list(g) for k, g in itertools.groupby(rows, lambda row: key(row)[:2])}
    for name, task in TASKS.items():
        lines += ["", f"| method | {name}, {task.metric} (seeds) | the same by PEFT |"]
        lines.append("|---|---:|---:|")
        for (of, method), group in groups.items():
            if of == name:
                score, peer = mean_text([r["score"] for r in group]), peers(name).get(method)
                lines.append(f"| {method} | {score} | {mean_text(peer) if peer else ''} |")
        lines.append(f"| {task.floor[0]} | {task.floor[1]} | |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Each run a point, each method a column."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4.5), squeeze=False)
    for axis, name in zip(axes[0], names):
        task, own = TASKS[name], [row for row in rows if row["task"] == name]
        columns = {method: i for i, method in enumerate(dict.fromkeys(r["method"] for r in own))}
        axis.scatter([columns[r["method"]] for r in own], [r["score"] for r in own], label="a seed")
        others = [(columns[m], x) for m, xs in peers(name).items() if m in columns for x in xs]
        if others:
            axis.scatter(*zip(*others), marker="x", label="PEFT, a seed")
        axis.axhline(task.floor[1], color="grey", linestyle=":", label=task.floor[0])
        axis.set_xticks(range(len(columns)), list(columns), rotation=45, ha="right")
        axis.set_title(f"{name}: {task.metric}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    seeds = [int(seed) for seed in _SEEDS.value]
    done = {key(row) for row in collect(seeds)}
    for seed, task in itertools.product([] if _ONLY_REPORT.value else seeds, _TASKS.value):
        for method in _METHODS.value or methods_of(task):
            if (task, method, seed) not in done:
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
