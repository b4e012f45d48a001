"""A sweep from end to end: what it leaves behind, and that nothing is lost when it breaks off."""

import contextlib
import csv
import json
import math
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_ft import adapted, cli, experiment, finished, runs, sweeps
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.sweeps import program, slots
from lorax_ft.sweeps.halving import Rungs
from lorax_ft.sweeps.reports.statistics import compare
from lorax_ft.sweeps.specification import Halving, SweepConfig
from lorax_ft.training.records import read_records
from tests import tiny

DIVERGES = {"optimizer.learning_rate": 1e38, "train.max_nonfinite": 2, "train.best_metric": None}
RUNS = [*sweeps.grid({"lora.rank": [1, 3], "seed": [0, 1]}), DIVERGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("sweep"))


def config_of(folder, **changes):
    """Texts of three or six words, which are batches of two shapes."""
    path = folder / "lengths.csv"
    if not path.exists():
        header, *lines = (folder / "data.csv").read_text().splitlines()
        short = [" ".join(line.split()[-3:]) for line in lines]
        kept = [
            f"{tiny.LABELS[colours.pop()]},{text}"
            for text in short
            if len(colours := set(text.split()) & set(tiny.LABELS)) == 1
        ]
        path.write_text("\n".join([header, *kept, *lines[:60]]) + "\n")
    values = {
        "model": {"path": str(folder / "bert")},
        "data": {
            "source": {"train": str(path)},
            "split": {"validation": 0.2, "test": 0.2},
            "task": {"max_length": 8},
            "loader": {"batch_size": 16, "buckets": [4, 8]},
        },
        "lora": {"rank": 2, "targets": ["query", "value"], "dropout": 0.1},
        "optimizer": {"learning_rate": 1e-2},
        "train": {
            "steps": 12,
            "eval_every": 4,
            "checkpoint_every": 3,
            "best_metric": "accuracy",
            "progress_bar": False,
            "tensorboard": False,
        },
    }
    return parse(values | changes, ExperimentConfig)


@pytest.fixture(scope="module")
def traces():
    """How often the model was traced for a training step in `swept`."""
    return []


@pytest.fixture(scope="module")
def swept(folder, traces):
    """A finished sweep of five runs in two slots."""

    def make_outputs(model, **how):
        apply = adapted.make_outputs(model, **how)

        def counted(params, inputs, key=None):
            traces.extend([] if key is None else [inputs["input_ids"].shape])
            return apply(params, inputs, key)

        return counted

    directory = folder / "swept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_outputs", make_outputs)
        sweep = SweepConfig(runs=RUNS, slots=2)
        rows = sweeps.train(config_of(folder), sweep, directory, command="lorax-ft sweep mine").rows
    return directory, rows


def test_a_group_is_one_compile_for_each_length_of_batch(swept, traces):
    assert len(swept[1]) == 5  # ranks, seeds and rates, in two slots one after the other
    assert sorted(traces) == [(16, 4), (16, 8)]


def test_each_run_is_an_ordinary_run_directory(swept, folder):
    directory, rows = swept

    assert [row.results["outcome"] for row in rows] == [*["finished"] * 4, "diverged"]
    for row in rows:
        path = directory / "runs" / row.name
        assert {"config.json", "metrics.jsonl", "adapter", "results.json", "loss.png"} <= {
            p.name for p in path.iterdir()
        }
        assert "lorax-ft sweep mine" in (path / "peft" / "README.md").read_text()
    assert not (directory / "groups" / "lora" / "checkpoints").exists()
    row = rows[3]
    found = finished.evaluate(directory / "runs" / row.name, "test")
    assert found.metrics == pytest.approx(row.results["metrics"]["test"], rel=1e-5)
    assert finished.predict(directory / "runs" / row.name, ["the apple is red"])


def test_a_run_is_exported_with_its_own_rank_and_not_with_its_slots(swept):
    directory, rows = swept

    for row, rank in zip(rows, (1, 1, 3, 3)):
        folder = directory / "runs" / row.name / "peft"
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {min(x.shape) for name, x in tensors.items() if "lora_" in name} == {rank}


def test_a_run_of_a_sweep_is_what_lorax_ft_train_makes_of_its_config(swept, folder, tmp_path):
    directory, rows = swept
    row = rows[3]  # rank 3 of at most 3, in a slot that another run had before it

    results = experiment.train(row.config, tmp_path / "alone")

    assert results["metrics"]["test"] == pytest.approx(row.results["metrics"]["test"], rel=1e-4)
    assert results["parameters"] == row.results["parameters"]
    told = [read_records(path) for path in (tmp_path / "alone", directory / "runs" / row.name)]
    losses = [[r["loss"] for r in records if r["kind"] == "eval"] for records in told]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 3


def test_a_sweep_that_broke_off_ends_in_the_same_table_and_bytes(swept, folder, monkeypatch):
    directory, broken = folder / "broken", slots._share_time

    def break_off(state, clock):
        if state.ticks == 17:  # two runs are finished or nearly so, others on their way
            raise KeyboardInterrupt
        return broken(state, clock)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "_share_time", break_off)
        with pytest.raises(KeyboardInterrupt):
            sweeps.train(config_of(folder), SweepConfig(runs=RUNS, slots=2), directory)
    assert not all((p / "results.json").exists() for p in (directory / "runs").iterdir())

    rows = sweeps.train(config_of(folder), SweepConfig(runs=RUNS, slots=2), directory).rows

    for row, undisturbed in zip(rows, swept[1], strict=True):
        assert row.results["metrics"] == undisturbed.results["metrics"]
        adapters = [
            (d / "runs" / row.name / "adapter" / "trainable.safetensors").read_bytes()
            for d in (directory, swept[0])
        ]
        assert adapters[0] == adapters[1]
        steps = [r["step"] for r in read_records(directory / "runs" / row.name)]
        assert steps == [r["step"] for r in read_records(swept[0] / "runs" / row.name)]


def test_a_sweep_that_is_stopped_saves_each_tick_once_and_goes_on(
    swept, folder, monkeypatch, capsys
):
    stops, sweep = [3, 3, 5], SweepConfig(runs=RUNS, slots=2)  # 3 is when a checkpoint is due

    @contextlib.contextmanager
    def stop_on_sigterm():
        yield lambda ticks: bool(stops) and ticks == stops[0] and bool(stops.pop(0))

    monkeypatch.setattr(slots.signals, "stop_on_sigterm", stop_on_sigterm)
    for _ in range(3):
        assert sweeps.train(config_of(folder), sweep, folder / "stopped").outcome == "preempted"
        assert "Stopped and saved" in capsys.readouterr().out

    rows = sweeps.train(config_of(folder), sweep, folder / "stopped").rows

    assert not stops
    metrics = [[row.results["metrics"] for row in found] for found in (rows, swept[1])]
    assert metrics[0] == metrics[1]


def test_a_finished_sweep_is_not_run_again(swept, folder, monkeypatch):
    monkeypatch.setattr(slots, "train_group", None)

    rows = sweeps.train(config_of(folder), SweepConfig(runs=RUNS), swept[0]).rows

    assert [row.name for row in rows] == [row.name for row in swept[1]]


def test_the_best_run_and_any_other_come_back(swept):
    directory, rows = swept
    best = sweeps.best(directory, "test.loss")  # of which less is better, as its name says
    assert best.metric("test.loss") == min(row.metric("test.loss") for row in rows)

    params, apply = sweeps.restore(directory, best.name)

    assert apply(params, {"input_ids": np.array([[7, 8, 4]], np.int32)}).shape == (1, 2)
    chosen = sweeps.restore(directory, metric="test.loss")[0]
    worst = sweeps.restore(directory, metric="test.loss", mode="max")[0]
    assert all(map(np.array_equal, jax.tree.leaves(chosen), jax.tree.leaves(params)))
    assert not all(map(np.array_equal, jax.tree.leaves(worst), jax.tree.leaves(params)))
    with pytest.raises(ValueError, match=r"got run='a' beside metric='test\.loss'"):
        sweeps.restore(directory, "a", metric="test.loss")
    with pytest.raises(FileNotFoundError, match="no run 'nothing'; it has 000"):
        sweeps.restore(directory, "nothing")


def test_the_report_has_every_run_in_a_page_of_its_own(swept, capsys):
    directory, rows = swept

    assert cli.main(["lorax-ft", "report", str(directory), "--metric=test.accuracy"]) == 0

    assert "Methods, each at its best setting" in capsys.readouterr().out
    records = list(csv.DictReader((directory / "report" / "runs.csv").read_text().splitlines()))
    assert [r["run"] for r in records] == [row.name for row in rows]
    assert float(records[0]["test.accuracy"]) == rows[0].metric("test.accuracy")
    page = (directory / "report" / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing from elsewhere
    assert page.count("<img") == len(list((directory / "report").glob("*.png"))) >= 4
    assert all(row.name in page for row in rows)


def test_the_plan_alone_trains_nothing(folder, tmp_path, capsys):
    sweep = SweepConfig(runs=sweeps.grid({"lora.rank": [1, 3], "seed": [0, 1]}), slots=2)

    planned = sweeps.train(config_of(folder), sweep, tmp_path / "plan", only_plan=True)

    assert (planned.outcome, planned.rows) == ("planned", [])

    table = capsys.readouterr().out
    assert re.search(r"lora +4 +2 +2 ", table)  # runs, slots, and compiles for two lengths
    assert not (tmp_path / "plan").exists()


def test_halving_ends_runs_that_others_outdo(folder, tmp_path):
    sweep = SweepConfig(runs=RUNS[:4], slots=2, halving=Halving(first=3, factor=2))

    rows = sweeps.train(config_of(folder), sweep, tmp_path / "halved").rows

    ends = {(row.results["outcome"], row.results["step"]) for row in rows}
    assert ("finished", 12) in ends
    assert ends <= {("finished", 12), ("pruned", 3), ("pruned", 6)}
    decided = json.loads((tmp_path / "halved/groups/lora/halving.json").read_text())
    assert len(decided["3"]) == 4
    pruned = [run for rung in decided.values() for run, (_, goes_on) in rung.items() if not goes_on]
    assert set(pruned) == {row.name for row in rows if row.results["outcome"] == "pruned"}


def test_a_run_out_of_patience_and_a_collapsed_one_end_alone_and_their_slots_go_on(
    folder, tmp_path, capsys
):
    worsening = {"train.best_metric": "loss", "train.best_mode": "max", "train.patience": 1}
    unwatched = {"train.eval_every": 0}  # twelve steps leave a model of one class, but nobody looks
    changes = [worsening, {"seed": 1}, unwatched, unwatched | {"seed": 1}]
    sweep = SweepConfig(runs=changes, slots=2, collapse_patience=2)

    rows = sweeps.train(config_of(folder), sweep, tmp_path / "ended").rows

    ends = [(row.results["outcome"], row.results["step"]) for row in rows]
    assert ends == [("stopped_early", 8), ("collapsed", 8), *[("finished", 12)] * 2]
    assert "predictions are of one class" in rows[1].results["warnings"][0]
    assert re.search(r"lora +4 +2 +2 ", capsys.readouterr().out)  # compiles: one for each length
    alone = experiment.train(rows[2].config, tmp_path / "alone")
    assert rows[2].results["metrics"]["test"] == pytest.approx(alone["metrics"]["test"], rel=1e-4)


def test_rungs_keep_the_best_and_their_decisions(tmp_path):
    rungs = Rungs(Halving(first=5, factor=2), tmp_path / "halving.json")
    for run, value in {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.4}.items():
        rungs.report(run, 5, value)

    assert [rungs.prunes(run, 5) for run in "abcd"] == [True, False, True, False]
    again = Rungs(Halving(first=5, factor=2), tmp_path / "halving.json")
    for run in "efgh":
        again.report(run, 5, 0.9)
    again.report("b", 5, 0.3)  # gone on with from before this evaluation
    assert not again.prunes("b", 5)
    assert not again.prunes("e", 5)


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_ends_its_own_run_and_no_other(tmp_path, worst):
    rungs = Rungs(Halving(first=5, factor=2), tmp_path / "halving.json")
    for run, value in {"a": 0.1, "b": worst, "c": 0.9, "d": 0.8}.items():
        rungs.report(run, 5, value)

    assert [rungs.prunes(run, 5) for run in "abcd"] == [True, True, False, False]
    text = (tmp_path / "halving.json").read_text()
    decided = json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert decided["5"]["b"] == [None, False]
    again = Rungs(Halving(first=5, factor=2), tmp_path / "halving.json")
    again.report("e", 5, worst)
    assert again.prunes("e", 5)
    alone = Rungs(Halving(first=5), tmp_path / "alone.json")
    alone.report("a", 5, worst)
    assert alone.prunes("a", 5)


BAD = [
    ([{"lora.rnak": 2}], {}, r"run 0: config\.lora\.rnak = 2: there is no such key.*lora\.rank"),
    ([{}, {"lora.rank": "many"}], {}, r"run 1: config\.lora\.rank = 'many' \(str\)"),
    ([{"optimizer.name.x": 2}], {}, r"config\.optimizer\.name\.x = 2: there is no such key"),
    ([{"lora.rank": 0}], {}, "run 0.*LoraConfig.rank must be at least 1"),
    ([{"seed": 1}, {"seed": 1}], {}, "001-seed=1 is the same run as 000-seed=1"),
    (
        [{"data.loader.batch_size": 8}, {"data.loader.batch_size": 16}],
        {"same_order": True},
        r"same_order: all runs are to see the same batches.*data\.loader\.batch_size",
    ),
    (
        [{}],
        {"metric": "test.f1", "halving": Halving(first=1)},
        "halving prunes by the validation split",
    ),
    ([{}], {"metric": "validation.acuracy"}, r"metric: the evaluation has no 'acuracy'.*accuracy"),
    ([{"train.best_metric": "f3"}], {}, r"000-best_metric=f3: config.train.best_metric: .* 'f3'"),
    ([{}, {"mesh.data": 2}], {}, "a run of a sweep has one device"),
    ([{}, {"optimizer.paged": True}], {}, "keep their optimizers' states on the device"),
    ([{}], {"memory": 1000}, r"one run alone takes more than the 1000\.0 B there are"),
]


@pytest.mark.parametrize(("changes", "options", "message"), BAD)
def test_bad_input_is_named_before_anything_trains(folder, tmp_path, changes, options, message):
    with pytest.raises(ValueError, match=message):
        sweeps.train(config_of(folder), SweepConfig(runs=changes, **options), tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "runs").exists()


def test_a_directory_of_another_sweep_or_of_something_else_is_refused(swept, folder, tmp_path):
    with pytest.raises(ValueError, match=r"made by another config or sweep file(?s:.*)metric"):
        sweeps.train(config_of(folder), SweepConfig(runs=RUNS, metric="test.f1"), swept[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in use, and not by a sweep"):
        sweeps.train(config_of(folder), SweepConfig(runs=RUNS), tmp_path)


def test_an_empty_sweep_is_an_error():
    with pytest.raises(ValueError, match="would have no run"):
        SweepConfig(runs=[])
    with pytest.raises(ValueError, match=r"grid: lora\.rank has no values"):
        sweeps.grid({"lora.rank": []})


def test_one_order_for_all_gives_every_seed_the_base_configs_batches(folder):
    made = sweeps.make_runs(
        config_of(folder), SweepConfig(runs=[{"seed": 4}, {"seed": 5}], same_order=True)
    )

    assert {run.config.data.loader.seed for run in made} == {0}


def test_groups_are_what_must_be_compiled_alike(folder):
    def count(*changes, **options):
        made = sweeps.make_runs(config_of(folder), SweepConfig(runs=changes, **options))
        return len(sweeps.group_runs(made))

    assert count({"lora.rank": 1}, {"lora.alpha": 1.0}, {"seed": 1}, {"train.steps": 3}) == 1
    assert count({}, {"optimizer.clip_norm": 0.1}) == 1
    assert count({}, {"optimizer.clip_norm": None}) == 2
    assert count({}, {"lora.targets": ["query"]}) == 2
    assert count({}, {"data.loader.batch_size": 8}) == 2
    assert count({}, sweeps.method("ia3"), sweeps.method("bitfit"), {"seed": 2}) == 3
    # Adafactor's step of one number depends on how many its array has, padding too
    assert count(*({"lora.rank": r, "optimizer.name": "adafactor"} for r in (1, 2))) == 2


def test_a_sweep_file_is_a_list_of_changes_or_a_sweep_config(folder, tmp_path):
    path = tmp_path / "ranks.py"
    path.write_text("def get_sweep(top=4, scale=1):\n    return [{'lora.rank': top * scale}]\n")

    assert sweeps.load_sweep(path).runs == ({"lora.rank": 4},)
    assert sweeps.load_sweep(f"{path}:8").runs == ({"lora.rank": 8},)
    assert sweeps.load_sweep(f"{path}:8,scale=2").runs == ({"lora.rank": 16},)
    with pytest.raises(ValueError, match=r"get_sweep\(top=4, scale=1\): got an unexpected .*'tip'"):
        sweeps.load_sweep(f"{path}:tip=2")
    path.write_text("def get_sweep():\n    return 3\n")
    with pytest.raises(ValueError, match="gave a int; expected a SweepConfig"):
        sweeps.load_sweep(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        sweeps.load_sweep(tmp_path / "nowhere.py")


def test_differences_are_paired_by_seed():
    found = compare({0: 0.5, 1: 0.9, 2: 0.4, 3: float("nan")}, {0: 0.4, 1: 0.8, 2: 0.3, 3: 0.1})

    assert found.pairs == 3
    assert found.difference == pytest.approx(0.1)
    assert found.p < 1e-6  # the same difference thrice, however much seeds differ


def test_runs_may_be_locked_out(folder, tmp_path):
    from lorax_ft.training.locks import run_lock

    assert runs.read_results(tmp_path) is None
    with run_lock(tmp_path / "sweep"), pytest.raises(RuntimeError, match="in use by another run"):
        sweeps.train(config_of(folder), SweepConfig(runs=RUNS), tmp_path / "sweep")
