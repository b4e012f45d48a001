"""Figures of a sweep: what its runs reached, by what they vary and by what they cost."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from lorax_ft.experiment import method_names
from lorax_ft.sweeps.directory import RUNS, Row
from lorax_ft.sweeps.reports.formats import Cell
from lorax_ft.sweeps.reports.settings import SEEDS, best_by_method, flat_changes, group_settings
from lorax_ft.sweeps.reports.tables import run_records
from lorax_ft.training.records import read_records

MOST_CURVES = 24  # of more, the best are drawn
LABEL = 40  # characters of a name in a legend
NOWHERE = -0.15  # on an axis from 0 to 1, of what has no value there


def draw(
    rows: Sequence[Row], sweep_dir: pathlib.Path, target: pathlib.Path, *, metric: str, sign: int
) -> dict[str, str]:
    """Draws the figures that the runs have data for; titles by the names of their PNG files.

    Beside each PNG file is the same as SVG. Means are over finished runs, as in the tables; where
    each run is drawn by itself, those that did not finish are hollow, or dotted.
    """
    target.mkdir(parents=True, exist_ok=True)
    scored = [row for row in rows if math.isfinite(row.metric(metric))]
    finished = [row for row in scored if row.is_finished]
    unlike = "" if len(finished) == len(scored) else "; {} are runs that did not finish"
    drawn: dict[str, str] = {}

    def save(name: str, title: str, paint: Callable[[Any], bool], panels: int = 1) -> None:
        if _save(target / name, paint, panels):
            drawn[f"{name}.png"] = title

    keys = _numeric_keys(finished)
    for key, name in zip(keys, _short_names(keys)):
        save(
            "by_" + re.sub(r"[^\w.=+-]+", "_", name),
            f"{metric} by {key}",
            lambda axis, key=key: _by_key(axis, finished, key, metric),
        )
    save(
        "by_trainable_share",
        f"{metric} by trainable share{unlike.format('hollow')}",
        lambda axis: _points(axis, scored, metric, "trainable share", _share, log=True),
    )
    save(
        "by_cost",
        f"{metric} by time{unlike.format('hollow')}",
        lambda axis: _points(axis, scored, metric, "seconds of training", _seconds),
    )
    save(
        "cost_by_method",
        "cost by method, each at its best setting",
        lambda axes: _costs(axes, finished, metric, sign),
        panels=2,
    )
    best = sorted(scored, key=lambda row: -sign * row.metric(metric))[:MOST_CURVES]
    save(
        "learning_curves",
        f"{metric.partition('.')[2]} of the validation split by step",
        lambda axis: _curves(axis, best, sweep_dir, metric.partition(".")[2]),
    )
    save(
        "parallel_coordinates",
        f"all that varies, and what came of it{unlike.format('dotted')}",
        lambda axis: _parallel(axis, scored, metric),
    )
    return drawn


def _save(path: pathlib.Path, paint: Callable[[Any], bool], panels: int) -> bool:
    """Writes a figure as PNG and SVG, if `paint`, which is given its axis or axes, had data."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(1, panels)
    twenty = [colormaps["tab20"](i) for i in range(20)]  # pairs of a dark and a light one
    for axis in figure.axes:
        axis.set_prop_cycle(color=twenty[::2] + twenty[1::2])
    if not paint(axes):
        return False
    figure.savefig(f"{path}.png", format="png", dpi=120)
    with rc_context({"svg.hashsalt": path.name}):  # the same data is the same file
        figure.savefig(f"{path}.svg", format="svg", metadata={"Date": None})
    return True


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
        name = _label(re.sub(r"\b(\w+\.)+(?=\w+=)", "", line.text))  # keys without their sections
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
    """Each run a point, each method a colour; hollow where a run did not finish."""
    for method in dict.fromkeys(method_names(row.config) for row in rows):
        chosen = [row for row in rows if method_names(row.config) == method]

        def scatter(finished: bool, chosen=chosen, **style: Any) -> Any:
            drawn = [row for row in chosen if row.is_finished == finished]
            ys = [row.metric(metric) for row in drawn]
            return axis.scatter([value(row) for row in drawn], ys, s=20, **style)

        colour = scatter(True, label=method).get_facecolor()
        scatter(False, facecolors="none", edgecolors=colour)
    if log and rows:
        axis.set_xscale("log")
    _finish(axis, label, metric, len({method_names(row.config) for row in rows}))
    return len({value(row) for row in rows}) > 1


def _costs(axes: Any, rows: Sequence[Row], metric: str, sign: int) -> bool:
    """Bars of each method's means over seeds at its best setting: its time, and what it trains."""
    best = best_by_method(group_settings(rows), metric, sign)
    if len(best) < 2:
        return False
    for axis, (label, cost) in zip(axes, COSTS.items()):
        means = [float(np.mean([cost(row) for row in setting.rows])) for setting in best.values()]
        bars = axis.barh(list(best), means)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
        axis.margins(x=0.15)
        axis.invert_yaxis()  # the best on top
        axis.set_xlabel(label)
    axes[1].set_yticks([])
    return True


def _curves(axis: Any, rows: Sequence[Row], sweep_dir: pathlib.Path, name: str) -> bool:
    drawn = 0
    for row in rows:
        records = read_records(sweep_dir / RUNS / row.name)
        points = [
            (r["step"], r[name]) for r in records if r["kind"] == "eval" and r.get(name) is not None
        ]
        if len(points) > 1:
            axis.plot(*zip(*points), marker=".", label=_label(row.name))
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
    from matplotlib import colormaps

    for i, row in enumerate(rows):
        line = [column[i] for column in columns]
        colour, style = colormaps["viridis"](line[-1]), "-" if row.is_finished else ":"
        axis.plot(range(len(names)), line, color=colour, linestyle=style, alpha=0.7)
    axis.set_xticks(range(len(names)), _short_names(names))
    for x, name in enumerate(names):
        _label_axis(axis, x, [record.get(name) for record in records])
    axis.set_yticks([])
    return True


def _label_axis(axis: Any, x: int, values: list[Cell]) -> None:
    """The smallest and the largest value beside an axis of the parallel coordinates."""
    positions = _positions(values)
    there = [i for i, value in enumerate(values) if value is not None]

    def show(value: Cell) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    def write(text: str, position: float, offset: int) -> None:
        place = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center"}
        axis.annotate(text, (x, position), **place, size=7)

    lowest, highest = (pick(there, key=lambda i: positions[i]) for pick in (min, max))
    write(show(values[highest]), positions[highest], 4)
    if positions[lowest] < positions[highest]:
        write(show(values[lowest]), positions[lowest], -9)
    if len(there) < len(values):
        write("none", NOWHERE, -9)


def _positions(values: list[Cell]) -> list[float]:
    """Where values lie between 0 and 1: numbers by size (or its logarithm), others by order.

    What is missing lies below all that is there.
    """
    there = [value for value in values if value is not None]
    if all(_is_number(value) for value in there):
        numbers = np.array(there, float)
        if numbers.min() > 0 and numbers.max() / numbers.min() >= 8:
            numbers = np.log(numbers)
        spread = numbers.max() - numbers.min()
        scaled = (numbers - numbers.min()) / spread if spread else numbers * 0 + 0.5
        found = iter(scaled.tolist())
        return [NOWHERE if value is None else next(found) for value in values]
    order = sorted({str(value) for value in there})
    last = max(1, len(order) - 1)
    return [NOWHERE if value is None else order.index(str(value)) / last for value in values]


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


def _short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each dotted key, or the whole where another key ends alike.

    >>> _short_names(["lora.rank", "vera.rank", "optimizer.learning_rate"])
    ['lora.rank', 'vera.rank', 'learning_rate']
    """
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys)]


def _label(name: str) -> str:
    """A name as a legend has room for: of a long one both ends."""
    half = (LABEL - 1) // 2
    return name if len(name) <= LABEL else f"{name[:half]}…{name[-half:]}"


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


COSTS = {"seconds of training": _seconds, "trainable share": _share}


def _finish(axis: Any, xlabel: str, ylabel: str, lines: int) -> None:
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    if 0 < lines <= MOST_CURVES:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside, over nothing
