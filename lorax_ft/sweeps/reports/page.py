"""The page of a sweep: one HTML file that opens from disk, with sortable tables and the figures."""

from __future__ import annotations

import base64
import html
import math
import pathlib
from collections.abc import Mapping, Sequence

from lorax_ft.sweeps.reports.formats import Cell, cell_text

IMAGES = {".png": "image/png", ".svg": "image/svg+xml"}
LONG = 120  # characters of a text that is broken into lines

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8885; text-align: right; }
th.text, td.text { text-align: left; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 24rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
figure { display: inline-block; margin: .5rem 1rem 1rem 0; }
figure img { width: 60rem; max-width: 100%; background: #fff; }
figcaption { font-size: .85rem; }
"""

# Sorts by the cells' data-value: numbers by size, texts after them, what is missing at the end.
SCRIPT = """
function key(cell) {
  const text = cell.dataset.value;
  const number = Number(text);
  return text.trim() === "" ? null : Number.isNaN(number) ? text : number;
}
function compare(a, b) {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return typeof a === "number" ? a - b : a.localeCompare(b);
}
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const falling = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const rows = [...body.rows].map(row => [key(row.cells[head.cellIndex]), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return falling ? compare(b, a) : compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
}));
"""


def write_page(
    path: pathlib.Path,
    title: str,
    lead: str,
    tables: Mapping[str, Sequence[Mapping[str, Cell]]],
    figures: Mapping[pathlib.Path, str],
) -> None:
    """Writes the page: a line of what it is of, tables by heading, figures after the first one.

    `figures` are captions by PNG or SVG file. Everything is within the page, so it needs no network
    and can be sent as it is.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>",
    ]
    first, *rest = [_section(heading, records) for heading, records in tables.items() if records]
    parts += [first, *_figures(figures), *rest]  # the shortest table, what can be seen, the rest
    parts.append(f"<script>{SCRIPT}</script></body></html>")
    path.write_text("\n".join(parts) + "\n", "utf-8")


def _section(heading: str, records: Sequence[Mapping[str, Cell]]) -> str:
    return f"<h2>{html.escape(heading)}</h2>\n{_table(records)}"


def _figures(figures: Mapping[pathlib.Path, str]) -> list[str]:
    parts = ["<h2>Figures</h2>"] if figures else []
    for image, caption in figures.items():
        data, words = base64.b64encode(image.read_bytes()).decode(), html.escape(caption)
        parts.append(
            f'<figure><img alt="{words}" src="data:{IMAGES[image.suffix]};base64,{data}">'
            f"<figcaption>{words}</figcaption></figure>"
        )
    return parts


def _table(records: Sequence[Mapping[str, Cell]]) -> str:
    names = list(records[0])
    classes = {name: _class([record.get(name) for record in records]) for name in names}
    head = "".join(
        f'<th scope="col"{classes[name]}><button type="button">{html.escape(name)}</button></th>'
        for name in names
    )
    rows = [
        "<tr>" + "".join(_cell(record.get(name), classes[name]) for name in names) + "</tr>"
        for record in records
    ]
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>'
        "</table></div>"
    )


def _class(column: Sequence[Cell]) -> str:
    """What a column's cells are: numbers, texts, or texts of several lines."""
    longest = max((len(value) for value in column if isinstance(value, str)), default=0)
    kinds = ["text"] * (longest > 0) + ["long"] * (longest > LONG)
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _cell(value: Cell, kind: str) -> str:
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    raw = "" if missing else html.escape(str(value), quote=True)
    return f'<td{kind} data-value="{raw}">{html.escape(cell_text(value))}</td>'
