"""The picture of a run: its losses and its evaluations over the steps."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def plot_run(
    records: Sequence[Mapping[str, Any]],
    path: str | pathlib.Path,
    *,
    title: str,
    metric: str | None,
) -> None:
    """Draws the lines of a `metrics.jsonl` to a PNG: losses on the left, `metric` on the right.

    A loss that was not finite (null in the records) leaves a gap. Raises ValueError where there are
    no records.
    """
    if not records:
        raise ValueError(f"plot_run: there are no records to draw to {path}.")
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    kinds = sorted({record["kind"] for record in records}, reverse=True)  # train before eval
    panels = 2 if metric and any(metric in record for record in records) else 1
    figure = Figure(figsize=(5 * panels, 3.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for kind in kinds:
        _line(axes[0], records, kind, "loss")
    axes[0].legend()
    if panels == 2:
        for kind in kinds:
            _line(axes[1], records, kind, str(metric))
    for axis, name in zip(axes, ("loss", metric)):
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)


def _line(axis: Any, records: Sequence[Mapping[str, Any]], kind: str, name: str) -> None:
    points = [(r["step"], r[name]) for r in records if r["kind"] == kind and name in r]
    if points:
        steps, values = zip(*((s, float("nan") if v is None else v) for s, v in points))
        axis.plot(steps, values, label=kind, marker="" if len(points) > 30 else "o", markersize=3)
