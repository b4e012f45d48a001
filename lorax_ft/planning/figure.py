"""The picture of plans: memory by part, a bar for each, beside what the device has."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from lorax_ft.planning.plan import Plan
from lorax_ft.planning.report import GIB, LABELS

COLOURS = {
    "packed": "#1f4e79",
    "absmax": "#4a86c5",
    "weights": "#9dc3e6",
    "trained": "#7030a0",
    "adapters": "#b381d9",
    "optimizer": "#e08214",
    "batch": "#d9d9d9",
    "padding": "#bdbdbd",
    "gradients": "#fdb863",
    "logits": "#b2df8a",
    "activations": "#33a02c",
    "code": "#636363",
}


def plot_plans(plans: Mapping[str, Plan], path: str | pathlib.Path) -> None:
    """Draws a bar for each named plan: its parts in GiB, a line where its device ends.

    The file's ending says of what kind it is. Raises ValueError where there is no plan.
    """
    if not plans:
        raise ValueError(f"plot_plans: there are no plans to draw to {path}.")
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(9, 1.6 + 0.55 * len(plans)), layout="constrained")
    axes = figure.subplots()
    names = list(plans)
    for part, label in LABELS.items():
        sizes = [plans[name].parts[part] / GIB for name in names]
        if any(sizes):
            before = [sum(plans[name].parts[p] for p in _before(part)) / GIB for name in names]
            axes.barh(names, sizes, left=before, label=label, color=COLOURS[part])
    for row, name in enumerate(names):
        if (usable := plans[name].usable) is not None:
            axes.plot([usable / GIB] * 2, [row - 0.4, row + 0.4], color="red", linewidth=2)
    axes.invert_yaxis()
    axes.set(xlabel="GiB of one device (red: what a program can have)")
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=120)


def _before(part: str) -> list[str]:
    parts = list(LABELS)
    return parts[: parts.index(part)]
