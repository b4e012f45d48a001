"""Tables of a sweep: its runs, and means over seeds with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.experiment import method_names
from lorax_ft.sweeps.directory import Row
from lorax_ft.sweeps.formats import Cell, cell_text, text_table
from lorax_ft.sweeps.statistics import Summary, compare, summarize


def results_table(rows: Sequence[Row], metric: str, sign: int) -> str:
    """The finished runs as lines of text, the best first."""

    def order(row: Row) -> float:
        value = row.metric(metric)
        return -sign * value if math.isfinite(value) else math.inf

    shown = [
        {"run": row.name, metric: row.metric(metric), **_cost(row)}
        for row in sorted(rows, key=order)
    ]
    return text_table(shown)


def run_records(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """A flat record of each run: what it changes, all its metrics, what it cost.

    Every record has the same keys; what a run does not have is None.
    """
    records = []
    for row in rows:
        record: dict[str, Cell] = {"run": row.name, "method": method_names(row.config)}
        record["seed"] = row.config.seed
        for key, value in row.changes.items():
            if not isinstance(value, Mapping) and value is not None and key != "seed":
                record[key] = value if isinstance(value, str | int | float) else json.dumps(value)
            elif isinstance(value, Mapping):
                record |= {f"{key}.{name}": _cell(inner) for name, inner in value.items()}
        for part, metrics in row.results["metrics"].items():
            record |= {f"{part}.{name}": value for name, value in metrics.items()}
        records.append(record | _cost(row))
    names = list(dict.fromkeys(name for record in records for name in record))
    return [{name: record.get(name) for name in names} for record in records]


def settings_table(rows: Sequence[Row], metric: str, sign: int) -> list[dict[str, Cell]]:
    """A record for each setting: its mean over seeds, the deviation and the interval of the mean.

    Runs that differ in their seed alone are of one setting. The best setting is first.
    """
    found = [
        (summary, setting)
        for setting, summary in summarize(_by_setting(rows, metric)).items()
        if summary.count
    ]
    found.sort(key=lambda pair: -sign * pair[0].mean)
    return [{"setting": setting, **_summary(summary)} for summary, setting in found]


def comparisons_table(rows: Sequence[Row], metric: str, sign: int) -> list[dict[str, Cell]]:
    """Each method at its best setting against the best method at its own, paired by seed.

    One setting for all methods would compare settings. Settings are chosen by `metric`; what they
    are compared by is `judge(rows, metric)`, which no choice was made by where there is such a one.
    """
    scores, held_out = _by_setting(rows, metric), _by_setting(rows, judge(rows, metric))
    chosen_by = summarize(scores)
    examples = {setting_of(row): row for row in rows}
    best: dict[str, str] = {}  # the setting of each method
    for setting, row in examples.items():
        name = method_names(row.config)
        if chosen_by[setting].count and (
            name not in best or sign * chosen_by[setting].mean > sign * chosen_by[best[name]].mean
        ):
            best[name] = setting
    ranked = sorted(best, key=lambda name: -sign * chosen_by[best[name]].mean)
    summaries = summarize(held_out)
    records: list[dict[str, Cell]] = []
    for name in ranked:
        setting, counts = best[name], examples[best[name]].results["parameters"]
        record: dict[str, Cell] = {"method": name, "setting": setting}
        record |= {"trainable": counts["trainable"], "share": counts["trainable"] / counts["total"]}
        if held_out != scores:
            record[metric] = chosen_by[setting].mean
        record |= _summary(summaries[setting])
        if name != ranked[0]:
            found = compare(held_out[setting], held_out[best[ranked[0]]])
            record |= {
                "difference": found.difference,
                "difference low": found.low,
                "difference high": found.high,
                "p": found.p,
                "pairs": found.pairs,
            }
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    return [{name: record.get(name) for name in names} for record in records]


def judge(rows: Sequence[Row], metric: str) -> str:
    """The same metric of the test split where the runs have it, else `metric` itself."""
    test = f"test.{metric.partition('.')[2]}"
    return test if any(math.isfinite(row.metric(test)) for row in rows) else metric


def setting_of(row: Row) -> str:
    """What a run changes but for its seed, in words."""
    parts = []
    for key, value in row.changes.items():
        if key in ("seed", "data.loader.seed") or value is None:
            continue
        if isinstance(value, Mapping):
            inner = ", ".join(f"{name}={cell_text(v)}" for name, v in value.items())
            parts.append(f"{key}({inner})" if inner else key)
        else:
            parts.append(f"{key}={cell_text(value)}")
    return " ".join(parts) or method_names(row.config)


def _by_setting(rows: Sequence[Row], metric: str) -> dict[str, dict[int, float]]:
    """A metric by setting and seed."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(setting_of(row), {})[row.config.seed] = row.metric(metric)
    return found


def _summary(summary: Summary) -> dict[str, Cell]:
    return {
        "mean": summary.mean,
        "deviation": summary.deviation,
        "low": summary.low,
        "high": summary.high,
        "seeds": summary.count,
    }


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


def _cell(value: Any) -> Cell:
    return value if isinstance(value, str | int | float) or value is None else json.dumps(value)
