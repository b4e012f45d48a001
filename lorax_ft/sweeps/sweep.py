"""A sweep from end to end: planned, trained group by group, and gone on with where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorax_ft import runs
from lorax_ft.adapted import decomposes
from lorax_ft.config import ExperimentConfig, to_dict
from lorax_ft.prediction import Totals
from lorax_ft.sweeps import planning
from lorax_ft.sweeps.directory import (
    GROUPS,
    RUNS,
    Row,
    check_directory,
    describe,
    read_record,
    read_rows,
    write_record,
)
from lorax_ft.sweeps.groups import Group, group_runs
from lorax_ft.sweeps.halving import Rungs
from lorax_ft.sweeps.program import Program, Source, load_source
from lorax_ft.sweeps.queue import ListQueue, Queue
from lorax_ft.sweeps.slots import Slot, Watch, train_group
from lorax_ft.sweeps.specification import SweepConfig, make_runs
from lorax_ft.sweeps.tables import results_table
from lorax_ft.training import locks
from lorax_ft.trees import nearest


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


def train(
    config: ExperimentConfig,
    sweep: SweepConfig,
    sweep_dir: str | pathlib.Path,
    *,
    only_plan: bool = False,
) -> list[Row]:
    """Trains the runs of a sweep that are not finished yet; returns those that are.

    Prints the plan first, and with `only_plan` nothing else happens. Raises before anything trains:
    ValueError for runs that the config does not allow and for a directory that holds something
    else, RuntimeError for one that another sweep is at work in, OSError for a storage that cannot
    be reached, ImportError for a search without Optuna.
    """
    directory = pathlib.Path(sweep_dir)
    check_directory(directory, config, sweep)
    parts = _parts(config, sweep, directory)
    _check_metric(sweep, [part.group for part in parts])
    slots = _begun(directory)
    if only_plan:
        work = _prepare(parts, sweep, slots, only_plan=True)
        print(planning.plan_table([w.plan for w in work]) if work else "Every run is finished.")
        return read_rows(directory) if slots else []
    with locks.run_lock(directory):
        work = _prepare(parts, sweep, slots)
        if work:
            print(planning.plan_table([w.plan for w in work]))
            slots |= {w.program.group.name: w.program.slots for w in work}
        groups = [{"name": name, "slots": count} for name, count in slots.items()]
        count = sum(part.count for part in parts)
        write_record(directory, {**describe(config, sweep), "groups": groups, "runs": count})
        _train_groups(work, directory, sweep, count, config.train.progress_bar)
        rows = read_rows(directory)
        if rows:
            print(results_table(rows, sweep.metric, sweep.mode))
        return rows


def _parts(config: ExperimentConfig, sweep: SweepConfig, directory: pathlib.Path) -> Sequence[Part]:
    """The groups of a sweep, of the runs that it lists or of those that it may propose."""
    if sweep.search is not None:
        from lorax_ft.sweeps.study import StudyQueue, fields

        def open_study(field: Any) -> tuple[Queue, int]:
            queue = StudyQueue(field, config, sweep, directory)
            return queue, queue.left

        trials = sweep.search.trials
        return [
            Part(group=f.group, count=trials, open_queue=functools.partial(open_study, f))
            for f in fields(config, sweep)
        ]

    def open_list(group: Group) -> tuple[Queue, int]:
        waiting = [r for r in group.runs if not runs.read_results(directory / RUNS / r.name)]
        rungs = None
        if sweep.halving is not None:
            rungs = Rungs(sweep.halving, directory / GROUPS / group.name / "halving.json")
        metric = sweep.metric.partition(".")[2]
        return ListQueue(waiting, rungs=rungs, metric=metric, mode=sweep.mode), len(waiting)

    return [
        Part(group=g, count=len(g.runs), open_queue=functools.partial(open_list, g))
        for g in group_runs(make_runs(config, sweep))
    ]


def _prepare(
    parts: Sequence[Part],
    sweep: SweepConfig,
    slots: Mapping[str, int],
    *,
    only_plan: bool = False,
) -> list[Work]:
    """The programs of the groups that are not finished, compiled and timed."""
    sources: dict[str, Source] = {}
    work = []
    for part in parts:
        group = part.group
        if only_plan and sweep.search is not None:  # a study that is opened is made
            queue, left = ListQueue(()), part.count
        else:
            queue, left = part.open_queue()
        if not left:
            continue
        source = _source(sources, group.first)
        _check_evaluations(sweep, group, source)
        program, seconds = planning.make_program(
            source,
            group,
            part.count,
            slots=slots.get(group.name, sweep.slots),
            memory=sweep.memory,
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
    work: Sequence[Work], directory: pathlib.Path, sweep: SweepConfig, count: int, shown: bool
) -> None:
    total = sum(sum(w.steps) for w in work)
    with _open_bar(total, count, sweep, shown) as watch:
        for w in work:
            name = w.program.group.name
            folders = (directory / GROUPS / name, directory / RUNS)
            if train_group(w.program, w.queue, *folders, watch=watch) == "preempted":
                print("Stopped and saved; the same command goes on from there.")
                return
            shutil.rmtree(folders[0] / "checkpoints", ignore_errors=True)


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
    value, sign = slot.evaluation.metrics[name], 1 if sweep.mode == "max" else -1
    if best[0] is None or sign * value > sign * best[0]:
        best[:] = [value, slot.run.name]


def _source(sources: dict[str, Source], config: ExperimentConfig) -> Source:
    """The model and data of a config, read once for all that have the same."""
    values = to_dict(config)
    key = repr((values["model"], values["data"]["source"], values["data"]["split"],
                values["data"]["task"], values["quantization"], decomposes(config)))  # fmt: skip
    if key not in sources:
        sources[key] = load_source(config)
    return sources[key]


def _begun(directory: pathlib.Path) -> dict[str, int]:
    """The slots of each group of a sweep that was begun, which its checkpoints have."""
    with contextlib.suppress(FileNotFoundError):
        return {group["name"]: group["slots"] for group in read_record(directory)["groups"]}
    return {}


def _check_metric(sweep: SweepConfig, groups: Sequence[Group]) -> None:
    """Raises ValueError where runs are to be pruned by what they do not evaluate on the way."""
    if sweep.halving is None:
        return
    if not sweep.metric.startswith("validation."):
        raise ValueError(
            f"SweepConfig.halving prunes by the validation split, but metric is {sweep.metric!r}."
        )
    for group in groups:
        if group.first.train.eval_every == 0:
            raise ValueError(
                "SweepConfig.halving needs evaluations on the way, but config.train.eval_every is "
                "0. Set it to a number of steps, or to None for every epoch."
            )


def _check_evaluations(sweep: SweepConfig, group: Group, source: Source) -> None:
    """Raises ValueError for a metric of a split without rows, or that no evaluation has."""
    dataset, (part, _, metric) = source.dataset, sweep.metric.partition(".")
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
