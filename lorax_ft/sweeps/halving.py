"""Successive halving: which runs go on past a rung, decided when each comes there."""

from __future__ import annotations

import json
import math
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
        # step: run: [value, or None for one that is not finite; whether it goes on]
        self._rungs: dict[str, dict[str, list]] = read_json(path) if path.exists() else {}

    def has(self, step: int) -> bool:
        """Whether runs are evaluated at this step, and may end."""
        return is_rung(step, self._halving)

    def report(self, run: str, step: int, value: float) -> None:
        """Takes in what a run's evaluation at a step was worth, more being better.

        What is not finite is worth less than all else, and its run does not go on.
        """
        if self.has(step):
            entry = [value if math.isfinite(value) else None, None]
            self._rungs.setdefault(str(step), {}).setdefault(run, entry)

    def prunes(self, run: str, step: int) -> bool:
        """Whether a run is to end at a step that it reported."""
        if not self.has(step):
            return False
        rung = self._rungs[str(step)]
        value, goes_on = rung[run]
        if goes_on is None:
            finite = (entry[0] for entry in rung.values() if entry[0] is not None)
            kept = max(1, len(rung) // self._halving.factor)
            best = sorted(finite, reverse=True)[:kept]
            rung[run][1] = goes_on = value is not None and value >= best[-1]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_text(self._path, json.dumps(self._rungs))
        return not goes_on


def is_rung(step: int, halving: Halving) -> bool:
    """Whether runs may end at this step.

    >>> [step for step in range(1, 500) if is_rung(step, Halving(first=50, factor=3))]
    [50, 150, 450]
    """
    rung = halving.first
    while rung < step:
        rung *= halving.factor
    return rung == step
