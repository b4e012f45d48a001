"""Where a group's runs come from, and who is told how they do."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lorax_ft.sweeps.groups import Run


class Queue(Protocol):
    """Gives runs to slots that are free, and may end a run before its time."""

    def next(self) -> Run | None:
        """The next run that waits; None where none does."""
        ...

    def resumed(self, run: Run) -> None:
        """Takes a run out of those that wait: it goes on from a checkpoint."""
        ...

    def report(self, run: Run, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes in what an evaluation found; True where the run is to end there."""
        ...

    def finish(self, run: Run, results: Mapping[str, Any]) -> None:
        """Takes in what results.json of the run has."""
        ...


class ListQueue:
    """The runs of a list, in its order, each to its end."""

    def __init__(self, runs: Sequence[Run], prune: Callable[..., bool] | None = None):
        self._waiting = collections.deque(runs)
        self._prune = prune or (lambda run, step, metrics: False)

    def next(self) -> Run | None:
        return self._waiting.popleft() if self._waiting else None

    def resumed(self, run: Run) -> None:
        self._waiting = collections.deque(r for r in self._waiting if r.name != run.name)

    def report(self, run: Run, step: int, metrics: Mapping[str, float]) -> bool:
        return self._prune(run, step, metrics)

    def finish(self, run: Run, results: Mapping[str, Any]) -> None:
        del run, results
