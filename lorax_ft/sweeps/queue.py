"""Where a group's runs come from, and who is told how they do."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lorax_ft.sweeps.groups import Run
from lorax_ft.sweeps.halving import Rungs


class Queue(Protocol):
    """Gives runs to slots that are free, and may end a run before its time."""

    def next(self) -> Run | None:
        """The next run that waits; None where none does."""
        ...

    def known(self, name: str) -> Run:
        """The run of a name that this queue gave once."""
        ...

    def resumed(self, run: Run) -> None:
        """Takes a run out of those that wait: it goes on from a checkpoint."""
        ...

    def expect(self, first: int | None, last: int) -> None:
        """Takes in when a run is first evaluated before its end, if at all, and the longest's end.

        Told before any run is given.
        """
        ...

    def asks(self, run: Run, step: int) -> bool:
        """Whether the run is to be evaluated at this step, even if its config does not say so."""
        ...

    def report(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in what a run's evaluation on the validation split found."""
        ...

    def prunes(self, run: Run, step: int) -> bool:
        """Whether the run is to end at the step that it reported; asked when all have reported."""
        ...

    def finish(self, run: Run, results: Mapping[str, Any]) -> None:
        """Takes in what results.json of the run has."""
        ...


class ListQueue:
    """The runs of a list, in its order; each to its end, or as far as halving lets it go."""

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        rungs: Rungs | None = None,
        metric: str = "accuracy",
        sign: int = 1,
    ):
        self._runs = {run.name: run for run in runs}
        self._waiting = collections.deque(runs)
        self._rungs, self._metric, self._sign = rungs, metric, sign

    @property
    def waiting(self) -> tuple[Run, ...]:
        """The runs that are still to be given."""
        return tuple(self._waiting)

    def next(self) -> Run | None:
        return self._waiting.popleft() if self._waiting else None

    def known(self, name: str) -> Run:
        return self._runs[name]

    def resumed(self, run: Run) -> None:
        self._waiting = collections.deque(r for r in self._waiting if r.name != run.name)

    def expect(self, first: int | None, last: int) -> None:
        del first, last

    def asks(self, run: Run, step: int) -> bool:
        del run
        return self._rungs is not None and self._rungs.has(step)

    def report(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        if self._rungs is not None:
            value = metric_of(metrics, self._metric)
            self._rungs.report(run.name, step, self._sign * value)

    def prunes(self, run: Run, step: int) -> bool:
        return self._rungs is not None and self._rungs.prunes(run.name, step)

    def finish(self, run: Run, results: Mapping[str, Any]) -> None:
        del run, results


def metric_of(metrics: Mapping[str, float], name: str) -> float:
    """A metric of an evaluation. Raises ValueError where it has none of that name."""
    if name not in metrics:
        raise ValueError(
            f"SweepConfig.metric: the evaluation has no {name!r}, only {', '.join(metrics)}."
        )
    return metrics[name]
