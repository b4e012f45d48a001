"""Figures of a sweep: what its runs reached, by what they vary and by what they cost."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from lorax_ft.experiment import method_names
from lorax_ft.sweeps.directory import RUNS, Row
from lorax_ft.sweeps.formats import Cell
from lorax_ft.sweeps.settings import SEEDS, flat_changes, group_settings
from lorax_ft.sweeps.tables import run_records
from lorax_ft.training.records import read_records

MOST_CURVES = 24  # of more, the best are drawn


def draw(
    rows: Sequence[Row], sweep_dir: pathlib.Path, target: pathlib.Path, *, metric: str, sign: int
) -> dict[str, str]:
    """Draws the figures that the runs have data for; titles by the names of their PNG files."""
    target.mkdir(parents=True, exist_ok=True)
    scored = [row for row in rows if math.isfinite(row.metric(metric))]
    finished = [row for row in scored if row.is_finished]
    drawn: dict[str, str] = {}

    def save(name: str, title: str, paint: Callable[[Any], bool]) -> None:
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # not pyplot: no global state, no display

        figure = Figure(figsize=(8, 4), layout="constrained")
        axis = figure.subplots()
        twenty = [colormaps["tab20"](i) for i in range(20)]  # pairs of a dark and a light one
        axis.set_prop_cycle(color=twenty[::2] + twenty[1::2])
        if paint(axis):
            figure.savefig(target / f"{name}.png", format="png", dpi=120)
            drawn[f"{name}.png"] = title

    for key in _numeric_keys(finished):
        name = f"by_{key.rpartition('.')[2]}"
        save(name, f"{metric} by {key}", lambda axis, key=key: _by_key(axis, finished, key, metric))
    save(
        "by_trainable_share",
        f"{metric} by trainable share",
        lambda axis: _points(axis, scored, metric, "trainable share", _share, log=True),
    )
    save(
        "by_cost",
        f"{metric} by time",
        lambda axis: _points(axis, scored, metric, "seconds of training", _seconds),
    )
    best = sorted(scored, key=lambda row: -sign * row.metric(metric))[:MOST_CURVES]
    save(
        "learning_curves",
        f"{metric.partition('.')[2]} of the validation split by step",
        lambda axis: _curves(axis, best, sweep_dir, metric.partition(".")[2]),
    )
    save(
        "parallel_coordinates",
        "all that varies, and what came of it",
        lambda axis: _parallel(axis, scored, metric),
    )
    return drawn


def _by_key(axis: Any, rows: Sequence[Row], key: str, metric: str) -> bool:
    """Means over seeds by a number that varies, a line for each setting of the rest."""
    numbered = [row for row in rows if _number(row, key) is not None]
    lines = group_settings(numbered, without=key)
    for line in sorted(lines, key=lambda line: line.text):
        points: dict[float, list[float]] = {}
        for row in line.rows:
            points.setdefault(float(flat_changes(row)[key]), []).append(row.metric(metric))
        xs = sorted(points)
        means = [float(np.mean(points[x])) for x in xs]
        errors = [float(np.std(points[x], ddof=1)) if len(points[x]) > 1 else 0.0 for x in xs]
        name = line.text[:40]
        axis.errorbar(xs, means, errors, marker="o", markersize=4, capsize=3, label=name)
    values = sorted({float(flat_changes(row)[key]) for row in numbered})
    if values[0] > 0 and values[-1] / values[0] >= 8:
        axis.set_xscale("log", base=2 if all(v == int(v) for v in values) else 10)
    _finish(axis, key, metric, len(lines))
    return True


def _points(
    axis: Any,
    rows: Sequence[Row],
    metric: str,
    label: str,
    value: Callable[[Row], float],
    log: bool = False,
) -> bool:
    """Each run a point, each method a colour."""
    for method in dict.fromkeys(method_names(row.config) for row in rows):
        chosen = [row for row in rows if method_names(row.config) == method]
        xs, ys = [value(row) for row in chosen], [row.metric(metric) for row in chosen]
        axis.scatter(xs, ys, s=20, label=method)
    if log and rows:
        axis.set_xscale("log")
    _finish(axis, label, metric, len({method_names(row.config) for row in rows}))
    return len({value(row) for row in rows}) > 1


def _curves(axis: Any, rows: Sequence[Row], sweep_dir: pathlib.Path, name: str) -> bool:
    drawn = 0
    for row in rows:
        records = read_records(sweep_dir / RUNS / row.name)
        points = [
            (r["step"], r[name]) for r in records if r["kind"] == "eval" and r.get(name) is not None
        ]
        if len(points) > 1:
            axis.plot(*zip(*points), marker=".", label=row.name[:40])
            drawn += 1
    _finish(axis, "step", name, drawn)
    return drawn > 0


def _parallel(axis: Any, rows: Sequence[Row], metric: str) -> bool:
    """Each run a line over axes of their own scale, coloured by what it reached."""
    records = run_records(rows)
    names = [name for name in _varying(rows, records) if name != metric]
    if not names or len(rows) < 2:
        return False
    names.append(metric)
    columns = [_positions([record.get(name) for record in records]) for name in names]
    colours = columns[-1]
    from matplotlib import colormaps

    for i in range(len(records)):
        line = [column[i] for column in columns]
        axis.plot(range(len(names)), line, color=colormaps["viridis"](colours[i]), alpha=0.7)
    axis.set_xticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    for x, name in enumerate(names):
        _label_axis(axis, x, [record.get(name) for record in records])
    axis.set_yticks([])
    return True


def _label_axis(axis: Any, x: int, values: list[Cell]) -> None:
    """The smallest and the largest value beside an axis of the parallel coordinates."""
    positions = _positions(values)
    for pick in (min, max):
        i = pick(range(len(values)), key=lambda j: positions[j])
        value = values[i]
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        offset = -9 if pick is min else 4
        axis.annotate(
            text, (x, positions[i]), (0, offset), textcoords="offset points", ha="center", size=7
        )


def _positions(values: list[Cell]) -> list[float]:
    """Where values lie between 0 and 1: numbers by size (or its logarithm), others by order."""
    numbers = np.array([float(v) for v in values if _is_number(v)])  # type: ignore[arg-type]
    if len(numbers) == len(values):
        if numbers.min() > 0 and numbers.max() / numbers.min() >= 8:
            numbers = np.log(numbers)
        spread = numbers.max() - numbers.min()
        return ((numbers - numbers.min()) / spread if spread else numbers * 0 + 0.5).tolist()
    order = sorted({str(v) for v in values})
    return [order.index(str(v)) / max(1, len(order) - 1) for v in values]


def _varying(rows: Sequence[Row], records: Sequence[Mapping[str, Cell]]) -> list[str]:
    """The columns that runs differ in by choice: methods, seeds and changed keys."""
    changed = {key for row in rows for key in flat_changes(row)}
    names = ["method", "seed", *(name for name in records[0] if name in changed)]
    return [
        name
        for name in dict.fromkeys(names)
        if len({str(record.get(name)) for record in records}) > 1
    ]


def _numeric_keys(rows: Sequence[Row]) -> list[str]:
    """Changed keys, but for seeds, that have numbers of two sizes or more."""
    keys = dict.fromkeys(key for row in rows for key in flat_changes(row) if key not in SEEDS)
    return [key for key in keys if len({_number(row, key) for row in rows} - {None}) > 1]


def _number(row: Row, key: str) -> float | None:
    value = flat_changes(row).get(key)
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(row: Row) -> float:
    counts = row.results["parameters"]
    return counts["trainable"] / counts["total"]


def _seconds(row: Row) -> float:
    return float(row.results["seconds"])


def _finish(axis: Any, xlabel: str, ylabel: str, lines: int) -> None:
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if 0 < lines <= MOST_CURVES:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside, over nothing
