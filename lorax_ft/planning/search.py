"""The largest batch or length that fits, found by few compiles: bytes grow about linearly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lorax_ft.config import ExperimentConfig
from lorax_ft.planning.plan import Plan

COMPILES = 6  # at most, beside the first
CLOSE = 0.04  # of what fits: no further compile for less
LENGTHS = 64  # lengths are multiples of it
GROWING = ("batch", "padding", "logits", "activations")  # parts that grow with batch and length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Largest:
    """What was found of one size, "batch" or "length"."""

    what: str
    plan: Plan | None  # of the largest that fits; None where not even the smallest does
    size: int
    refused: int | None  # the smallest that was tried and does not fit; None where all did
    compiles: int

    @property
    def is_last(self) -> bool:
        """Whether it is the longest that the model has positions for, so that none is longer."""
        longest = None if self.plan is None else self.plan.longest
        return self.what == "length" and longest is not None and self.size > longest - LENGTHS


def largest(
    config: ExperimentConfig, first: Plan, what: str, make: Callable[[ExperimentConfig], Plan]
) -> Largest:
    """The largest batch size or length of a config, whose own plan is `first`.

    Tries where a line through two sizes meets the memory there is, at first one from what does not
    grow. `make` plans a config on the same target. A batch is divided by data × fsdp ×
    accumulation; a length is a multiple of 64, and of no more tokens than the model has positions
    for.
    """
    unit, most = _unit(config, first, what)
    tried: dict[int, Plan] = {first.batch_size if what == "batch" else first.length: first}
    for _ in range(COMPILES):
        size = _next(tried, unit, most)
        if size is None:
            break
        tried[size] = make(sized(config, what, size))
    fitting = [size for size, plan in tried.items() if plan.fits]
    refused = [size for size, plan in tried.items() if not plan.fits]
    best = max(fitting, default=0)
    return Largest(
        what=what,
        plan=tried.get(best),
        size=best,
        refused=min((size for size in refused if size > best), default=None),
        compiles=len(tried) - 1,
    )


def sized(config: ExperimentConfig, what: str, size: int) -> ExperimentConfig:
    """The config with another batch size, or with rows of another length."""
    data = config.data
    if what == "batch":
        data = dataclasses.replace(data, loader=dataclasses.replace(data.loader, batch_size=size))
        return dataclasses.replace(config, data=data)
    kept = tuple(bucket for bucket in data.loader.buckets if bucket < size)
    loader = dataclasses.replace(data.loader, buckets=(*kept, size))
    field = "length" if hasattr(data.task, "length") else "max_length"
    task = dataclasses.replace(data.task, **{field: min(size, data.task.max_length)})
    packed = None if data.packed_length is None else size
    data = dataclasses.replace(data, loader=loader, task=task, packed_length=packed)
    return dataclasses.replace(config, data=data)


def _unit(config: ExperimentConfig, first: Plan, what: str) -> tuple[int, int | None]:
    """What sizes are multiples of, and the largest that may be tried."""
    if what == "batch":
        return first.mesh.rows * config.train.accumulation, None
    return LENGTHS, None if first.longest is None else first.longest // LENGTHS * LENGTHS


def _next(tried: dict[int, Plan], unit: int, most: int | None) -> int | None:
    """The size to try next; None where it is known closely enough."""
    fitting = [size for size, plan in tried.items() if plan.fits]
    refused = [size for size, plan in tried.items() if not plan.fits]
    low, high = max(fitting, default=0), min(refused, default=None)
    if most is not None and (high is None or most < high):
        if low >= most:
            return None
        top = most
    else:
        top = None if high is None else high - unit
    if top is not None and top - low < max(unit, CLOSE * low):
        return None
    guess = _guess(tried)
    if guess is None:  # none with numbers
        guess = 2 * low if high is None else (low + high) // 2
    size = max(unit, int(guess) // unit * unit)
    size = max(size, low // unit * unit + unit)
    size = size if top is None else min(size, max(top // unit * unit, unit))
    size = min(size, 16 * max(low, unit)) if high is None else size
    return None if size in tried else size


def _guess(tried: dict[int, Plan]) -> float | None:
    """Where a line through the two sizes nearest the limit meets it.

    One size makes a line with what a step of size zero takes, too steep since some activations do
    not grow, so that its guess is one that fits.
    """
    points = {size: plan.needed for size, plan in tried.items() if plan.needed is not None}
    first = next(iter(tried.values()))
    limit = first.usable
    if limit is None or not points:
        return None
    if len(points) == 1:
        points[0] = sum(size for part, size in first.parts.items() if part not in GROWING)
    nearest = sorted(points, key=lambda size: abs(points[size] - limit))[:2]
    low, high = sorted(nearest)
    slope = (points[high] - points[low]) / (high - low)
    return low + (limit - points[low]) / slope if slope > 0 else None
