"""The report of a sweep: CSV, Parquet, Markdown, figures and a page, in its folder `report`."""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Sequence

from lorax_ft.sweeps.directory import Row, criterion, read_record, read_rows
from lorax_ft.sweeps.reports.figures import draw
from lorax_ft.sweeps.reports.formats import csv_text, markdown_table, text_table, write_parquet
from lorax_ft.sweeps.reports.page import write_page
from lorax_ft.sweeps.reports.settings import warned
from lorax_ft.sweeps.reports.tables import (
    comparisons_table,
    judge,
    run_records,
    settings_comparisons,
    settings_table,
)

METHODS = "Methods, each at its best setting"
SETTINGS = "Settings, over seeds"
COMPARED = "Settings, each against the best"
RUNS = "Runs"


def write_report(
    sweep_dir: str | pathlib.Path, *, metric: str | None = None, mode: str | None = None
) -> str:
    """Writes `report/` of a sweep and returns its tables as text.

    `metric` and `mode` are as in `best`. Settings are chosen by the metric; methods are compared by
    the same of the test split, where there is one. Means and comparisons are over the runs that
    finished, early stops among them; runs that were pruned, diverged or collapsed are counted
    beside them. A method is compared with the best one, and a setting with the best one, on the
    seeds that both have: the 95 % confidence interval of the mean difference, and the paired
    t-test, its p also corrected as `statistics.holm` does. Parquet is written where pyarrow is
    installed. Raises FileNotFoundError where there is no sweep, ValueError where no run that has
    ended has the metric.
    """
    directory = pathlib.Path(sweep_dir)
    record, rows = read_record(directory), read_rows(directory)
    metric, sign = criterion(directory, metric, mode)
    if not any(math.isfinite(row.metric(metric)) for row in rows):
        raise ValueError(f"{directory}: no run of this sweep has ended with {metric}.")
    made = {
        METHODS: comparisons_table(rows, metric, sign),
        SETTINGS: settings_table(rows, metric, sign),
        COMPARED: settings_comparisons(rows, metric, sign),
        RUNS: run_records(rows),
    }
    tables = {heading: table for heading, table in made.items() if table}
    target = directory / "report"
    figures = draw(rows, directory, target, metric=metric, sign=sign)
    lead = _lead(rows, record["runs"], metric, sign)
    if any("p Holm" in table[0] for table in tables.values()):
        lead += " p Holm is p corrected for the number of comparisons in its table."
    (target / "runs.csv").write_text(csv_text(tables[RUNS]), "utf-8")
    (target / "settings.csv").write_text(csv_text(tables[SETTINGS]), "utf-8")
    write_parquet(target / "runs.parquet", tables[RUNS])
    sections = [f"## {heading}\n\n{markdown_table(table)}" for heading, table in tables.items()]
    pictures = [f"![{title}]({name})" for name, title in figures.items()]
    text = "\n".join([f"# {directory.name}\n\n{lead}\n", *sections, *pictures]) + "\n"
    (target / "report.md").write_text(text, "utf-8")
    images = {_smaller(target / name): title for name, title in figures.items()}
    write_page(target / "index.html", directory.name, lead, tables, images)
    shown = [f"{heading}\n{text_table(table)}" for heading, table in tables.items()]
    return "\n\n".join([lead, *shown[:-1], f"The page is {target / 'index.html'}."])


def _smaller(image: pathlib.Path) -> pathlib.Path:
    """A PNG file, or the SVG beside it: of a few lines this is smaller, of many points that."""
    return min(image, image.with_suffix(".svg"), key=lambda path: path.stat().st_size)


def _lead(rows: Sequence[Row], planned: int, metric: str, sign: int) -> str:
    """What the numbers of a report are of."""
    counts = collections.Counter(row.results["outcome"] for row in rows)
    ended = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    judged = judge(rows, metric)
    sentences = [
        f"{len(rows)} of {planned} runs have ended: {ended}.",
        f"The metric is {metric}, of which {'more' if sign > 0 else 'less'} is better.",
        "Means and comparisons are over the runs that finished, early stops among them; those that "
        "were pruned, diverged or collapsed enter none, and are counted as unfinished.",
    ]
    if count := warned([row for row in rows if row.is_finished]):
        sentences.append(f"{count} of the runs that finished have a warning, told in their table.")
    sentences.append(
        f"Methods and settings are compared by {judged}, by which no setting was chosen."
        if judged != metric
        else "Methods and settings are compared by what also chose them, which flatters the best."
    )
    return " ".join(sentences)
