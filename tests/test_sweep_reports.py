"""Reports of sweeps: what is a setting, what enters a mean, what is drawn and written of it."""

import csv
import json
import sys

import pytest

from lorax_ft import runs, sweeps
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.sweeps import directory
from lorax_ft.sweeps.reports import figures, formats, statistics, tables

METRIC = "validation.accuracy"
RATE = "optimizer.learning_rate"
BASE = parse(
    {"model": {"path": "m"}, "data": {"source": {"train": "t"}}, "lora": {}}, ExperimentConfig
)


def row(changes, accuracy, test=None, *, outcome="finished", warnings=(), seconds=1.0, name=""):
    """A run as its directory gives it back."""
    metrics = {"validation": {"accuracy": accuracy}}
    if test is not None:
        metrics["test"] = {"accuracy": test}
    results = {
        "outcome": outcome,
        "step": 10,
        "metrics": metrics,
        "warnings": list(warnings),
        "parameters": {"trainable": 10, "total": 100},
        "seconds": seconds,
    }
    changes = json.loads(json.dumps(changes))
    config = sweeps.change(BASE, changes)
    return sweeps.Row(name=name, group="g", changes=changes, config=config, results=results)


def write_sweep(folder, rows):
    """A sweep's directory with these runs in it."""
    sweep = sweeps.SweepConfig(runs=[dict(r.changes) for r in rows])
    content = {**directory.describe(BASE, sweep), "groups": ["g"], "runs": len(rows) + 1}
    directory.write_record(folder, content)
    for i, r in enumerate(rows):
        path = folder / "runs" / f"{i:03d}"
        path.mkdir(parents=True)
        (path / "config.json").write_text(runs.config_text(r.config))
        directory.write_member(path, sweeps.Run(name="", config=r.config, changes=r.changes), "g")
        runs.write_results(path, dict(r.results))


def by_setting(rows):
    return {r["setting"]: r for r in tables.settings_table(rows, METRIC, 1)}


def test_settings_that_differ_in_a_late_digit_are_two_and_are_shown_so():
    rates = [0.01234, 0.01231, 0.5]
    rows = [row({RATE: rate, "seed": s}, rate) for rate in rates for s in (0, 1)]

    found = by_setting(rows)

    assert {text: r["mean"] for text, r in found.items()} == {
        f"{RATE}=0.5000": 0.5,  # no more digits than are needed
        f"{RATE}=0.01234": 0.01234,
        f"{RATE}=0.01231": 0.01231,
    }


def test_settings_that_no_digits_tell_apart_are_still_two():
    rows = [row({"lora.targets": targets}, 0.5) for targets in (["query"], "['query']")]

    assert len(by_setting(rows)) == 2


def test_a_method_with_a_rank_is_the_setting_that_its_dotted_key_makes():
    others = {key: value for key, value in sweeps.method("lora").items() if value is None}
    rows = [
        row({**sweeps.method("lora", rank=4), "seed": 0}, 0.5),
        row({**others, "lora.rank": 4, "seed": 1}, 0.7),
    ]

    assert [r["seeds"] for r in tables.settings_table(rows, METRIC, 1)] == [2]


def test_orders_of_the_data_are_seeds_too():
    rows = [
        row({"lora.rank": rank, "data.loader.seed": order}, 0.5 + rank / 100 + order / 10)
        for rank in (1, 2)
        for order in (0, 1, 2)
    ]

    one, two = by_setting(rows)["lora.rank=1"], by_setting(rows)["lora.rank=2"]

    assert (one["seeds"], one["mean"]) == (3, pytest.approx(0.61))
    assert two["mean"] == pytest.approx(0.62)
    assert rows[1].seeds == (0, 1)
    assert row({"seed": 3}, 0.5).seeds == (3, 3)  # the order's seed is the run's own


def test_methods_are_chosen_by_validation_and_compared_by_test():
    rows = [
        *(row({RATE: 0.1, "seed": seed}, 0.8, 0.7 + seed / 100) for seed in range(3)),
        *(row({RATE: 0.2, "seed": seed}, 0.7, 0.9) for seed in range(3)),  # better by chance
        *(
            row({RATE: 0.1, **sweeps.method("ia3"), "seed": seed}, 0.6, 0.6 + seed / 50)
            for seed in range(3)
        ),
    ]
    lora, ia3 = tables.comparisons_table(rows, METRIC, 1)

    assert (lora["method"], lora["setting"]) == ("lora", f"{RATE}=0.1000")
    assert lora[METRIC] == pytest.approx(0.8)
    assert (lora["mean"], lora["share"]) == pytest.approx((0.71, 0.1))
    assert ia3["setting"] == f"{RATE}=0.1000 ia3"
    assert ia3["difference"] == pytest.approx(-0.09)
    assert ia3["pairs"] == 3
    assert METRIC not in tables.comparisons_table(rows, "test.accuracy", 1)[0]


def test_runs_that_did_not_finish_enter_no_mean_and_are_counted():
    rows = [
        row({RATE: 0.1, "seed": 0}, 0.8),
        row({RATE: 0.1, "seed": 1}, 0.7, outcome="stopped_early"),
        row({RATE: 0.1, "seed": 2}, 0.1, outcome="pruned"),
        row({RATE: 0.1, "seed": 3}, 0.99, outcome="diverged"),
        row({RATE: 0.2, "seed": 0}, 0.9, outcome="collapsed"),
        row({RATE: 0.3, "seed": 0}, 0.6),
    ]

    first, second, third = tables.settings_table(rows, METRIC, 1)

    assert (first["mean"], first["seeds"]) == (pytest.approx(0.75), 2)
    assert first["unfinished"] == "pruned 1, diverged 1"
    assert (second["setting"], second["unfinished"]) == (f"{RATE}=0.3000", None)
    assert (third["setting"], third["unfinished"]) == (f"{RATE}=0.2000", "collapsed 1")
    assert (third["mean"], third["seeds"]) == (None, 0)
    assert "unfinished" not in tables.settings_table(rows[:2], METRIC, 1)[0]


def test_methods_are_compared_by_finished_runs_and_none_is_left_out():
    rows = [
        *(row({"lora.rank": 2, "seed": seed}, 0.8 + seed / 100) for seed in range(3)),
        *(row({**sweeps.method("ia3"), "seed": seed}, 0.7) for seed in range(2)),
        row({**sweeps.method("ia3"), "seed": 2}, 0.1, outcome="pruned"),
        row({**sweeps.method("bitfit"), RATE: 0.1}, 0.95, 0.9, outcome="diverged"),
        row({**sweeps.method("bitfit"), RATE: 0.2}, 0.1, outcome="pruned"),
    ]

    lora, ia3, bitfit = tables.comparisons_table(rows, METRIC, 1)

    assert (lora["method"], lora["mean"]) == ("lora", pytest.approx(0.81))
    assert (ia3["pairs"], ia3["difference"]) == (2, pytest.approx(-0.105))
    assert ia3["unfinished"] == "pruned 1"
    assert (bitfit["method"], bitfit["unfinished"]) == ("bitfit", "diverged 1, pruned 1")
    assert (bitfit["setting"], bitfit["mean"]) == (None, None)
    assert tables.judge(rows, METRIC) == METRIC  # no finished run was tested


def test_what_runs_warn_of_is_in_their_table_and_counted_beside_means():
    rows = [
        row({RATE: 0.1, "seed": 0}, 0.7, warnings=["All of one class.", "All of one class."]),
        row({RATE: 0.1, "seed": 1}, 0.7),
        row({RATE: 0.2, "seed": 1}, 0.6),
    ]

    assert [r["warning"] for r in tables.run_records(rows)] == ["All of one class.", None, None]
    assert [r["warnings"] for r in tables.settings_table(rows, METRIC, 1)] == [1, None]
    assert tables.comparisons_table(rows, METRIC, 1)[0]["warnings"] == 1
    assert "warning" not in tables.run_records(rows[1:])[0]
    assert "warnings" not in tables.settings_table(rows[1:], METRIC, 1)[0]


def test_each_setting_is_compared_with_the_best_by_seed():
    noise = [0.0, 0.1, 0.05]
    rows = [
        row({"lora.rank": rank, "seed": s}, gain, gain + noise[s] + jitter[s])
        for rank, gain, jitter in (
            (1, 0.5, [0.0, 0.01, 0.0]),
            (2, 0.7, [0.0, 0.0, 0.0]),
            (4, 0.6, [0.0, 0.0, 0.02]),
        )
        for s in range(3)
    ]

    best, second, third = tables.settings_comparisons(rows, METRIC, 1)

    assert [r["setting"] for r in (best, second, third)] == [
        f"lora.rank={rank}" for rank in (2, 4, 1)
    ]
    assert best["difference"] is None
    assert third["difference"] == pytest.approx(-0.2 + 0.01 / 3)
    assert third["test.accuracy"] == pytest.approx(0.55 + 0.01 / 3)
    assert third["pairs"] == 3
    assert third["p Holm"] == pytest.approx(2 * third["p"])
    assert second["p Holm"] == pytest.approx(max(second["p"], third["p Holm"]))
    assert tables.settings_comparisons(rows[::3], METRIC, 1) == []  # a seed each


def test_p_values_are_corrected_as_holm_does():
    corrected = statistics.holm([0.04, None, 0.01, 0.6, 0.02])

    assert corrected == pytest.approx([0.08, None, 0.04, 0.6, 0.06])  # R's p.adjust
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def draw(rows, tmp_path):
    return figures.draw(rows, tmp_path, tmp_path, metric=METRIC, sign=1)


def test_ranks_given_with_their_method_are_drawn(tmp_path):
    rows = [
        row({**sweeps.method("lora", rank=rank), "seed": s}, 0.5 + rank / 10, name=f"{rank}-{s}")
        for rank in (1, 2, 4)
        for s in (0, 1)
    ]

    drawn = draw(rows, tmp_path)

    assert drawn["by_rank.png"] == f"{METRIC} by lora.rank"
    assert "parallel_coordinates.png" in drawn
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / name).with_suffix(".svg").read_text()


def test_keys_that_end_alike_have_figures_of_their_own(tmp_path):
    rows = [
        row({**sweeps.method("lora", rank=rank, rank_pattern={".*/query/kernel": wide})}, 0.5)
        for rank, wide in ((1, 3), (2, 5))
    ]
    rows += [row(sweeps.method("vera", rank=rank), 0.5) for rank in (64, 128)]

    drawn = draw(rows, tmp_path)

    assert {"by_lora.rank.png", "by_vera.rank.png", "by__query_kernel.png"} <= set(drawn)
    assert all((tmp_path / name).exists() for name in drawn)


def test_what_methods_cost_is_drawn_at_their_best_settings(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars, barh = [], Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, y, width: bars.append((y, width)) or barh(self, y, width)
    )
    rows = [
        row({RATE: 0.1, "seed": 0}, 0.8, seconds=3.0),
        row({RATE: 0.1, "seed": 1}, 0.8, seconds=5.0),
        row({RATE: 0.1, "seed": 2}, 0.8, seconds=90.0, outcome="diverged"),
        row({RATE: 0.2}, 0.7, seconds=70.0),
        row(sweeps.method("ia3"), 0.9, seconds=1.0),
    ]

    drawn = draw(rows, tmp_path)

    assert "cost_by_method.png" in drawn
    assert drawn["by_cost.png"].endswith("hollow are runs that did not finish")
    assert bars == [(["ia3", "lora"], [1.0, 4.0]), (["ia3", "lora"], [0.1, 0.1])]
    assert "cost_by_method.png" not in draw(rows[:-1], tmp_path)


def test_the_same_runs_give_the_same_svg(tmp_path):
    rows = [row({"lora.rank": rank}, rank / 10) for rank in (1, 2)]
    draw(rows, tmp_path)
    before = (tmp_path / "by_rank.svg").read_bytes()

    draw(rows, tmp_path)

    assert (tmp_path / "by_rank.svg").read_bytes() == before


def test_means_in_figures_are_over_finished_runs(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, errorbar = [], Axes.errorbar

    def keep(self, xs, ys, *rest, **options):
        lines.append((xs, ys))
        return errorbar(self, xs, ys, *rest, **options)

    monkeypatch.setattr(Axes, "errorbar", keep)
    rows = [
        row({"lora.rank": 1, "seed": 0}, 0.5),
        row({"lora.rank": 1, "seed": 1}, 0.1, outcome="pruned"),
        row({"lora.rank": 2, "seed": 0}, 0.7),
    ]

    draw(rows, tmp_path)

    assert lines == [([1.0, 2.0], [0.5, 0.7])]


def test_parallel_coordinates_put_what_is_missing_below():
    assert figures._positions([4, None, 16]) == [0.0, figures.NOWHERE, 1.0]
    assert figures._positions([2, 10]) == [0.0, 1.0]  # by size, not as texts
    assert figures._positions(["b", None, "a"]) == [1.0, figures.NOWHERE, 0.0]


def test_the_report_says_what_its_numbers_are_of(tmp_path):
    rows = [
        *(row({RATE: 0.1, "seed": s}, 0.8 + s / 100, 0.9, warnings=["All one."]) for s in range(2)),
        *(row({RATE: 0.2, "seed": s}, 0.7, 0.7 + s / 10) for s in range(2)),
        row({RATE: 0.2, "seed": 2}, 0.2, outcome="pruned"),
        row({RATE: 0.3, "seed": 0}, 0.3, outcome="diverged"),
    ]
    write_sweep(tmp_path / "s", rows)

    text = sweeps.write_report(tmp_path / "s")

    report = tmp_path / "s" / "report"
    assert text.startswith("6 of 7 runs have ended: 4 finished, 1 pruned, 1 diverged.")
    for words in (
        "Means and comparisons are over the runs that finished",
        "2 of the runs that finished have a warning",
        "Settings, each against the best",
        "compared by test.accuracy",
    ):
        assert words in text
        assert words in (report / "index.html").read_text()
        assert words in (report / "report.md").read_text()
    records = list(csv.DictReader((report / "settings.csv").read_text().splitlines()))
    assert [r["unfinished"] for r in records] == ["", "pruned 1", "diverged 1"]
    assert [r["mean"] for r in records] == ["0.805", "0.7", ""]
    runs_csv = list(csv.DictReader((report / "runs.csv").read_text().splitlines()))
    assert [r["warning"] for r in runs_csv] == ["All one."] * 2 + [""] * 4


def test_a_sweep_of_which_no_run_finished_has_a_report(tmp_path):
    write_sweep(tmp_path, [row({RATE: r}, 0.3, outcome="collapsed") for r in (0.1, 0.2)])

    text = sweeps.write_report(tmp_path)

    assert "2 of 3 runs have ended: 2 collapsed." in text
    assert text.count("collapsed 1") == 2


def test_runs_are_written_as_parquet_too(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        row({"lora.targets": targets, "lora.alpha": alpha, "seed": i}, 0.5 + i / 10)
        for i, (targets, alpha) in enumerate(((["query"], 8), ("all-linear", 16.5)))
    ]
    write_sweep(tmp_path, rows)

    sweeps.write_report(tmp_path)

    read = parquet.read_table(tmp_path / "report" / "runs.parquet").to_pylist()
    assert read == tables.run_records(sweeps.read_rows(tmp_path))
    mixed = [{"a": 1, "b": "x", "c": None}, {"a": "one", "b": None, "c": None}]
    assert formats.write_parquet(tmp_path / "mixed.parquet", mixed)
    assert parquet.read_table(tmp_path / "mixed.parquet").to_pylist() == [
        {"a": "1", "b": "x", "c": None},
        {"a": "one", "b": None, "c": None},
    ]


def test_without_pyarrow_there_is_no_parquet(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_sweep(tmp_path, [row({}, 0.5)])

    sweeps.write_report(tmp_path)

    assert (tmp_path / "report" / "runs.csv").exists()
    assert not (tmp_path / "report" / "runs.parquet").exists()
