"""Successive halving: which runs go on past a rung, decided when each comes there."""

from __future__ import annotations

import json
import pathlib

from lorax_ft import runs
from lorax_ft.models.tensor_files import read_json
from lorax_ft.sweeps.specification import Halving


class Rungs:
    """What runs scored at each rung, and which went on.

    What was decided is on disk before it is told, and is not decided anew: a sweep that was killed
    prunes the runs that it would have pruned.
    """

    def __init__(self, halving: Halving, path: pathlib.Path):
        self._halving, self._path = halving, path
        saved = read_json(path) if path.exists() else {"rungs": {}, "evaluations": {}}
        self._rungs: dict[str, dict[str, list]] = saved["rungs"]  # rung: run: [value, goes on]
        self._evaluations: dict[str, dict[str, int]] = saved["evaluations"]  # run: step: number

    def report(self, run: str, step: int, value: float) -> None:
        """Takes in what a run's evaluation at a step was worth, more being better."""
        counted = self._evaluations.setdefault(run, {})
        number = counted.setdefault(str(step), len(counted) + 1)
        if is_rung(number, self._halving):
            self._rungs.setdefault(str(number), {}).setdefault(run, [value, None])

    def prunes(self, run: str, step: int) -> bool:
        """Whether a run is to end at a step that it reported."""
        number = self._evaluations[run][str(step)]
        if not is_rung(number, self._halving):
            return False
        rung = self._rungs[str(number)]
        value, goes_on = rung[run]
        if goes_on is None:
            values = sorted((entry[0] for entry in rung.values()), reverse=True)
            kept = max(1, len(values) // self._halving.factor)
            rung[run][1] = goes_on = value >= values[kept - 1]
            content = {"rungs": self._rungs, "evaluations": self._evaluations}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_text(self._path, json.dumps(content))
        return not goes_on


def is_rung(number: int, halving: Halving) -> bool:
    """Whether the evaluation of this number, counted from 1, is one that runs may end at.

    >>> [n for n in range(1, 20) if is_rung(n, Halving(first=2, factor=3))]
    [2, 6, 18]
    """
    rung = halving.first
    while rung < number:
        rung *= halving.factor
    return rung == number
