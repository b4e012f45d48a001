"""Workers of a sweep killed on purpose: is the finished table that of an undisturbed sweep?

    pip install -e '.[ray,slurm]'
    PYTHONPATH=. python experiments/sweep_workers/run.py

Three groups of a tiny random BERT are trained once undisturbed, and then by workers: processes,
submitit's jobs and Ray tasks, of which some are killed at random, and Ray tasks on two nodes, of
which one is killed with all its processes. All kills are `kill -9`. Writes results.csv and
results.md beside this file.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator

from absl import app, flags

HERE = pathlib.Path(__file__).resolve().parent
GROUPS = ("lora-1", "lora-2", "ia3")

_RUNS = flags.DEFINE_string("runs", "runs/sweep_workers", "where sweeps go")
_STEPS = flags.DEFINE_integer("steps", 4000, "of each run")
_KILLS = flags.DEFINE_integer("kills", 5, "of workers at random, in all")
_SEED = flags.DEFINE_integer("seed", 0, "of who is killed, and when")
_WAYS = flags.DEFINE_list("ways", ["local", "slurm", "ray", "ray node"], "what is tried")


def main(arguments: list[str]) -> None:
    del arguments
    from lorax_ft import sweeps

    folder = pathlib.Path(_RUNS.value).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    config, sweep = make_sweep(folder)
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")  # Ray forks, which JAX must not be there for
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=spawn, initializer=sweeps.one_for_each_core
    ) as pool:
        expected = table(
            pool.submit(sweeps.train, config, sweep, folder / "undisturbed").result().rows
        )
    records = [
        {"way": "undisturbed", "kills": 0, "seconds": time.perf_counter() - start, "runs": 6}
    ]
    write_table(expected)
    for way in _WAYS.value:
        launcher = {"local": "local:2", "slurm": "slurm:local"}.get(way, "ray")
        directory, killed = folder / way.replace(" ", "_"), []
        ray = cluster() if launcher == "ray" else contextlib.nullcontext(list)
        start = time.perf_counter()
        with ray as nodes:
            kill = kill_node if way == "ray node" else kill_workers
            threading.Thread(target=kill, args=(directory, nodes, killed), daemon=True).start()
            rows = sweeps.train(config, sweep, directory, launcher=launcher).rows
        found = table(rows)
        records.append(
            {
                "way": way,
                "kills": len(killed),
                "seconds": time.perf_counter() - start,
                "runs": len(found),
                "equal runs": sum(found.get(name) == row for name, row in expected.items()),
                "equal adapters": sum(
                    same_bytes(folder / "undisturbed", directory, name) for name in expected
                ),
                "repeated steps": sum(repeated_steps(directory, name) for name in expected),
                "killed": "; ".join(killed),
            }
        )
        print(records[-1], flush=True)
    write_results(records)


def make_sweep(folder: pathlib.Path):
    """The config and the sweep: three groups of two runs each."""
    from lorax_ft.config import ExperimentConfig, parse
    from lorax_ft.sweeps import SweepConfig, method, product
    from tests import tiny

    folder.mkdir(parents=True)
    tiny.write_folder(folder)
    config = parse(
        {
            "model": {"path": str(folder / "bert")},
            "data": {
                "source": {"train": str(folder / "data.csv")},
                "split": {"validation": 0.2, "test": 0.2},
                "loader": {"batch_size": 16},
            },
            "lora": {"rank": 2, "targets": ["query"], "dropout": 0.1},
            "train": {
                "steps": _STEPS.value,
                "eval_every": 200,
                "checkpoint_every": 100,
                "best_metric": "accuracy",
                "progress_bar": False,
                "tensorboard": False,
            },
        },
        ExperimentConfig,
    )
    methods = [{}, {"lora.targets": ["query", "value"]}, method("ia3")]
    runs = product(methods, [{"seed": 0}, {"seed": 1}])
    return config, SweepConfig(runs=runs, slots=2, collapse_patience=None)


# --- Who is killed --------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster() -> Iterator[Callable[[], list]]:
    """A Ray cluster whose head trains nothing, with two nodes of one CPU each; gives its nodes."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = made.address
    try:
        yield lambda: list(made.worker_nodes)
    finally:
        del os.environ["RAY_ADDRESS"]
        made.shutdown()


def kill_workers(directory: pathlib.Path, nodes: Callable[[], list], killed: list[str]) -> None:
    """Kills workers at random, each when some seconds have passed and its group is under way."""
    draw = random.Random(_SEED.value)
    while len(killed) < _KILLS.value:
        time.sleep(draw.uniform(3.0, 12.0))
        if under_way := workers(directory):
            group, process = draw.choice(sorted(under_way.items()))
            killed.append(f"{group} ({last_checkpoint(directory, group)})")
            os.kill(process, signal.SIGKILL)


def kill_node(directory: pathlib.Path, nodes: Callable[[], list], killed: list[str]) -> None:
    """Kills every process of one node, when both have saved their groups and some time passed."""
    while len(workers(directory)) < 2 or not all(
        last_checkpoint(directory, group) for group in workers(directory)
    ):
        time.sleep(0.05)
    time.sleep(random.Random(_SEED.value).uniform(2.0, 8.0))
    raylet = nodes()[0].all_processes["raylet"][0].process.pid
    tasks = pathlib.Path(f"/proc/{raylet}/task").glob("*/children")
    family = {raylet, *(int(child) for path in tasks for child in path.read_text().split())}
    for group, process in workers(directory).items():
        if process in family:
            killed.append(f"the node of {group} ({last_checkpoint(directory, group)})")
    for process in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def workers(directory: pathlib.Path) -> dict[str, int]:
    """The process that trains each group now, as its lock says."""
    found = {}
    for path in directory.glob("groups/*/lock"):
        with contextlib.suppress(ValueError, KeyError):
            found[path.parent.name] = json.loads(path.read_text())["pid"]
    return {group: process for group, process in found.items() if is_alive(process)}


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def last_checkpoint(directory: pathlib.Path, group: str) -> int:
    """The tick of a group's last checkpoint; 0 where it has none."""
    names = [path.name for path in (directory / "groups" / group).glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


# --- What is compared -----------------------------------------------------------------------------


def table(rows) -> dict[str, tuple]:
    """Outcome, steps and all metrics of each run; not its time."""
    return {
        row.name: (row.results["outcome"], row.results["step"], row.results["metrics"])
        for row in rows
    }


def same_bytes(one: pathlib.Path, two: pathlib.Path, run: str) -> bool:
    files = [path / "runs" / run / "adapter" / "trainable.safetensors" for path in (one, two)]
    return files[0].read_bytes() == files[1].read_bytes()


def repeated_steps(directory: pathlib.Path, run: str) -> int:
    """How many steps a run's metrics.jsonl tells of twice."""
    from lorax_ft.training.records import read_records

    told = [(r["kind"], r["step"]) for r in read_records(directory / "runs" / run)]
    return len(told) - len(set(told))


def write_table(rows: dict[str, tuple]) -> None:
    for name, (outcome, step, metrics) in rows.items():
        print(f"{name}: {outcome} at {step}, test loss {metrics['test']['loss']:.6f}")


def write_results(records: list[dict]) -> None:
    names = list(records[-1])
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({**r, "seconds": round(r["seconds"], 1)} for r in records)
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for record in records:
        cells = [{**record, "seconds": f"{record['seconds']:.0f}"}.get(name, "") for name in names]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
