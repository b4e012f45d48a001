"""Tables of a sweep: its runs, and means over seeds with intervals and comparisons.

Means are over the runs that finished, early stops among them, and so are comparisons. Of the
others, which were pruned, diverged or collapsed, the column `unfinished` says how many there are;
`warnings` is of how many finished runs there is something to warn of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lorax_ft.config import flat
from lorax_ft.experiment import method_names
from lorax_ft.sweeps.directory import Row
from lorax_ft.sweeps.reports.formats import Cell, text_table
from lorax_ft.sweeps.reports.settings import (
    Setting,
    best_by_method,
    flat_changes,
    group_settings,
    ranked,
    unfinished,
    warned,
)
from lorax_ft.sweeps.reports.statistics import Summary, compare, holm

OPTIONAL = (  # columns that are left out where no record has anything there
    *("unfinished", "warnings", "warning"),
    *("difference", "difference low", "difference high", "p", "p Holm"),
)


def results_table(rows: Sequence[Row], metric: str, sign: int) -> str:
    """The runs that have ended as lines of text, the best first."""

    def order(row: Row) -> float:
        value = row.metric(metric)
        return -sign * value if math.isfinite(value) else math.inf

    shown = [
        {"run": row.name, metric: row.metric(metric), **_cost(row)}
        for row in sorted(rows, key=order)
    ]
    return text_table(shown)


def run_records(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """A flat record of each run: what it changes, all its metrics, what it cost, its warnings.

    Every record has the same keys; what a run does not have is None.
    """
    changes = [
        {key: _cell(value) for key, value in flat_changes(row).items() if value not in (None, {})}
        for row in rows
    ]
    changed = dict.fromkeys(key for row in changes for key in row if key != "seed")
    metrics = [
        {key.removeprefix("."): v for key, v in flat(row.results["metrics"], "").items()}
        for row in rows
    ]
    measured = dict.fromkeys(name for row in metrics for name in row)
    return _even(
        [
            {"run": row.name, "method": method_names(row.config), "seed": row.config.seed}
            | {key: change.get(key) for key in changed}
            | {name: found.get(name) for name in measured}
            | _cost(row)
            | {"warning": " ".join(dict.fromkeys(row.results["warnings"])) or None}
            for row, change, found in zip(rows, changes, metrics)
        ]
    )


def settings_table(rows: Sequence[Row], metric: str, sign: int) -> list[dict[str, Cell]]:
    """A record for each setting: its mean over seeds, the deviation and the interval of the mean.

    The best setting is first; those of which no run finished are last, without a mean.
    """
    settings = group_settings(rows)
    order = ranked(settings, metric, sign)
    order += [setting for setting in settings if not setting.summary(metric).count]
    return _even(
        [{"setting": s.text, **_summary(s.summary(metric)), **_troubles(s)} for s in order]
    )


def comparisons_table(rows: Sequence[Row], metric: str, sign: int) -> list[dict[str, Cell]]:
    """Each method at its best setting against the best method at its own, paired by seed.

    One setting for all methods would compare settings. Settings are chosen by `metric`; what they
    are compared by is `judge(rows, metric)`, which no choice was made by where there is such a one.
    A method of which no run finished is last, with all its runs counted.
    """
    judged = judge(rows, metric)
    best = best_by_method(group_settings(rows), metric, sign)
    records: list[dict[str, Cell]] = []
    for setting, difference in zip(best.values(), _differences(list(best.values()), judged)):
        counts = setting.rows[0].results["parameters"]
        record: dict[str, Cell] = {"method": setting.method, "setting": setting.text}
        record |= {"trainable": counts["trainable"], "share": counts["trainable"] / counts["total"]}
        if judged != metric:
            record[metric] = setting.summary(metric).mean
        records.append(record | _summary(setting.summary(judged)) | _troubles(setting) | difference)
    for name in dict.fromkeys(method_names(row.config) for row in rows):
        if name not in best:
            runs = [row for row in rows if method_names(row.config) == name]
            records.append({"method": name, "unfinished": unfinished(runs)})
    return _even(records)


def settings_comparisons(rows: Sequence[Row], metric: str, sign: int) -> list[dict[str, Cell]]:
    """Each setting against the best one, of whatever method, paired by seed.

    The best is chosen by `metric`, and they are compared by `judge(rows, metric)`. Empty where no
    two settings have two seeds in common, for then there is nothing to tell from chance.
    """
    judged = judge(rows, metric)
    order = ranked(group_settings(rows), metric, sign)
    differences = _differences(order, judged)
    if not any(difference.get("difference low") is not None for difference in differences):
        return []
    return _even(
        [
            {"setting": s.text, judged: s.summary(judged).mean, **_troubles(s), **difference}
            for s, difference in zip(order, differences)
        ]
    )


def judge(rows: Sequence[Row], metric: str) -> str:
    """The same metric of the test split where finished runs have it, else `metric` itself."""
    test = f"test.{metric.partition('.')[2]}"
    return test if any(r.is_finished and math.isfinite(r.metric(test)) for r in rows) else metric


def _differences(settings: Sequence[Setting], metric: str) -> list[dict[str, Cell]]:
    """How each setting differs from the first, seed by seed; of the first itself, nothing.

    "p Holm" is p corrected for as many tests as there are here.
    """
    first, *others = [setting.values(metric) for setting in settings] or [{}]
    found = [compare(values, first) for values in others]
    corrected = holm([comparison.p for comparison in found])
    return [
        {},
        *(
            {
                "difference": comparison.difference,
                "difference low": comparison.low,
                "difference high": comparison.high,
                "p": comparison.p,
                "p Holm": p,
                "pairs": comparison.pairs,
            }
            for comparison, p in zip(found, corrected)
        ),
    ]


def _summary(summary: Summary) -> dict[str, Cell]:
    return {
        "mean": summary.mean if summary.count else None,
        "deviation": summary.deviation,
        "low": summary.low,
        "high": summary.high,
        "seeds": summary.count,
    }


def _troubles(setting: Setting) -> dict[str, Cell]:
    return {"unfinished": unfinished(setting.rows), "warnings": warned(setting.finished) or None}


def _cost(row: Row) -> dict[str, Cell]:
    results = row.results
    counts = results["parameters"]
    return {
        "outcome": results["outcome"],
        "steps": results["step"],
        "trainable": counts["trainable"],
        "share": counts["trainable"] / counts["total"],
        "seconds": round(results["seconds"], 2),
    }


def _even(records: Sequence[dict[str, Cell]]) -> list[dict[str, Cell]]:
    """The records with the same keys in all of them, but for those that none needs."""
    names = dict.fromkeys(name for record in records for name in record)
    kept = [
        name
        for name in names
        if name not in OPTIONAL or any(r.get(name) is not None for r in records)
    ]
    return [{name: record.get(name) for name in kept} for record in records]


def _cell(value: Any) -> Cell:
    return value if isinstance(value, str | int | float) else json.dumps(value)
