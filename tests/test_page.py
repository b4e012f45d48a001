"""The page of a sweep in a real browser: its tables sort, its figures show, nothing is fetched."""

import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest

from lorax_ft.sweeps.reports.page import write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium: it would show the page")

# Clicks each heading of the first table, once and twice, and says in the title what then stands.
PROBE = """<script>addEventListener("load", () => {
  const table = document.querySelector("table"), said = {};
  table.querySelectorAll("th button").forEach((button, i) => {
    const column = () => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
    const name = button.textContent;
    button.click(); const rising = column();
    button.click(); said[name] = [rising, column()];
  });
  said.images = [...document.images].map(image => image.naturalWidth);
  said.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify(said);
});</script>"""


@needs_browser
def test_a_browser_sorts_the_tables_and_shows_the_figures(tmp_path):
    from matplotlib.figure import Figure

    figure, page = Figure(figsize=(2, 1)), tmp_path / "index.html"
    pictures = {tmp_path / "curve.png": "A curve", tmp_path / "curve.svg": "The same as lines"}
    for path in pictures:
        figure.savefig(path, dpi=100)
    records = [
        {"run": "b & <c>", "rate": 1e-3, "steps": 1200, "score": None},
        {"run": "a", "rate": 2e-4, "steps": 90, "score": 0.5},
        {"run": "c", "rate": 0.25, "steps": 800, "score": float("nan")},
        {"run": "B", "rate": 3.0, "steps": 1000, "score": -0.25},
    ]
    write_page(page, "A sweep", "Four runs.", {"Runs": records}, pictures)
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text("utf-8") + PROBE, "utf-8")

    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    shown = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*)</title>", shown.stdout)

    assert title, shown.stderr
    said = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert said["run"] == [runs := ["a", "B", "b & <c>", "c"], runs[::-1]]
    assert said["rate"] == [rates := ["0.0002", "0.001", "0.2500", "3.0000"], rates[::-1]]
    assert said["steps"] == [steps := ["90", "800", "1,000", "1,200"], steps[::-1]]
    assert said["score"] == [["-0.2500", "0.5000", "", ""], ["0.5000", "-0.2500", "", ""]]
    assert said["images"] == [200, 192]  # SVG is measured in points, of which a pixel is 0.75
    assert said["fetched"] == []


class _Values(html.parser.HTMLParser):
    """The cells' `data-value` of a page's first table, by row, and the page's script."""

    def __init__(self):
        super().__init__()
        self.rows, self.script, self._in_script = [], "", False

    def handle_starttag(self, tag, attributes):
        self._in_script = tag == "script"
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(dict(attributes)["data-value"])

    def handle_data(self, data):
        self.script += data if self._in_script else ""


# The little of a document that the page's script uses: a head of buttons over rows of cells.
DOCUMENT = """
const rows = VALUES.map(values => ({cells: values.map(value => ({dataset: {value}}))}));
const body = {rows, append(...sorted) { this.rows = sorted; }};
const heads = VALUES[0].map((_, cellIndex) => {
  const attributes = {};
  return {
    cellIndex,
    closest: () => ({tBodies: [body]}),
    getAttribute: name => attributes[name] ?? null,
    setAttribute(name, value) { attributes[name] = value; },
    removeAttribute(name) { delete attributes[name]; },
  };
});
heads.forEach(head => { head.parentElement = {children: heads}; });
const clicks = [];
const buttons = heads.map(parentElement => ({
  parentElement,
  addEventListener(_, listener) { clicks.push(listener); },
}));
globalThis.document = {querySelectorAll: () => buttons};
SCRIPT
const told = COLUMNS.map(column => {
  clicks[column]();
  return body.rows.map(row => row.cells[column].dataset.value);
});
console.log(JSON.stringify(told));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_tables_of_a_page_sort_numbers_texts_and_empty_cells(tmp_path):
    records = [
        {"run": "b", "loss": 10.0, "rank": 2},
        {"run": "a", "loss": None, "rank": "1a"},
        {"run": 'c"<', "loss": 9.0, "rank": 10},
        {"run": "", "loss": math.nan, "rank": "all"},
        {"run": "d", "loss": 3e-5, "rank": math.inf},
    ]
    write_page(tmp_path / "index.html", "t", "l", {"Runs": records}, {})
    found = _Values()
    found.feed((tmp_path / "index.html").read_text())
    script = DOCUMENT.replace("VALUES", json.dumps(found.rows[1:])).replace(
        "COLUMNS", json.dumps([0, 0, 1, 1, 1, 2, 2])
    )

    done = subprocess.run(
        ["node", "-e", script.replace("SCRIPT", found.script)],
        capture_output=True,
        text=True,
        check=True,
    )

    names, back, losses, falling, again, ranks, down = json.loads(done.stdout)
    assert names == ["a", "b", 'c"<', "d", ""]
    assert back == ["d", 'c"<', "b", "a", ""]
    assert losses == again == ["3e-05", "9.0", "10.0", "", ""]
    assert falling == ["10.0", "9.0", "3e-05", "", ""]
    assert ranks == ["2", "10", "1a", "all", ""]  # numbers by size, then texts
    assert down == ["all", "1a", "10", "2", ""]
