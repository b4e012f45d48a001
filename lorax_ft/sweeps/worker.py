"""Groups trained in this process: all of a sweep's, or the one that a worker was given.

A group's lock keeps two workers from one group; what a group was planned with stands beside its
checkpoints, so that whoever takes it up goes on with the same program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorax_ft import runs
from lorax_ft.adapted import decomposes
from lorax_ft.config import ExperimentConfig, to_dict
from lorax_ft.data import Dataset
from lorax_ft.models.tensor_files import read_json
from lorax_ft.prediction import Totals
from lorax_ft.sweeps import planning
from lorax_ft.sweeps.devices import one_for_each_core
from lorax_ft.sweeps.directory import GROUPS, PLAN, RECORD, RUNS, read_record
from lorax_ft.sweeps.groups import Group, evaluated, group_runs
from lorax_ft.sweeps.halving import Rungs
from lorax_ft.sweeps.program import (
    Program,
    Source,
    check_members,
    load_source,
    steps_per_epoch,
)
from lorax_ft.sweeps.queue import ListQueue, Queue
from lorax_ft.sweeps.search.fields import Field, fields
from lorax_ft.sweeps.search.strategies import check_pruner
from lorax_ft.sweeps.search.study import StudyQueue
from lorax_ft.sweeps.slots import Slot, Watch, train_group
from lorax_ft.sweeps.specification import SweepConfig, make_runs
from lorax_ft.training import locks
from lorax_ft.trees import nearest

PATIENCE = 60.0  # seconds of silence after which a worker on another host counts as dead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A group that has runs to train, and its program."""

    program: Program
    queue: Queue
    steps: tuple[int, ...]  # of the runs to come; for a search, what they take at most
    plan: planning.Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A group and how to come by its runs."""

    group: Group
    count: int  # of all its runs
    open_queue: Callable[[], tuple[Queue, int]]  # and how many runs are to come

    @property
    def name(self) -> str:
        return self.group.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A sweep as a worker is given it; called with a group's name, it trains that group."""

    config: ExperimentConfig
    sweep: SweepConfig
    directory: pathlib.Path  # of the sweep; absolute, on storage that all workers share
    folder: pathlib.Path  # that paths of the config are relative to
    share: float = 1.0  # of the machine's free memory that is this worker's

    def __call__(self, name: str) -> str:
        """Trains what of the group is not finished; returns as `train_parts` does.

        Raises OSError where this machine does not have the sweep's directory.
        """
        if not (self.directory / RECORD).exists():
            raise OSError(
                f"{socket.gethostname()} has no {self.directory / RECORD}: workers need the "
                "sweep's directory on storage that all of them share. Give such a --sweep_dir."
            )
        os.chdir(self.folder)
        one_for_each_core()
        parts = [p for p in make_parts(self.config, self.sweep, self.directory) if p.name == name]
        return train_parts(parts, self.sweep, self.directory, share=self.share)


def make_parts(
    config: ExperimentConfig, sweep: SweepConfig, directory: pathlib.Path
) -> Sequence[Part]:
    """The groups of a sweep, of the runs that it lists or of those that it may propose."""
    if sweep.search is not None:
        check_pruner(sweep.search)

        def open_study(field: Field) -> tuple[Queue, int]:
            queue = StudyQueue(field, config, sweep, directory)
            return queue, queue.left

        return [
            Part(group=f.group, count=f.trials, open_queue=functools.partial(open_study, f))
            for f in fields(config, sweep)
        ]

    def open_list(group: Group) -> tuple[Queue, int]:
        waiting = [r for r in group.runs if not runs.read_results(directory / RUNS / r.name)]
        rungs = None
        if sweep.halving is not None:
            rungs = Rungs(sweep.halving, directory / GROUPS / group.name / "halving.json")
        metric = sweep.metric.partition(".")[2]
        return ListQueue(waiting, rungs=rungs, metric=metric, sign=sweep.sign), len(waiting)

    return [
        Part(group=g, count=len(g.runs), open_queue=functools.partial(open_list, g))
        for g in group_runs(make_runs(config, sweep))
    ]


def train_parts(
    parts: Sequence[Part],
    sweep: SweepConfig,
    directory: pathlib.Path,
    *,
    ready: Callable[[], None] = lambda: None,
    share: float = 1.0,
    shown: bool = False,
) -> str:
    """Trains what of some groups is not finished; "preempted" where SIGTERM came, else "finished".

    Calls `ready` when all is compiled and nothing trained yet. Raises RuntimeError for a group that
    another worker is at.
    """
    with contextlib.ExitStack() as held:
        for part in parts:
            folder = directory / GROUPS / part.name
            held.enter_context(locks.run_lock(folder, patience=PATIENCE))
        work = prepare(parts, sweep, directory, share=share)
        if work:
            print(planning.plan_table([w.plan for w in work]), flush=True)
        ready()
        for w in work:
            content = json.dumps(dataclasses.asdict(w.plan), indent=2) + "\n"
            runs.write_text(directory / GROUPS / w.plan.group / PLAN, content)
        outcome = _train_groups(work, directory, sweep, sum(p.count for p in parts), shown)
        if outcome == "finished":
            for part in parts:
                shutil.rmtree(directory / GROUPS / part.name / "checkpoints", ignore_errors=True)
        return outcome


def prepare(
    parts: Sequence[Part],
    sweep: SweepConfig,
    directory: pathlib.Path,
    *,
    share: float = 1.0,
    only_plan: bool = False,
) -> list[Work]:
    """The programs of the groups that are not finished, compiled and timed.

    All bases are read first: what they leave of the memory is what a group is planned for.
    """
    sources: dict[str, Source] = {}
    waiting = []
    for part in parts:
        group = part.group
        if only_plan and sweep.search is not None:  # a study that is opened is made
            queue, left = ListQueue(()), part.count
        else:
            queue, left = part.open_queue()
        if not left:
            continue
        source = _source(sources, group.first)
        check_evaluations(sweep, group, source.dataset)
        queue.expect(*evaluated(group, source.steps_per_epoch(group.first)))
        waiting.append((part, queue, left, source))
    work = []
    for part, queue, left, source in waiting:
        group = part.group
        begun = _slots_begun(directory / GROUPS / group.name)
        program, seconds = planning.make_program(
            source,
            group,
            part.count,
            slots=begun or sweep.slots,
            begun=begun is not None,
            memory=sweep.memory or planning.free_memory(share),
            vectorized=sweep.vectorized,
        )
        steps = _steps(source, group, queue, left)
        plan = planning.make_plan(program, seconds, steps)
        work.append(Work(program=program, queue=queue, steps=steps, plan=plan))
    return work


def _steps(source: Source, group: Group, queue: Queue, left: int) -> tuple[int, ...]:
    """The steps of the runs to come, or the most that they may take."""
    if isinstance(queue, ListQueue) and queue.waiting:
        return tuple(source.total_steps(run.config) for run in queue.waiting)
    return (max(source.total_steps(run.config) for run in group.runs),) * left


def _train_groups(
    work: list[Work], directory: pathlib.Path, sweep: SweepConfig, count: int, shown: bool
) -> str:
    """Takes each group out of `work` as it comes to its turn: what it held is free after it."""
    total = sum(sum(w.steps) for w in work)
    with _open_bar(total, count, sweep, shown) as watch:
        watch = dataclasses.replace(watch, command=read_record(directory).get("command", ""))
        while work:
            w = work.pop(0)
            folders = (directory / GROUPS / w.plan.group, directory / RUNS)
            if train_group(w.program, w.queue, *folders, watch=watch) == "preempted":
                return "preempted"
            shutil.rmtree(folders[0] / "checkpoints", ignore_errors=True)
    return "finished"


@contextlib.contextmanager
def _open_bar(total: int, count: int, sweep: SweepConfig, shown: bool) -> Iterator[Watch]:
    """Gives a watch that shows how far the sweep is, and the best run so far."""
    from tqdm import tqdm

    with tqdm(total=total, unit="step", disable=not shown, dynamic_ncols=True) as bar:
        seen: dict[str, int] = {}
        best: list[Any] = [None, ""]

        def tick(slots: Mapping[int, Slot]) -> None:
            for slot in slots.values():
                bar.update(slot.progress.step - seen.get(slot.run.name, 0))
                seen[slot.run.name] = slot.progress.step
                _keep_best(best, slot, sweep)
            words = f"{len(slots)} of {count} runs"
            if best[0] is not None:
                words += f", best {best[0]:.4f} ({best[1][:30]})"
            bar.set_postfix_str(words, refresh=False)

        def end(slot: Slot) -> None:
            bar.total -= slot.total - slot.progress.step  # what an early end spares

        yield Watch(collapse_patience=sweep.collapse_patience, tick=tick, end=end)


def _keep_best(best: list[Any], slot: Slot, sweep: SweepConfig) -> None:
    """Brings (value, run) of the best validation so far up to date."""
    part, _, name = sweep.metric.partition(".")
    if slot.evaluation is None or part != "validation" or name not in slot.evaluation.metrics:
        return
    value = slot.evaluation.metrics[name]
    if math.isnan(value):
        return
    if best[0] is None or sweep.sign * value > sweep.sign * best[0]:
        best[:] = [value, slot.run.name]


def _source(sources: dict[str, Source], config: ExperimentConfig) -> Source:
    """The model and data of a config, read once for all that have the same."""
    check_members(config)
    values = to_dict(config)
    key = repr((values["model"], values["data"]["source"], values["data"]["split"],
                values["data"]["task"], values["quantization"], decomposes(config)))  # fmt: skip
    if key not in sources:
        sources[key] = load_source(config)
    return sources[key]


def _slots_begun(folder: pathlib.Path) -> int | None:
    """The slots of a group that was begun, which its checkpoints have."""
    path = folder / PLAN
    return read_json(path)["slots"] if path.exists() else None


def check_evaluations(sweep: SweepConfig, group: Group, dataset: Dataset) -> None:
    """Raises ValueError for evaluations that cannot be, or that a pruner would need and not get.

    That is a metric of a split without rows, or that no evaluation has; and for a search with a
    pruner a group whose runs are all evaluated at their ends alone.
    """
    part, _, metric = sweep.metric.partition(".")
    dataset.part(part)
    known = Totals(dataset.task, dataset.label_names).evaluation().metrics
    asked = {"SweepConfig.metric": metric}
    for run in group.runs:
        if run.config.train.best_metric is not None:
            dataset.part("validation")
            asked[f"{run.name}: config.train.best_metric"] = run.config.train.best_metric
    for field, name in asked.items():
        if name not in known:
            near = nearest(name, known) or known
            raise ValueError(
                f"{field}: the evaluation has no {name!r}; nearest: {', '.join(near)}."
            )
    if sweep.search is not None and sweep.search.pruner is not None:
        first, last = evaluated(group, steps_per_epoch(dataset, group.first))
        if first is None:
            raise ValueError(
                f"Search.pruner = {sweep.search.pruner!r} can end no run of {group.name}: each is "
                f"evaluated at its end alone, the longest after {last} steps. Set "
                "config.train.eval_every to fewer steps, or Search.pruner to None."
            )
