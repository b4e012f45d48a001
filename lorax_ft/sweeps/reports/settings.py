"""Settings of a sweep: its runs but for their seeds, told apart by content and shown as text."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from lorax_ft.config import flat
from lorax_ft.experiment import method_names
from lorax_ft.sweeps.directory import Row
from lorax_ft.sweeps.reports.formats import cell_text
from lorax_ft.sweeps.reports.statistics import Summary, summarize

SEEDS = ("seed", "data.loader.seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that change the same but for their seeds.

    Its numbers are those of the runs that finished, early stops among them. A run that was pruned,
    diverged or collapsed was trained for less than the others: it enters no mean, but is counted.
    """

    text: str  # what its runs change, in words that no other setting of the sweep has
    rows: tuple[Row, ...]

    @property
    def method(self) -> str:
        return method_names(self.rows[0].config)

    @property
    def finished(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.is_finished)

    def values(self, metric: str) -> dict[tuple[int, int], float]:
        """A metric of the finished runs by their seeds; NaN where a run does not have it."""
        return {row.seeds: row.metric(metric) for row in self.finished}

    def summary(self, metric: str) -> Summary:
        """A metric over the finished runs."""
        return summarize(self.values(metric).values())


def group_settings(rows: Sequence[Row], *, without: str | None = None) -> list[Setting]:
    """The settings of runs, in the order that they first appear in.

    Two runs are of one setting where their changes are exactly alike, but for seeds and for the
    dotted key `without`. What two settings would be shown alike by is shown to more digits.
    """
    left_out = {*SEEDS, without}
    found: dict[str, list[Row]] = {}
    for row in rows:
        content = {key: v for key, v in flat_changes(row).items() if key not in left_out}
        found.setdefault(json.dumps(content, sort_keys=True), []).append(row)
    texts = _texts({key: members[0] for key, members in found.items()}, left_out)
    return [Setting(text=texts[key], rows=tuple(members)) for key, members in found.items()]


def ranked(settings: Sequence[Setting], metric: str, sign: int) -> list[Setting]:
    """The settings of which a finished run has the metric, that with the best mean first."""
    scored = [setting for setting in settings if setting.summary(metric).count]
    return sorted(scored, key=lambda setting: -sign * setting.summary(metric).mean)


def best_by_method(settings: Sequence[Setting], metric: str, sign: int) -> dict[str, Setting]:
    """Each method's best setting, the best method first; of a method without any, none."""
    best: dict[str, Setting] = {}
    for setting in ranked(settings, metric, sign):
        best.setdefault(setting.method, setting)
    return best


def unfinished(rows: Sequence[Row]) -> str | None:
    """How many of the runs did not finish and why, such as "pruned 2, diverged 1"."""
    counts = collections.Counter(row.results["outcome"] for row in rows if not row.is_finished)
    return ", ".join(f"{outcome} {count}" for outcome, count in counts.items()) or None


def warned(rows: Sequence[Row]) -> int:
    """How many of the runs warn of what they became, such as a classifier of one answer."""
    return sum(bool(row.results["warnings"]) for row in rows)


def flat_changes(row: Row) -> dict[str, Any]:
    """What a run changes, by dotted keys all the way: `lora={"rank": 8}` is `lora.rank`."""
    return {key.removeprefix("."): value for key, value in flat(row.changes, "").items()}


def _texts(examples: Mapping[str, Row], left_out: Collection[str | None]) -> dict[str, str]:
    """A text for each setting, of as many digits as tell it from the others."""
    texts: dict[str, str] = {}
    alike = list(examples)
    for show in (cell_text, *(functools.partial(_in_digits, digits=n) for n in range(5, 18))):
        for key in alike:
            words = " ".join(_words(examples[key].changes, show, left_out))
            texts[key] = words or method_names(examples[key].config)
        counts = collections.Counter(texts.values())
        alike = [key for key in alike if counts[texts[key]] > 1]
    return texts | {key: key for key in alike}  # they differ in what words do not say


def _words(
    changes: Mapping[str, Any],
    show: Callable[[Any], str],
    left_out: Collection[str | None],
    section: str = "",
) -> Iterator[str]:
    for key, value in changes.items():
        name = f"{section}{key}"
        if value is None or name in left_out:
            continue
        if isinstance(value, Mapping):
            inner = ", ".join(_words(value, show, left_out, f"{name}."))
            yield f"{key}({inner})" if inner else key
        else:
            yield f"{key}={show(value)}"


def _in_digits(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else cell_text(value)
