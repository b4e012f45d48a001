"""A sweep from end to end: trained here or by workers, and gone on with where it stopped."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.config import ExperimentConfig, to_dict
from lorax_ft.data import Dataset
from lorax_ft.experiment import load_data
from lorax_ft.sweeps import planning, worker
from lorax_ft.sweeps.directory import Row, check_directory, describe, read_rows, write_record
from lorax_ft.sweeps.groups import Group
from lorax_ft.sweeps.launchers import Launch, open_launcher
from lorax_ft.sweeps.program import check_members
from lorax_ft.sweeps.reports.formats import text_table
from lorax_ft.sweeps.reports.tables import results_table
from lorax_ft.sweeps.specification import SweepConfig
from lorax_ft.training import locks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Where a call of `train` left its sweep."""

    outcome: str  # "finished", "preempted" or "planned"
    rows: list[Row]  # the finished runs


def train(
    config: ExperimentConfig,
    sweep: SweepConfig,
    sweep_dir: str | pathlib.Path,
    *,
    only_plan: bool = False,
    launcher: str | None = None,
    resources: Mapping[str, Any] | None = None,
    command: str = "",
) -> SweepResult:
    """Trains the runs of a sweep that are not finished yet.

    Prints the plan first, and with `only_plan` nothing else happens. With a `launcher` ("local:4",
    "ray", "slurm") each group is trained by a worker with its `resources`, which plans it there.
    `command` is what the cards of exported adapters say that they were made by.
    Raises before anything trains: ValueError for runs that the config does not allow and for a
    directory that holds something else, RuntimeError for one that another sweep is at work in,
    OSError for a storage or cluster that cannot be reached, ImportError for a search without Optuna
    or a launcher without its engine. Raises RuntimeError in the end where groups failed.
    """
    if config.processes is not None:
        raise ValueError(
            "config.processes is for one run; a sweep's groups are trained by --launcher's workers."
        )
    directory = pathlib.Path(sweep_dir).absolute()
    check_directory(directory, config, sweep)
    parts = worker.make_parts(config, sweep, directory)
    if only_plan:
        work = worker.prepare(parts, sweep, directory, only_plan=True)
        print(planning.plan_table([w.plan for w in work]) if work else "Every run is finished.")
        return SweepResult(outcome="planned", rows=read_rows(directory))
    outcome = "finished"
    with open_launcher(launcher, resources or {}, directory) as launch, locks.run_lock(directory):

        def record() -> None:
            count, names = sum(part.count for part in parts), [part.name for part in parts]
            made = {"groups": names, "runs": count, "command": command}
            write_record(directory, {**describe(config, sweep), **made})

        if launch is None:
            shown = config.train.progress_bar
            outcome = worker.train_parts(parts, sweep, directory, ready=record, shown=shown)
            if outcome == "preempted":
                print("Stopped and saved; the same command goes on from there.")
        else:
            left = {part.name: part.open_queue()[1] for part in parts}
            waiting = [part for part in parts if left[part.name]]
            _check_data(sweep, [part.group for part in waiting])
            record()
            task = worker.Task(
                config=config, sweep=sweep, directory=directory, folder=pathlib.Path.cwd()
            )
            _hand_out(launch, task, {part.name: left[part.name] for part in waiting})
        rows = read_rows(directory)
        if rows:
            print(results_table(rows, sweep.metric, sweep.sign))
        return SweepResult(outcome=outcome, rows=rows)


def _hand_out(launch: Launch, task: worker.Task, left: Mapping[str, int]) -> None:
    """Has each group trained. Raises RuntimeError when all have ended and some of them failed."""
    if not left:
        return
    print(text_table([{"group": name, "runs": count} for name, count in left.items()]), flush=True)
    failed = {}
    for done, (name, error) in enumerate(launch(task, list(left)), start=1):
        if error is not None:
            failed[name] = error
        said = "finished" if error is None else f"failed: {error}"
        print(f"{name}: {said} ({done} of {len(left)} groups have ended)", flush=True)
    if failed:
        lines = [f"  {name}: {error}" for name, error in failed.items()]
        raise RuntimeError(
            f"{len(failed)} of {len(left)} groups failed:\n"
            + "\n".join(lines)
            + "\nThe same command goes on with them from their last checkpoints."
        )


def _check_data(sweep: SweepConfig, groups: Sequence[Group]) -> None:
    """Reads the data of groups that others will train: what is wrong with it is told at once."""
    datasets: dict[str, Dataset] = {}
    for group in groups:
        check_members(group.first)
        values = to_dict(group.first)
        read = {**values["data"], "loader": None}
        key = repr((values["model"]["path"], values["model"]["tokenizer"], read))
        if key not in datasets:
            datasets[key] = load_data(group.first)[1]
        worker.check_evaluations(sweep, group, datasets[key])
