"""A sweep from end to end: planned, trained group by group, and gone on with where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorax_ft import runs
from lorax_ft.config import ExperimentConfig, to_dict
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
from lorax_ft.sweeps.groups import Group, Run, group_runs
from lorax_ft.sweeps.halving import Rungs
from lorax_ft.sweeps.program import Program, Source, load_source
from lorax_ft.sweeps.queue import ListQueue, Queue
from lorax_ft.sweeps.slots import Slot, Watch, train_group
from lorax_ft.sweeps.specification import SweepConfig, make_runs
from lorax_ft.sweeps.tables import results_table
from lorax_ft.training import locks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A group that has runs to train, and its program."""

    program: Program
    queue: Queue
    steps: tuple[int, ...]  # of the runs to come
    plan: planning.Plan


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
    else, RuntimeError for one that another sweep is at work in.
    """
    directory = pathlib.Path(sweep_dir)
    check_directory(directory, config, sweep)
    made = make_runs(config, sweep)
    groups = group_runs(made)
    _check_metric(sweep, groups)
    slots = _begun(directory)
    if only_plan:
        work = _prepare(groups, directory, sweep, slots)
        print(planning.plan_table([w.plan for w in work]) if work else "Every run is finished.")
        return read_rows(directory) if slots else []
    with locks.run_lock(directory):
        work = _prepare(groups, directory, sweep, slots)
        if work:
            print(planning.plan_table([w.plan for w in work]))
            slots |= {w.program.group.name: w.program.slots for w in work}
        write_record(directory, _record(config, sweep, groups, slots))
        _train_groups(work, directory, sweep, made)
        rows = read_rows(directory)
        if rows:
            print(results_table(rows, sweep.metric, sweep.mode))
        return rows


def _prepare(
    groups: Sequence[Group], directory: pathlib.Path, sweep: SweepConfig, slots: Mapping[str, int]
) -> list[Work]:
    """The programs of the groups that are not finished, compiled and timed."""
    sources: dict[str, Source] = {}
    work = []
    for group in groups:
        waiting = [r for r in group.runs if not runs.read_results(directory / RUNS / r.name)]
        if not waiting:
            continue
        source = _source(sources, group.first)
        _check_evaluations(sweep, source)
        program, seconds = planning.make_program(
            source,
            group,
            len(group.runs),
            slots=slots.get(group.name, sweep.slots),
            memory=sweep.memory,
        )
        steps = tuple(source.total_steps(run.config) for run in waiting)
        work.append(
            Work(
                program=program,
                queue=_queue(waiting, group, directory, sweep),
                steps=steps,
                plan=planning.make_plan(program, seconds, steps),
            )
        )
    return work


def _queue(
    waiting: Sequence[Run], group: Group, directory: pathlib.Path, sweep: SweepConfig
) -> ListQueue:
    rungs = None
    if sweep.halving is not None:
        rungs = Rungs(sweep.halving, directory / GROUPS / group.name / "halving.json")
    metric = sweep.metric.partition(".")[2]
    return ListQueue(waiting, rungs=rungs, metric=metric, mode=sweep.mode)


def _train_groups(
    work: Sequence[Work], directory: pathlib.Path, sweep: SweepConfig, made: Sequence[Run]
) -> None:
    shown = made[0].config.train.progress_bar
    with _open_bar(sum(sum(w.steps) for w in work), len(made), directory, sweep, shown) as tick:
        for w in work:
            name = w.program.group.name
            outcome = train_group(
                w.program,
                w.queue,
                directory / GROUPS / name,
                directory / RUNS,
                watch=Watch(collapse_patience=sweep.collapse_patience, tick=tick),
            )
            if outcome == "preempted":
                print("Stopped and saved; the same command goes on from there.")
                return
            shutil.rmtree(directory / GROUPS / name / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def _open_bar(
    total: int, count: int, directory: pathlib.Path, sweep: SweepConfig, shown: bool
) -> Iterator[Any]:
    """Gives `tick(slots)`, which shows how far the sweep is and the best run so far."""
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

        yield tick


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
                values["data"]["task"], values["quantization"], _decomposes(config)))  # fmt: skip
    if key not in sources:
        sources[key] = load_source(config)
    return sources[key]


def _decomposes(config: ExperimentConfig) -> bool:
    from lorax_ft.adapted import DECOMPOSITIONS

    return config.lora is not None and config.lora.initialization in DECOMPOSITIONS


def _begun(directory: pathlib.Path) -> dict[str, int]:
    """The slots of each group of a sweep that was begun, which its checkpoints have."""
    with contextlib.suppress(FileNotFoundError):
        return {group["name"]: group["slots"] for group in read_record(directory)["groups"]}
    return {}


def _record(
    config: ExperimentConfig, sweep: SweepConfig, groups: Sequence[Group], slots: Mapping[str, int]
) -> dict[str, Any]:
    listed = {run.name: {"group": g.name, "changes": run.changes} for g in groups for run in g.runs}
    return {
        **describe(config, sweep),
        "groups": [{"name": g.name, "slots": slots[g.name]} for g in groups if g.name in slots],
        "runs": [{"name": name, **listed[name]} for name in sorted(listed)],
    }


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


def _check_evaluations(sweep: SweepConfig, source: Source) -> None:
    """Raises ValueError where the metric's split has no rows."""
    source.dataset.part(sweep.metric.partition(".")[0])
