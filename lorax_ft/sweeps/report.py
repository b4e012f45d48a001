"""The report of a sweep: CSV, Markdown, figures and a page, in its folder `report`."""

from __future__ import annotations

import pathlib

from lorax_ft.sweeps.directory import criterion, read_record, read_rows
from lorax_ft.sweeps.figures import draw
from lorax_ft.sweeps.formats import csv_text, markdown_table, text_table
from lorax_ft.sweeps.page import write_page
from lorax_ft.sweeps.tables import comparisons_table, judge, run_records, settings_table

RUNS = "Runs"
SETTINGS = "Settings, over seeds"
METHODS = "Methods, each at its best setting"


def write_report(
    sweep_dir: str | pathlib.Path, *, metric: str | None = None, mode: str | None = None
) -> str:
    """Writes `report/` of a sweep and returns its tables as text.

    `metric` and `mode` are as in `best`. Settings are chosen by the metric; methods are compared by
    the same of the test split, where there is one. A method is compared with the best one on the
    seeds that both have: the 95 % confidence interval of the mean difference, and the paired
    t-test. Raises FileNotFoundError where there is no sweep, ValueError where no run is finished
    that has the metric.
    """
    directory = pathlib.Path(sweep_dir)
    record, rows = read_record(directory), read_rows(directory)
    metric, sign = criterion(directory, metric, mode)
    if not any(row.metric(metric) == row.metric(metric) for row in rows):
        raise ValueError(f"{directory}: no run of this sweep is finished and has {metric}.")
    tables = {
        METHODS: comparisons_table(rows, metric, sign),
        SETTINGS: settings_table(rows, metric, sign),
        RUNS: run_records(rows),
    }
    target = directory / "report"
    figures = draw(rows, directory, target, metric=metric, sign=sign)
    lead = (
        f"{len(rows)} of {record['runs']} runs are finished. The metric is {metric}, of which "
        f"{'more' if sign > 0 else 'less'} is better."
    )
    if (judged := judge(rows, metric)) != metric:
        lead += f" Methods are compared by {judged}, by which no setting was chosen."
    (target / "runs.csv").write_text(csv_text(tables[RUNS]))
    (target / "settings.csv").write_text(csv_text(tables[SETTINGS]))
    sections = [f"## {heading}\n\n{markdown_table(table)}" for heading, table in tables.items()]
    pictures = [f"![{title}]({name})" for name, title in figures.items()]
    text = "\n".join([f"# {directory.name}\n\n{lead}\n", *sections, *pictures]) + "\n"
    (target / "report.md").write_text(text)
    images = {target / name: title for name, title in figures.items()}
    write_page(target / "index.html", directory.name, lead, tables, images)
    shown = [f"{heading}\n{text_table(tables[heading])}" for heading in (METHODS, SETTINGS)]
    return "\n\n".join([lead, *shown, f"The page is {target / 'index.html'}."])
