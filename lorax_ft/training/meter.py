"""The meter of a training loop: averages, speeds, and the count of steps that were not finite."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lorax_ft.training import flops
from lorax_ft.training.step import signature
from lorax_ft.training.tally import Tally

# A step's metrics are read when this many later ones are under way: the device never waits for the
# host, and the host is never far ahead of it.
LAG = 2


class Meter:
    """Runs steps and measures them; `close` gives the numbers since the `close` before.

    Speeds leave out steps that compiled, and whatever happens between a `close` and the next step.
    """

    def __init__(self, *, nonfinite: int = 0, peak_flops: float | None = None, shares: int = 1):
        self._tally = Tally(nonfinite=nonfinite)
        self._shares = shares  # of a batch: this process sees one of them
        self.last_loss: float | None = None  # None until a step has been read
        self._last_speed = 0.0  # of the time before the last `close`
        self._peak_flops = peak_flops  # of all devices together
        self._flops_of: dict[Any, float] = {}  # by the shapes of the batch
        self._unread: collections.deque[tuple[dict[str, jax.Array], Any]] = collections.deque()
        self._clear()

    def run(
        self, step: Callable[..., Any], arguments: tuple[Any, ...], batch: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """`step(*arguments)` without its metrics, which are taken in; `batch` is the host's."""
        shapes = signature(batch)
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        if shapes in self._flops_of:
            train, opt_state, metrics = step(*arguments)
            tokens = count_tokens(batch)
            self._flops += self._flops_of[shapes]
        else:
            self._flops_of[shapes] = self._count_flops(step, arguments)
            train, opt_state, metrics = jax.block_until_ready(step(*arguments))
            self._untimed += time.perf_counter() - now
            tokens = (0, 0)
        self._unread.append((metrics, tokens))
        while len(self._unread) > LAG:
            self._read()
        return train, opt_state

    @property
    def nonfinite(self) -> int:
        """How many steps of the run were skipped, of those that were read."""
        return self._tally.nonfinite

    @property
    def is_empty(self) -> bool:
        """Whether no step was run since the last `close`."""
        return self._started is None

    def close(self) -> dict[str, float | None]:
        """Waits for the device and gives the numbers by name; None for what no step told."""
        while self._unread:
            self._read()
        values = self._tally.close()
        seconds = self._seconds()
        if self._tokens[1] and seconds > 0:
            real, padded = (self._tokens * self._shares / seconds).tolist()
            self._last_speed = real
            values |= {"tokens_per_second": real, "padded_tokens_per_second": padded}
            if self._peak_flops and self._flops:
                values["model_flops_utilisation"] = self._flops / seconds / self._peak_flops
        self._clear()
        return values

    def tokens_per_second(self) -> float:
        """Real tokens a second since the last `close`, of all processes; where it is too early to
        tell, those before it, or 0."""
        seconds = self._seconds()
        if not self._tokens[0] or seconds <= 0:
            return self._last_speed
        return float(self._tokens[0]) * self._shares / seconds

    def _count_flops(self, step: Any, arguments: tuple[Any, ...]) -> float:
        # Tracing ahead costs nothing: the call that follows finds the trace.
        return flops.count_flops(step.trace(*arguments).jaxpr) if self._peak_flops else 0.0

    def _read(self) -> None:
        metrics, tokens = self._unread.popleft()
        metrics = jax.device_get(metrics)  # waits for the step, so that its tokens are done
        self._tokens += tokens
        self._tally.add({name: float(value) for name, value in metrics.items()})
        self.last_loss = float(metrics["loss"])

    def _seconds(self) -> float:
        if self._started is None:
            return 0.0
        return time.perf_counter() - self._started - self._untimed

    def _clear(self) -> None:
        self._started: float | None = None
        self._untimed = self._flops = 0.0
        self._tokens = np.zeros(2)


def count_tokens(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(real, padded) tokens of a host's batch; rows of weight zero and masked places are padding.

    A batch without `input_ids` counts its rows.
    """
    places = batch.get("input_ids")
    if places is None:
        rows = len(next(iter(batch.values())))
        return rows, rows
    real = np.asarray(batch.get("attention_mask", np.ones(places.shape, np.int32))) > 0
    if "weights" in batch:
        real = real & (np.asarray(batch["weights"]) > 0)[:, None]
    return int(real.sum()), int(places.size)
