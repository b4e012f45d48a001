"""The tally of a run's steps: what a record of `metrics.jsonl` says of them."""

from __future__ import annotations

from collections.abc import Mapping


class Tally:
    """Adds up the metrics of steps; `close` gives the numbers since the `close` before."""

    def __init__(self, *, nonfinite: int = 0):
        self.nonfinite = nonfinite  # steps of the run that were skipped
        self._clear()

    @property
    def is_empty(self) -> bool:
        """Whether no step was added since the last `close`."""
        return not self._last

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes in the metrics of a step, as `training.step` names them."""
        self._last = dict(metrics)
        if metrics["finite"]:
            self._loss_sum += metrics["loss"] * metrics["weight"]
            self._weight += metrics["weight"]
        else:
            self.nonfinite += 1

    def close(self) -> dict[str, float | None]:
        """The mean loss over weights, and what the last step said."""
        values = {
            "loss": self._loss_sum / self._weight if self._weight else None,
            "gradient_norm": self._last.get("gradient_norm"),
            "learning_rate": self._last.get("learning_rate"),
            "nonfinite": self.nonfinite,
        }
        self._clear()
        return values

    def _clear(self) -> None:
        self._loss_sum = self._weight = 0.0
        self._last: dict[str, float] = {}
