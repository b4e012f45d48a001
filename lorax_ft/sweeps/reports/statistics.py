"""Statistics over seeds: means, their intervals, and paired differences of two settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A setting over its seeds; what one seed alone cannot tell is None."""

    count: int  # seeds whose number is finite
    mean: float
    deviation: float | None  # of the sample
    low: float | None  # of the 95 % confidence interval of the mean, by Student's t
    high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How one setting differs from another on the seeds that both have."""

    pairs: int
    difference: float | None  # mean of the differences; None without a seed in common
    low: float | None  # of its 95 % confidence interval
    high: float | None
    p: float | None  # of the paired t-test, two-sided; None where there is none to be made


def summarize(values: Iterable[float]) -> Summary:
    """The summary of numbers of which each is another seed's."""
    finite = np.array([value for value in values if math.isfinite(value)])
    count = len(finite)
    mean = float(finite.mean()) if count else math.nan
    if count < 2:
        return Summary(count=count, mean=mean, deviation=None, low=None, high=None)
    from scipy import stats

    deviation = float(finite.std(ddof=1))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Summary(count=count, mean=mean, deviation=deviation, low=mean - reach, high=mean + reach)


def compare(one: Mapping[Any, float], other: Mapping[Any, float]) -> Comparison:
    """The differences `one - other`, seed by seed; keys are seeds.

    >>> found = compare({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.4, 1: 0.55, 2: 0.6})
    >>> found.pairs, f"{found.difference:.3f} {found.low:.3f} {found.high:.3f} p={found.p:.3f}"
    (3, '0.083 0.012 0.155 p=0.038')
    """
    seeds = sorted(set(one) & set(other))
    differences = [one[seed] - other[seed] for seed in seeds]
    summary = summarize(differences)
    p = None
    if summary.count > 1 and summary.deviation:
        from scipy import stats

        error = summary.deviation / math.sqrt(summary.count)
        p = float(2 * stats.t.sf(abs(summary.mean) / error, summary.count - 1))
    return Comparison(
        pairs=summary.count,
        difference=summary.mean if summary.count else None,
        low=summary.low,
        high=summary.high,
        p=p,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p values of several tests, corrected so that any false alarm at all is as rare as each.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none falls
    below the one before it (Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure").
    None is no test, and stays.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    tests = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, i) in enumerate(tests):
        least = max(least, min(1.0, (len(tests) - rank) * p))
        corrected[i] = least
    return corrected
