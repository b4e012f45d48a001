"""Searches: an Optuna study proposes runs, prunes them, and goes on where a process ended."""

import json
import math

import pytest

from lorax_ft import sweeps
from lorax_ft.sweeps.search.fields import fields
from lorax_ft.sweeps.search.study import StudyQueue
from lorax_ft.sweeps.specification import Search, SweepConfig
from tests.test_sweep import config_of, folder  # noqa: F401

SPACE = {
    "lora.rank": sweeps.choice(1, 2, 4),
    "lora.dropout": sweeps.choice(0.0, 0.2),
    "optimizer.learning_rate": sweeps.log_uniform(1e-4, 1e-2),
}


def search(metric="validation.accuracy", mode=None, **options):
    options = {"space": SPACE, "trials": 4, "sampler": "random"} | options
    return SweepConfig(search=Search(**options), metric=metric, mode=mode)


def queue_of(folder, directory, sweep=None):  # noqa: F811
    config, sweep = config_of(folder), sweep or search()
    (field,) = fields(config, sweep)
    return StudyQueue(field, config, sweep, directory)


def drain(queue):
    return list(iter(queue.next, None))


def results(value, outcome="finished"):
    return {"outcome": outcome, "metrics": {"validation": {"accuracy": value}}}


def write_results(directory, run, value):
    path = directory / "runs" / run.name
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results(value)))


def test_a_study_proposes_as_many_runs_as_it_has_trials(folder, tmp_path):  # noqa: F811
    queue = queue_of(folder, tmp_path)

    runs = drain(queue)

    assert len(runs) == 4
    assert {run.config.lora.rank for run in runs} <= {1, 2, 4}
    assert all(1e-4 <= run.config.optimizer.learning_rate <= 1e-2 for run in runs)


def test_a_study_gone_on_with_loses_and_repeats_no_run(folder, tmp_path):  # noqa: F811
    whole = [run.name for run in drain(queue_of(folder, tmp_path / "whole"))]
    directory = tmp_path / "broken"
    queue = queue_of(folder, directory)
    first, second, third = (queue.next() for _ in range(3))
    queue.finish(first, results(0.5))
    write_results(directory, second, 0.7)  # it ended, but the study was not told

    again = queue_of(folder, directory)
    again.resumed(again.known(third.name))

    assert again.left == 1
    assert [first.name, second.name, third.name, *(r.name for r in drain(again))] == whole
    assert again._study.best_value == 0.7


@pytest.mark.parametrize(
    ("pruner", "options"),
    [
        ("median", {}),
        ("halving", {}),
        ("hyperband", {"reduction_factor": 4}),  # of which steps 4 to 12 make one bracket
    ],
)
def test_a_pruner_ends_what_is_behind_the_others(folder, tmp_path, pruner, options):  # noqa: F811
    queue = queue_of(folder, tmp_path, search(pruner=pruner, pruner_options=options, trials=8))
    queue.expect(4, 12)
    for _ in range(5):
        run = queue.next()
        queue.report(run, 4, {"accuracy": 0.9})
        queue.report(run, 4, {"accuracy": 0.9})  # as a run that was gone on with does
        assert not queue.prunes(run, 4)
        queue.finish(run, results(0.9))
    for value in (0.1, math.nan, -math.inf):
        poor = queue.next()
        queue.report(poor, 4, {"accuracy": value})
        assert queue.prunes(poor, 4)
        queue.finish(poor, results(value, "pruned"))
    assert queue.left == 0


def test_a_draw_that_cannot_be_takes_its_trial_and_no_more(folder, tmp_path):  # noqa: F811
    space = {  # a warm-up is of steps or a fraction
        "optimizer.warmup_steps": sweeps.choice(None, 2),
        "optimizer.warmup_fraction": sweeps.choice(None, 0.5),
    }
    sweep, said = search(space=space, sampler="grid"), []
    config = config_of(folder)
    (field,) = fields(config, sweep)
    queue = StudyQueue(field, config, sweep, tmp_path, say=said.append)

    assert len(drain(queue)) == 3
    assert len(said) == 1
    assert "cannot be" in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "best"}, "Search.sampler is 'best', expected one of"),
        ({"sampler": "grid"}, "'grid', and optimizer.learning_rate is a range"),
        ({"pruner": "best"}, "Search.pruner is 'best'"),
        ({"pruner_options": {"min_resource": 3}}, "'min_resource': 3} are of no pruner"),
        ({"trials": 0}, "at least one trial"),
    ],
)
def test_bad_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        search(**options)


def test_a_pruner_of_what_is_not_evaluated_on_the_way_is_refused():
    with pytest.raises(ValueError, match=r"search\.pruner prunes by the validation .*'test\.f1'"):
        SweepConfig(search=Search(space=SPACE, trials=4, pruner="median"), metric="test.f1")


def test_a_grid_is_gone_through_once_whoever_goes_on_with_it(folder, tmp_path):  # noqa: F811
    space = {"lora.rank": sweeps.choice(1, 2, 4), "lora.dropout": sweeps.choice(0.0, 0.2)}
    sweep = search(space=space, sampler="grid", trials=10)
    whole = [run.name for run in drain(queue_of(folder, tmp_path / "whole", sweep))]
    directory = tmp_path / "broken"
    queue = queue_of(folder, directory, sweep)
    queue.finish(queue.next(), results(0.5))
    second = queue.next().name
    study = queue._study
    study._storage.create_new_trial(study._study_id)  # killed before it drew its values

    again = queue_of(folder, directory, sweep)
    again.resumed(again.known(second))
    left = drain(again)

    assert len({tuple(name.split("-")[1:]) for name in whole}) == 6
    assert [run.name for run in left] == whole[2:]
    for run in (again.known(second), *left):
        again.finish(run, results(0.5))
    assert again.left == 0


@pytest.mark.parametrize("pruner", ["halving", "hyperband"])
def test_a_run_may_be_pruned_before_any_is_complete(folder, tmp_path, pruner):  # noqa: F811
    queue = queue_of(
        folder, tmp_path, search(pruner=pruner, pruner_options={"reduction_factor": 4})
    )
    queue.expect(4, 12)
    good, poor = queue.next(), queue.next()
    queue.report(good, 4, {"accuracy": 0.9})
    assert not queue.prunes(good, 4)
    queue.report(poor, 4, {"accuracy": 0.1})

    assert queue.prunes(poor, 4)


@pytest.mark.parametrize(
    ("pruner", "options", "message"),
    [
        ("median", {"n_warmup": 3}, r"n_warmup = 3, .*MedianPruner does not.*n_warmup_steps"),
        ("halving", {"max_resource": 9}, r"max_resource = 9, .*nearest: min_resource"),
        ("halving", {"reduction_factor": 1}, r"pruner_options = {'reduction_factor': 1}: "),
        ("hyperband", {"reduction_factor": 1}, r"pruner_options = {'reduction_factor': 1}: "),
        ("hyperband", {"min_resource": 9, "max_resource": 9}, "between step 9.* and 9, the most"),
    ],
)
def test_options_that_a_pruner_does_not_take_are_named(folder, tmp_path, pruner, options, message):  # noqa: F811
    sweep = search(pruner=pruner, pruner_options=options)

    with pytest.raises(ValueError, match=message):
        sweeps.train(config_of(folder), sweep, tmp_path / "sweep", only_plan=True)
    with pytest.raises(ValueError, match=message):
        queue_of(folder, tmp_path, sweep).expect(4, 12)


def test_a_pruner_that_first_prunes_when_runs_have_ended_is_refused(folder, tmp_path):  # noqa: F811
    queue = queue_of(
        folder, tmp_path, search(pruner="halving", pruner_options={"min_resource": 12})
    )

    with pytest.raises(ValueError, match="'min_resource': 12}: no run would be pruned"):
        queue.expect(4, 12)


def test_a_search_is_trained_as_a_sweep(folder, tmp_path):  # noqa: F811
    config = sweeps.change(config_of(folder), {"train.steps": 4, "train.eval_every": 2})
    sweep = SweepConfig(search=Search(space={"lora.rank": sweeps.choice(1, 3)}, trials=3), slots=2)

    rows = sweeps.train(config, sweep, tmp_path / "search").rows

    assert len(rows) == 3
    assert {row.results["outcome"] for row in rows} <= {"finished", "collapsed"}
    again = sweeps.train(config, sweep, tmp_path / "search")
    assert again.rows[0].results == rows[0].results
