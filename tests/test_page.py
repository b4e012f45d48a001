"""The page of a sweep in a real browser: its tables sort, its figures show, nothing is fetched."""

import json
import re
import shutil
import subprocess

import pytest

from lorax_ft.sweeps.page import write_page

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
    figure.savefig(tmp_path / "curve.png", dpi=100)
    records = [
        {"run": "b & <c>", "rate": 1e-3, "steps": 1200, "score": None},
        {"run": "a", "rate": 2e-4, "steps": 90, "score": 0.5},
        {"run": "c", "rate": 0.25, "steps": 800, "score": float("nan")},
        {"run": "B", "rate": 3.0, "steps": 1000, "score": -0.25},
    ]
    write_page(
        page, "A sweep", "Four runs.", {"Runs": records}, {tmp_path / "curve.png": "A curve"}
    )
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
    assert said["images"] == [200]
    assert said["fetched"] == []
