"""Spaces: lists of what runs change of a config, and how lists make longer ones.

A run's changes are a dict from dotted keys of the config to values; a list of such dicts is a list
of runs. Every function here takes and gives plain lists, so a sweep file may also write one out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorax_ft.methods import METHODS

Changes = dict[str, Any]


def grid(values: Mapping[str, Sequence[Any]]) -> list[Changes]:
    """Every combination of the values of each key, the last key's changing fastest.

    >>> grid({"lora.rank": [1, 4], "seed": [0, 1]})[1:3]
    [{'lora.rank': 1, 'seed': 1}, {'lora.rank': 4, 'seed': 0}]
    """
    _check_lists("grid", values)
    return [dict(zip(values, row)) for row in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Changes]:
    """The first values of all keys together, then the second ones, and so on.

    >>> zipped({"lora.rank": [1, 4], "lora.alpha": [2.0, 8.0]})
    [{'lora.rank': 1, 'lora.alpha': 2.0}, {'lora.rank': 4, 'lora.alpha': 8.0}]
    """
    _check_lists("zipped", values)
    counts = {key: len(items) for key, items in values.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"zipped: every key needs as many values as the others, got {counts}.")
    return [dict(zip(values, row)) for row in zip(*values.values())]


def product(*lists: Sequence[Mapping[str, Any]]) -> list[Changes]:
    """Every combination of an entry of each list; a later list's keys win.

    >>> product([{"seed": 0}, {"seed": 1}], [{"lora.rank": 2}])
    [{'seed': 0, 'lora.rank': 2}, {'seed': 1, 'lora.rank': 2}]
    """
    combined = []
    for row in itertools.product(*lists):
        combined.append({key: value for changes in row for key, value in changes.items()})
    return combined


def method(name: str, **values: Any) -> Changes:
    """The changes that make a run's method `name`, with these values, and no other.

    >>> {key: value for key, value in method("ia3").items() if value is not None}
    {'ia3': {}}
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r} is none; expected one of {', '.join(METHODS)}.")
    return {**dict.fromkeys(METHODS), name: values}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    values: tuple[Any, ...]

    def __post_init__(self):
        if not self.values:
            raise ValueError("Choice.values is empty: expected at least one value.")

    @property
    def count(self) -> float:
        """How many values there are to draw."""
        return len({repr(value) for value in self.values})

    def draw(self, random: np.random.Generator) -> Any:
        return self.values[int(random.integers(len(self.values)))]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number between two, each as likely; or with `log` each ratio as likely."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        if not self.low < self.high or (self.log and self.low <= 0):
            floor = "0 < low < high" if self.log else "low < high"
            raise ValueError(f"Uniform: expected {floor}, got {self.low} and {self.high}.")

    @property
    def count(self) -> float:
        """How many values there are to draw."""
        return math.inf

    def draw(self, random: np.random.Generator) -> float:
        if self.log:
            return float(math.exp(random.uniform(math.log(self.low), math.log(self.high))))
        return float(random.uniform(self.low, self.high))


Distribution = Choice | Uniform


def choice(*values: Any) -> Choice:
    """One of the values."""
    return Choice(tuple(values))


def uniform(low: float, high: float) -> Uniform:
    """A float from `low` to `high`."""
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> Uniform:
    """A float from `low` to `high`, its logarithm uniform."""
    return Uniform(low, high, log=True)


def draws(count: int, space: Mapping[str, Distribution], *, seed: int = 0) -> list[Changes]:
    """That many runs, each value drawn from the distribution of its key, and no run twice.

    Raises ValueError where the space has fewer runs than that.

    >>> draws(2, {"lora.rank": choice(1, 2, 4)}, seed=1)
    [{'lora.rank': 2}, {'lora.rank': 4}]
    """
    if count < 1 or not space:
        raise ValueError(f"draws: expected at least one run and one key, got {count}, {space}.")
    most = math.prod(item.count for item in space.values())
    if count > most:
        raise ValueError(
            f"draws: {count} runs are asked for, and the space has {most:.0f}. Ask for no more, or "
            "use grid for all of them."
        )
    random = np.random.default_rng(seed)
    found: dict[str, Changes] = {}
    while len(found) < count:
        drawn = {key: item.draw(random) for key, item in space.items()}
        found.setdefault(repr(drawn), drawn)
    return list(found.values())


def _check_lists(function: str, values: Mapping[str, Sequence[Any]]) -> None:
    for key, items in values.items():
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise ValueError(f"{function}: {key} = {items!r}: expected a list of values.")
        if not items:
            raise ValueError(f"{function}: {key} has no values, so there would be no run.")
