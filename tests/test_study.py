"""Searches: an Optuna study proposes runs, prunes them, and goes on where a process ended."""

import json

import pytest

from lorax_ft import sweeps
from lorax_ft.sweeps.fields import fields
from lorax_ft.sweeps.specification import Search, SweepConfig
from lorax_ft.sweeps.study import StudyQueue
from tests.test_sweep import config_of, folder  # noqa: F401

SPACE = {
    "lora.rank": sweeps.choice(1, 2, 4),
    "lora.dropout": sweeps.choice(0.0, 0.2),
    "optimizer.learning_rate": sweeps.log_uniform(1e-4, 1e-2),
}


def search(**options):
    return SweepConfig(
        search=Search(**{"space": SPACE, "trials": 4, "sampler": "random"} | options)
    )


def queue_of(folder, directory, sweep=None):  # noqa: F811
    config, sweep = config_of(folder), sweep or search()
    (field,) = fields(config, sweep)
    return StudyQueue(field, config, sweep, directory)


def queue_of_field(field, folder, directory, sweep):  # noqa: F811
    return StudyQueue(field, config_of(folder), sweep, directory)


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


def test_a_pruner_ends_what_is_behind_the_others(folder, tmp_path):  # noqa: F811
    queue = queue_of(folder, tmp_path, search(pruner="median", trials=8))
    for value in (0.9, 0.8, 0.9, 0.8, 0.9):
        run = queue.next()
        queue.report(run, 4, {"accuracy": value})
        queue.report(run, 4, {"accuracy": value})  # as a run that was gone on with does
        queue.finish(run, results(value))
    poor = queue.next()
    queue.report(poor, 4, {"accuracy": 0.1})

    assert queue.prunes(poor, 4)
    queue.finish(poor, results(0.1, "pruned"))


def test_the_space_is_parted_into_groups_that_share_the_trials(folder, tmp_path):  # noqa: F811
    targets = sweeps.choice(("query",), ("query", "value"))
    sweep = search(space=SPACE | {"lora.targets": targets}, trials=5)

    found = fields(config_of(folder), sweep)

    assert [field.space["lora.targets"].values for field in found] == [
        (("query",),),
        (("query", "value"),),
    ]
    assert [field.trials for field in found] == [3, 2]
    names = [run.name for f in found for run in drain(queue_of_field(f, folder, tmp_path, sweep))]
    assert [name[:3] for name in names] == ["000", "001", "002", "003", "004"]
    for field in found:
        ranks = {run.config.lora.rank for run in field.group.runs}
        assert ranks == {1, 2, 4}
        assert field.group.drops


BAD = [
    ({"lora.rnak": sweeps.choice(1)}, r"lora\.rnak = 1: there is no"),
    (
        {"lora.alpha": sweeps.choice(8.0, "wide")},
        r"space: lora\.alpha = 'wide' cannot be, .*\(str\)",
    ),
    ({"lora.dropout": sweeps.uniform(-0.5, 0.5)}, r"space: lora\.dropout = -0\.5 cannot be"),
    ({"optimizer.b1": sweeps.uniform(0.8, 0.9)}, r"space: optimizer\.b1 is a range, and each"),
    (
        {
            "lora.targets": sweeps.choice(
                *([name] for name in ("query", "key", "value", "up", "down"))
            )
        },
        r"Search\.trials = 4: the space makes 5 groups \(lora-1, lora-2",
    ),
]


@pytest.mark.parametrize(("space", "message"), BAD)
def test_a_space_that_cannot_be_is_named_when_the_sweep_is_made(folder, space, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        fields(config_of(folder), search(space=space))


def test_a_value_may_go_with_some_values_of_another_key_alone(folder):  # noqa: F811
    space = {
        "lora": sweeps.choice(None, {"rank": 1, "targets": ["query"]}),
        "bitfit": sweeps.choice({}),
        "lora.alpha": sweeps.choice(1.0, 2.0),
    }

    assert len(fields(config_of(folder), search(space=space))) == 2
    with pytest.raises(ValueError, match=r"lora\.alpha = 'wide' cannot be"):
        fields(config_of(folder), search(space=space | {"lora.alpha": sweeps.choice(1.0, "wide")}))


def test_a_storage_that_is_none_is_named(folder, tmp_path):  # noqa: F811
    with pytest.raises(OSError, match="the study at nonsense cannot be reached"):
        queue_of(folder, tmp_path, search(storage="nonsense"))


def test_a_study_of_another_sweep_file_is_refused(folder, tmp_path):  # noqa: F811
    queue_of(folder, tmp_path)

    with pytest.raises(ValueError, match="was made by another sweep file"):
        queue_of(folder, tmp_path, search(trials=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "grid"}, "Search.sampler is 'grid', expected one of"),
        ({"pruner": "best"}, "Search.pruner is 'best'"),
        ({"trials": 0}, "at least one trial"),
    ],
)
def test_bad_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        search(**options)


def test_a_pruner_of_what_is_not_evaluated_on_the_way_is_refused():
    with pytest.raises(ValueError, match=r"search\.pruner prunes by the validation .*'test\.f1'"):
        SweepConfig(search=Search(space=SPACE, trials=4, pruner="median"), metric="test.f1")


def test_a_search_is_trained_as_a_sweep(folder, tmp_path):  # noqa: F811
    config = sweeps.change(config_of(folder), {"train.steps": 4, "train.eval_every": 2})
    sweep = SweepConfig(search=Search(space={"lora.rank": sweeps.choice(1, 3)}, trials=3), slots=2)

    rows = sweeps.train(config, sweep, tmp_path / "search")

    assert len(rows) == 3
    assert {row.results["outcome"] for row in rows} <= {"finished", "collapsed"}
    assert sweeps.train(config, sweep, tmp_path / "search")[0].results == rows[0].results
