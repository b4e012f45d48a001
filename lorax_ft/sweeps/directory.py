"""The sweep directory: what stands in it, and the runs that it gives back.

sweep.json       the base config, what the sweep varies, how many runs, its groups
runs/NAME/       a run directory for each run, as `lorax-ft train` leaves it, and its member.json
groups/NAME/     a group's plan, its checkpoints while it trains, what successive halving decided,
                 and where the sweep is a search Optuna's study, or its name in a shared storage
slurm/           what the jobs of --launcher=slurm said
report/          what `lorax-ft report` made
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lorax_ft import finished, runs
from lorax_ft.config import ExperimentConfig, flat, to_dict
from lorax_ft.evaluation import sign_of
from lorax_ft.models.tensor_files import read_json
from lorax_ft.sweeps.groups import Run
from lorax_ft.sweeps.search.storages import place
from lorax_ft.sweeps.specification import SweepConfig

FORMAT = 1
RECORD, MEMBER, PLAN = "sweep.json", "member.json", "plan.json"
RUNS, GROUPS, JOBS = "runs", "groups", "slurm"
FINISHED = ("finished", "stopped_early")  # the others were ended: pruned, diverged, collapsed


def check_directory(directory: pathlib.Path, config: ExperimentConfig, sweep: SweepConfig) -> None:
    """Raises ValueError where the directory holds something else, or another sweep."""
    if not directory.exists() or not any(directory.iterdir()):
        return
    path = directory / RECORD
    if not path.exists():
        if {entry.name for entry in directory.iterdir()} <= {"lock", GROUPS, JOBS}:  # none trained
            return
        raise ValueError(
            f"{directory} is in use, and not by a sweep: it has no {RECORD}. Give another "
            "--sweep_dir."
        )
    if lines := differences(read_json(path), describe(config, sweep)):
        raise ValueError(
            f"{directory} holds a sweep made by another config or sweep file:\n{lines}\n"
            "Give another --sweep_dir, or the same files to go on with that sweep."
        )


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What differs between two of `describe`, a key a line; "" where nothing does."""
    lines = []
    for section in ("config", "sweep"):
        one, two = flat(saved.get(section, {}), section), flat(given[section], section)
        different = [key for key in one | two if one.get(key) != two.get(key)]
        lines += [f"  {key}: {one.get(key)!r} there, {two.get(key)!r} here" for key in different]
    return "\n".join(lines[:10])


def describe(config: ExperimentConfig, sweep: SweepConfig) -> dict[str, Any]:
    """What makes a sweep that sweep and no other, as JSON has it."""
    content = dataclasses.asdict(dataclasses.replace(sweep, slots=None, memory=None))
    if sweep.search is not None and sweep.search.storage is not None:
        content["search"]["storage"] = place(sweep.search.storage)
    return {
        "format": FORMAT,
        "config": to_dict(config),
        "sweep": json.loads(json.dumps(content, default=repr)),
    }


def write_record(directory: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes sweep.json."""
    directory.mkdir(parents=True, exist_ok=True)
    runs.write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(directory: str | pathlib.Path) -> dict[str, Any]:
    """What sweep.json has. Raises FileNotFoundError where there is no sweep."""
    path = pathlib.Path(directory) / RECORD
    if not path.exists():
        raise FileNotFoundError(f"{directory} is no sweep: {RECORD} is missing.")
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has another format than {FORMAT}, the one this version reads.")
    return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A run of a sweep that has ended."""

    name: str
    group: str
    changes: Mapping[str, Any]  # of the base config
    config: ExperimentConfig
    results: Mapping[str, Any]  # what its results.json has

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end, or stopped when it no longer got better."""
        return self.results["outcome"] in FINISHED

    @property
    def seeds(self) -> tuple[int, int]:
        """The run's seed and that of its data's order."""
        order = self.config.data.loader.seed
        return self.config.seed, self.config.seed if order is None else order

    def metric(self, name: str) -> float:
        """A metric by split and name, such as "validation.accuracy"; NaN where there is none."""
        part, _, metric = name.partition(".")
        value = self.results["metrics"].get(part, {}).get(metric)
        return math.nan if value is None else float(value)


def write_member(run_dir: pathlib.Path, run: Run, group: str) -> None:
    """Says in a run's directory what the run is of its sweep."""
    content = {"group": group, "changes": dict(run.changes)}
    runs.write_text(run_dir / MEMBER, json.dumps(content, indent=2) + "\n")


def read_rows(sweep_dir: str | pathlib.Path) -> list[Row]:
    """The runs of a sweep that have ended, in its order."""
    rows = []
    for path in sorted(pathlib.Path(sweep_dir).glob(f"{RUNS}/*")):
        if (results := runs.read_results(path)) and (path / MEMBER).exists():
            member = read_json(path / MEMBER)
            config = runs.read_config(path)
            rows.append(Row(name=path.name, config=config, results=results, **member))
    return rows


def criterion(
    sweep_dir: str | pathlib.Path, metric: str | None = None, mode: str | None = None
) -> tuple[str, int]:
    """By what runs are compared, and 1 where more of it is better, -1 where less is.

    The sweep's own `mode` is for its own metric alone.
    """
    sweep = read_record(sweep_dir)["sweep"]
    name = str(metric or sweep["metric"])
    return name, sign_of(name, mode or (sweep["mode"] if name == sweep["metric"] else None))


def best(sweep_dir: str | pathlib.Path, metric: str | None = None, mode: str | None = None) -> Row:
    """The run with the best metric, by default that of the sweep; the earlier of equals.

    `metric` is a split and a name, such as "validation.accuracy"; `mode` is "max" or "min" of it,
    by default as its name says. A run that was pruned, or diverged, is as good as what it left.
    Raises ValueError where no run that has ended has the metric.
    """
    name, sign = criterion(sweep_dir, metric, mode)
    rows = [row for row in read_rows(sweep_dir) if math.isfinite(row.metric(name))]
    if not rows:
        raise ValueError(f"{sweep_dir}: no run of this sweep has ended with {name}.")
    return max(rows, key=lambda row: sign * row.metric(name))


def restore(
    sweep_dir: str | pathlib.Path,
    run: str | None = None,
    *,
    metric: str | None = None,
    mode: str | None = None,
) -> tuple[Any, Callable[..., Any]]:
    """Parameters and `apply` of a run, by default the best; see `finished.restore`.

    Which is best, `metric` and `mode` say as in `best`. Raises as that does, FileNotFoundError for
    a run that is not there, and ValueError for both a run and a metric.
    """
    if run is not None and (metric is not None or mode is not None):
        raise ValueError(
            f"restore: got run={run!r} beside metric={metric!r} and mode={mode!r}; expected a run, "
            "or how to choose one."
        )
    name = best(sweep_dir, metric, mode).name if run is None else run
    path = pathlib.Path(sweep_dir) / RUNS / name
    if not path.is_dir():
        names = sorted(entry.name for entry in path.parent.glob("*"))
        raise FileNotFoundError(f"{sweep_dir} has no run {name!r}; it has {', '.join(names[:20])}.")
    return finished.restore(path)
