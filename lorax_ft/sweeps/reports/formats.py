"""Records as text, Markdown, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

Cell = str | float | int | None


def text_table(records: Sequence[Mapping[str, Cell]]) -> str:
    """Records as lines of text, numbers to the right.

    >>> print(text_table([{"run": "a", "accuracy": 0.5}, {"run": "bc", "accuracy": None}]))
    run  accuracy
    a      0.5000
    bc
    """
    rows = _rows(records)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(records: Sequence[Mapping[str, Cell]]) -> str:
    r"""Records as a table in Markdown.

    >>> print(markdown_table([{"targets": "query|value", "rank": 8}]), end="")
    | targets | rank |
    |---|---:|
    | query\|value | 8 |
    """
    head, *rows = [[cell.replace("|", r"\|") for cell in row] for row in _rows(records)]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def csv_text(records: Sequence[Mapping[str, Cell]]) -> str:
    """Records as CSV, numbers in full."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in r.items()} for r in records)
    return file.getvalue()


def write_parquet(path: pathlib.Path, records: Sequence[Mapping[str, Cell]]) -> bool:
    """Writes records as Parquet and returns True; without pyarrow writes nothing, returns False.

    A column of numbers and texts becomes one of texts, for Parquet's are of one type.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return False
    columns = {name: _of_one_type([record[name] for record in records]) for name in records[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return True


def cell_text(value: Any) -> str:
    """A value as a table shows it: a float to four digits behind the point, or to four in all.

    >>> cell_text(0.98765), cell_text(0.0003), cell_text(2e30), cell_text(1234), cell_text(None)
    ('0.9877', '0.0003', '2e+30', '1,234', '')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 0.01 <= abs(value) < 1e6 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _rows(records: Sequence[Mapping[str, Cell]]) -> list[list[str]]:
    names = list(records[0])
    return [names, *([cell_text(record.get(name)) for name in names] for record in records)]


def _of_one_type(values: list[Cell]) -> list[Cell]:
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 or kinds == {int, float}:
        return values
    return [None if value is None else str(value) for value in values]
