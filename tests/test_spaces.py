"""Spaces: what runs may change of a config, and how many different runs there are to draw."""

import pytest

from lorax_ft.sweeps.spaces import choice, draws, log_uniform

RANKS = {"lora.rank": choice(1, 2, 4), "lora.targets": choice(["query"], ["value"])}


def test_draws_are_all_different_and_go_on_where_fewer_end():
    assert sorted(map(repr, draws(6, RANKS))) == sorted(
        repr({"lora.rank": rank, "lora.targets": [target]})
        for rank in (1, 2, 4)
        for target in ("query", "value")
    )
    rates = RANKS | {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}
    assert draws(20, rates, seed=3)[:8] == draws(8, rates, seed=3)
    assert len({repr(run) for run in draws(20, rates, seed=3)}) == 20


@pytest.mark.parametrize(("space", "most"), [(RANKS, 6), ({"seed": choice(0, 1, 1)}, 2)])
def test_more_draws_than_the_space_has_runs_are_refused(space, most):
    assert len(draws(most, space)) == most
    with pytest.raises(ValueError, match=f"{most + 1} runs are asked for, .* has {most}"):
        draws(most + 1, space)
