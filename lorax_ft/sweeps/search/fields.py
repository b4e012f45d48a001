"""The fields of a search: its space in parts whose runs are one program each."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.config import ExperimentConfig
from lorax_ft.sweeps.groups import VALUES, Group, Run, group_runs, structure
from lorax_ft.sweeps.spaces import Choice, Distribution
from lorax_ft.sweeps.specification import SweepConfig, make_run

SCHEDULE = "train.eval_every"  # an array of no program, but it says whether runs can be pruned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A group that a search may propose runs of, and from what."""

    group: Group  # whose runs stand for the largest there may be, and are not trained
    space: Mapping[str, Distribution]
    changes: Mapping[str, Any]  # of every run of it, before those of the space
    number: int
    trials: int
    first: int  # number of its first run: those of the fields before it come earlier


def fields(config: ExperimentConfig, sweep: SweepConfig) -> tuple[Field, ...]:
    """The groups of a search, each with its part of the space and of the trials.

    Raises ValueError for a space whose values the config does not take, for a range whose runs are
    not one program, and for fewer trials than groups.
    """
    search = sweep.search
    assert search is not None
    found = []
    for changes in sweep.runs or ({},):
        corners = [{**changes, **corner} for corner in _corners(search.space)]
        stand_ins = [make_run(config, sweep, i, corner) for i, corner in enumerate(corners)]
        groups = group_runs(stand_ins)
        _check_values(config, sweep, corners, {structure(group.first) for group in groups})
        for group in groups:
            space = {key: _within(item, key, group.runs) for key, item in search.space.items()}
            found.append((group, space, changes))
    if len(found) > search.trials:
        raise ValueError(
            f"Search.trials = {search.trials}: the space makes {len(found)} groups "
            f"({', '.join(group.name for group, _, _ in found)}), which share them. Give at least "
            "one to each."
        )
    names = [group.name for group, _, _ in found]
    most = [_points(space) if search.sampler == "grid" else search.trials for _, space, _ in found]
    shares = deal(search.trials, most)
    return tuple(
        Field(
            group=dataclasses.replace(
                group, name=group.name if names.count(group.name) == 1 else f"{group.name}-{i + 1}"
            ),
            space=space,
            changes=changes,
            number=i,
            trials=shares[i],
            first=sum(shares[:i]),
        )
        for i, (group, space, changes) in enumerate(found)
    )


def deal(trials: int, most: Sequence[int]) -> list[int]:
    """How many trials each group gets: one in turn, none of them more than its `most`.

    >>> deal(7, [9, 9]), deal(7, [2, 9]), deal(7, [2, 3])
    ([4, 3], [2, 5], [2, 3])
    """
    shares = [0] * len(most)
    while left := min(trials, sum(most)) - sum(shares):
        takers = [i for i, share in enumerate(shares) if share < most[i]]
        for i in takers[:left]:
            shares[i] += 1
    return shares


def _corners(space: Mapping[str, Distribution]) -> Sequence[dict[str, Any]]:
    """Runs that have every program, size and length of the space between them."""
    columns = []
    for key, item in space.items():
        if not isinstance(item, Choice):
            columns.append([item.high])
        elif key in VALUES and not key.endswith(".dropout") and key != SCHEDULE:
            columns.append([item.values[0]])
        else:
            columns.append(list(item.values))
    return [dict(zip(space, row)) for row in itertools.product(*columns)]


def _within(item: Distribution, key: str, runs: Sequence[Run]) -> Distribution:
    """The part of a distribution whose runs are of a group."""
    if not isinstance(item, Choice) or key in VALUES:
        return item
    values = [run.changes.get(key) for run in runs]
    return Choice(tuple(value for value in item.values if value in values))


def _points(space: Mapping[str, Distribution]) -> int:
    return math.prod(len(item.values) for item in space.values() if isinstance(item, Choice))


def _check_values(
    config: ExperimentConfig,
    sweep: SweepConfig,
    corners: Sequence[Mapping[str, Any]],
    programs: set[str],
) -> None:
    """Tries each value of a choice and both ends of a range, the other keys as in a corner.

    Raises ValueError for one that no corner goes with, or that makes a program of its own.
    """
    assert sweep.search is not None
    for key, item in sweep.search.space.items():
        for value in item.values if isinstance(item, Choice) else (item.low, item.high):
            run = _run_with(config, sweep, corners, key, value)
            if run is not None and structure(run.config) not in programs:
                raise ValueError(
                    f"Search.space: {key} is a range, and each of its values would be another "
                    "program. Give a choice of some."
                )


def _run_with(
    config: ExperimentConfig,
    sweep: SweepConfig,
    corners: Sequence[Mapping[str, Any]],
    key: str,
    value: Any,
) -> Run | None:
    """A run with a value at a key; None where every corner leaves out the key's section."""
    refused = None
    for corner in corners:
        try:
            run = make_run(config, sweep, 0, {**corner, key: value})
        except ValueError as error:
            refused = refused or error
            continue
        if key in run.changes:
            return run
    if refused is not None:
        raise ValueError(
            f"Search.space: {key} = {value!r} cannot be, with the first values of the other keys: "
            f"{refused}"
        )
    return None
