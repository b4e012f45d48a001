"""Fields of a search: one for each program, sharing its trials, of values that a config takes."""

import pathlib
import re

import pytest

from lorax_ft import sweeps
from lorax_ft.sweeps.groups import evaluated
from lorax_ft.sweeps.search.fields import fields
from lorax_ft.sweeps.search.study import StudyQueue
from tests.test_study import SPACE, drain, search
from tests.test_sweep import config_of, folder  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_space_is_parted_into_groups_that_share_the_trials(folder, tmp_path):  # noqa: F811
    targets = sweeps.choice(("query",), ("query", "value"))
    sweep = search(space=SPACE | {"lora.targets": targets}, trials=5)

    found = fields(config_of(folder), sweep)

    assert [field.space["lora.targets"].values for field in found] == [
        (("query",),),
        (("query", "value"),),
    ]
    assert [field.trials for field in found] == [3, 2]
    names = [
        run.name for f in found for run in drain(StudyQueue(f, config_of(folder), sweep, tmp_path))
    ]
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


def test_a_grid_takes_no_more_trials_than_it_has_points(folder):  # noqa: F811
    space = {"lora.targets": sweeps.choice(["query"], ["value"]), "seed": sweeps.choice(0, 1, 2)}

    def shares(trials):
        found = fields(config_of(folder), search(space=space, sampler="grid", trials=trials))
        return [field.trials for field in found]

    assert shares(5) == [3, 2]
    assert shares(100) == [3, 3]


def test_a_group_is_evaluated_when_the_first_of_its_runs_may_be(folder):  # noqa: F811
    space = {"train.eval_every": sweeps.choice(0, 5, 3), "train.steps": sweeps.choice(3, 12, 9)}

    (field,) = fields(config_of(folder), search(space=space))

    assert evaluated(field.group, steps_per_epoch=7) == (3, 12)
    (field,) = fields(config_of(folder), search(space={"train.eval_every": sweeps.choice(0, 12)}))
    assert evaluated(field.group, steps_per_epoch=7) == (None, 12)
    (field,) = fields(config_of(folder), search(space={"train.eval_every": sweeps.choice(None)}))
    assert evaluated(field.group, steps_per_epoch=7) == (7, 12)
    assert evaluated(field.group, steps_per_epoch=12) == (None, 12)


def test_the_committed_search_is_planned_as_one_program(folder, tmp_path, capsys):  # noqa: F811
    config = sweeps.change(config_of(folder), {"data.loader.buckets": [8]})
    sweep = sweeps.load_sweep(ROOT / "configs/sweeps/search.py")

    sweeps.train(config, sweep, tmp_path, only_plan=True)

    assert re.search(r"lora +32 +8 +1 ", capsys.readouterr().out)  # runs, slots, compiles
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("every", [0, 12])
def test_a_pruner_of_runs_evaluated_at_their_ends_alone_is_refused(folder, tmp_path, every):  # noqa: F811
    config = sweeps.change(config_of(folder), {"train.eval_every": every})

    with pytest.raises(ValueError, match=r"pruner = 'median' can end no run of lora: .* 12 steps"):
        sweeps.train(config, search(pruner="median"), tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "runs").exists()
