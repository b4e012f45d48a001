"""Fields of a search: one for each program, sharing its trials, of values that a config takes."""

import pytest

from lorax_ft import sweeps
from lorax_ft.sweeps.fields import fields
from lorax_ft.sweeps.groups import evaluated
from tests.test_study import search
from tests.test_sweep import config_of, folder  # noqa: F401


def test_a_group_is_evaluated_when_the_first_of_its_runs_may_be(folder):  # noqa: F811
    space = {"train.eval_every": sweeps.choice(0, 5, 3), "train.steps": sweeps.choice(3, 12, 9)}

    (field,) = fields(config_of(folder), search(space=space))

    assert evaluated(field.group, steps_per_epoch=7) == (3, 12)
    (field,) = fields(config_of(folder), search(space={"train.eval_every": sweeps.choice(0, 12)}))
    assert evaluated(field.group, steps_per_epoch=7) == (None, 12)
    (field,) = fields(config_of(folder), search(space={"train.eval_every": sweeps.choice(None)}))
    assert evaluated(field.group, steps_per_epoch=7) == (7, 12)
    assert evaluated(field.group, steps_per_epoch=12) == (None, 12)


@pytest.mark.parametrize("every", [0, 12])
def test_a_pruner_of_runs_evaluated_at_their_ends_alone_is_refused(folder, tmp_path, every):  # noqa: F811
    config = sweeps.change(config_of(folder), {"train.eval_every": every})

    with pytest.raises(ValueError, match=r"pruner = 'median' can end no run of lora: .* 12 steps"):
        sweeps.train(config, search(pruner="median"), tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "runs").exists()
