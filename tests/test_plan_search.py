"""Searches among plans: the largest that fits by few compiles, and what makes a run fit."""

import dataclasses
import re

import jax
import pytest

from lorax_ft import planning
from lorax_ft.planning import search, shapes, suggestions
from lorax_ft.planning.plan import make_plan
from tests.plans import CPU, SIZES, config_of, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def planned(model):
    return make_plan(config_of(model), CPU)


def straight(base, row, planned, limit):
    """`make` for plans whose bytes grow by `row` a row from `base`."""

    def make(config):
        size = config.data.loader.batch_size
        needed = base + row * size
        parts = dict.fromkeys(planned.parts, 0) | {"weights": base, "activations": row * size}
        numbers = {"needed": needed, "usable": limit, "parts": parts}
        return dataclasses.replace(planned, batch_size=size, **numbers)

    return make


@pytest.mark.parametrize(("limit", "expected"), [(1000, 92), (85, 0), (100, 2), (10**6, 99992)])
def test_the_largest_batch_is_found_by_few_compiles(model, planned, limit, expected):
    config = config_of(model, batch_size=8)
    make = straight(80, 10, planned, limit)

    found = search.largest(config, make(config), "batch", make)

    assert found.compiles <= search.COMPILES
    assert found.size <= expected
    assert found.size >= expected * (1 - search.CLOSE) - 1
    if expected == 0:
        assert (found.plan, found.refused) == (None, 1)
        assert "No batch fits: 1 rows" in planning.largest_text(found)


def test_the_largest_length_stops_at_the_models_positions(model, planned):
    def make(config):
        length = config.data.loader.buckets[-1]
        return dataclasses.replace(planned, length=length, needed=length, usable=10**9)

    assert planned.longest == SIZES["max_position_embeddings"]
    found = search.largest(config_of(model), make(config_of(model, length=64)), "length", make)

    assert (found.size, found.refused) == (256, None)
    assert found.compiles == 2
    text = planning.largest_text(found)
    assert text.startswith(
        "Largest length that fits: 256 tokens a row (0.00 GiB), and the model has"
    )
    assert "positions for 256" in text


@pytest.mark.parametrize(("limit", "words"), [
    (1000, r"^Largest batch that fits: 9\d rows \(0\.00 GiB\); 9\d do not fit \["),
    (10**12, r"^Largest batch that fits: at least \d+ rows \([\d.]+ GiB\); more were not tried \["),
])  # fmt: skip
def test_a_largest_size_beyond_which_nothing_was_refused_is_told_as_at_least(
    model, planned, limit, words
):
    config = config_of(model, batch_size=8)
    make = straight(80, 10, planned, limit)

    found = search.largest(config, make(config), "batch", make)

    assert (found.refused is None) == (limit == 10**12)
    assert re.search(words, planning.largest_text(found))


def test_the_largest_length_of_packed_rows_is_one_that_was_compiled(model, planned):
    def make(config):
        ids = shapes.batch_shapes(config)["segment_ids"]
        return dataclasses.replace(planned, length=ids.shape[1], needed=ids.shape[1], usable=130)

    config = config_of(model, length=32, packed=64)
    found = search.largest(config, make(config), "length", make)

    assert found.plan is not None
    assert found.size == found.plan.length == 128
    sized = search.sized(config, "length", 192).data
    assert (sized.packed_length, sized.loader.buckets[-1], sized.task.max_length) == (192, 192, 32)


def test_suggestions_are_tried_in_order_and_kept_where_they_save(model, planned):
    def make(config):
        needed = 1000 * config.data.loader.batch_size
        needed //= 2 if config.model.compute.remat == "full" else 1
        needed //= config.train.accumulation
        return dataclasses.replace(planned, needed=needed, usable=600)

    config = config_of(model)
    suggested = suggestions.suggest(config, make(config), make)
    trials = suggested.trials

    assert not suggested.impossible
    assert [trial.suggestion.name for trial in trials] == ["remat", "gradient accumulation"]
    assert trials[-1].plan.fits
    assert trials[-1].flags == "--config.train.accumulation=8"
    text = planning.suggestions_text(suggested, make(config))
    assert "remat: 0.00 GiB, not yet  --config.model.compute.remat=full" in text


@pytest.mark.parametrize(("method", "impossible", "why"), [
    ({"top_layers": {"count": 1}}, "scanned layers", "set scan_layers=False"),
    ({"adalora": {"rank": 4, "target_rank": 2}}, "paged optimizer states", "optimizer.paged=False"),
])  # fmt: skip
def test_a_suggestion_that_the_method_does_not_know_is_told_and_left_out(
    model, planned, monkeypatch, method, impossible, why
):
    names = (impossible, "remat", "half the batch")
    table = [s for s in suggestions.SUGGESTIONS if s.name in names]
    monkeypatch.setattr(suggestions, "SUGGESTIONS", table)

    def make(config):
        shapes.make_step(config, shapes.describe(config), jax.devices())
        needed = 1000 - 100 * (config.model.compute.remat == "full")
        needed *= config.data.loader.batch_size
        return dataclasses.replace(planned, needed=needed, usable=4000)

    method |= {"lora": None, "quantization": None}
    config = config_of(model, compute={"scan_layers": False}, **method)
    suggested = suggestions.suggest(config, make(config), make)

    assert [trial.suggestion.name for trial in suggested.trials] == ["remat", "half the batch"]
    assert suggested.trials[-1].plan.fits
    assert list(suggested.impossible) == [impossible]
    text = planning.suggestions_text(suggested, make(config))
    assert why in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith(f"  not here: {impossible}. ")


def test_a_compiler_that_has_not_what_is_suggested_does_not_end_the_suggestions(model, planned):
    def make(config):
        if config.model.compute.remat == "offload":
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no memory of a host\nin 20 lines")
        return dataclasses.replace(planned, needed=2000, usable=1000)

    config = config_of(model)
    suggested = suggestions.suggest(config, make(config), make)

    assert suggested.trials == ()
    assert suggested.impossible == {
        "layers' inputs on the host": "UNIMPLEMENTED: no memory of a host"
    }
    text = planning.suggestions_text(suggested, make(config))
    assert "Nothing in the table of suggestions would save memory here." in text
    assert text.endswith("not here: layers' inputs on the host. UNIMPLEMENTED: no memory of a host")


def test_every_suggestion_changes_a_config_that_it_applies_to(model):
    compute = {"scan_layers": False, "param_dtype": "float32"}
    changed = {"quantization": None, "mesh": {"data": 8}, "optimizer": {"name": "adamw"}}
    config = config_of(model, compute=compute, batch_size=16, **changed)
    target = planning.parse_target("h100:8")
    for suggestion in suggestions.SUGGESTIONS:
        changes = suggestion.changes(config, target)
        assert changes, suggestion.name
        assert suggestions.with_changes(config, changes) != config
