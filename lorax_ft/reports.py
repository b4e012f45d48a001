"""What a run says in words: what it trains before it starts, and a table of results at its end."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax

from lorax_ft import trees
from lorax_ft.data import Dataset
from lorax_ft.evaluation import metrics_table
from lorax_ft.inspection import Use

BASELINE = "TF-IDF + LR, test"


def overview(dataset: Dataset, counts: trees.Counts, *, model: str, methods: str) -> str:
    """What is trained on what, and what the user should know of the data."""
    rows = [f"{len(getattr(dataset, part)):,} {part}" for part in ("train", "validation", "test")]
    classes = f", {len(dataset.label_names)} classes" if dataset.label_names else ""
    lines = [
        f"model    {model}",
        f"method   {methods}: trains {_share(counts)}; {bytes_text(counts.bytes)} of parameters",
        f"data     {', '.join(rows)}{classes}",
        *(f"note     {note}" for note in dataset.notes),
    ]
    return "\n".join(lines)


def results_table(results: Mapping[str, Any]) -> str:
    """The metrics of each split, the baseline's beside them, and what they cost."""
    rows = dict(results["metrics"])
    if results["baseline"] is not None:
        rows[BASELINE] = {"accuracy": results["baseline"]}
    counts = trees.Counts(**results["parameters"])
    cost = (
        f"trained {_share(counts)} in {results['step']:,} steps and {results['seconds']:.0f} s; "
        f"peak memory {bytes_text(results['peak_memory_bytes'])}"
    )
    warnings = [f"WARNING: {warning}" for warning in results["warnings"]]
    return "\n".join([metrics_table(rows), cost, *warnings])


def uses_table(uses: Mapping[str, Use]) -> str:
    """What the model does with each parameter, as `inspect` found it."""
    width = max(map(len, uses), default=0)
    return "\n".join(f"{path.ljust(width)}  {_use(use)}" for path, use in uses.items())


def peak_memory() -> int:
    """The most bytes that were in use: of the accelerator, or else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _use(use: Use) -> str:
    words = [use.kind]
    if use.in_axes:
        words.append(f"contracts {', '.join(map(str, use.in_axes))}")
    if use.stack:
        words.append(f"{use.stack} stacked")
    words += [word for word, holds in (("head", use.is_head), ("tied", use.tied)) if holds]
    return ", ".join(words)


def _share(counts: trees.Counts) -> str:
    return f"{counts.trainable:,} of {counts.total:,} parameters ({counts.share:.2%})"


def bytes_text(count: float) -> str:
    """A size in the unit that reads well.

    >>> bytes_text(512), bytes_text(3.3 * 2**30)
    ('512.0 B', '3.3 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.1f} {unit}"
