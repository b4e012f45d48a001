"""Parsing configs: nothing is guessed, an error names the key, a round trip is the identity."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from lorax_ft.config import ExperimentConfig, flat, parse, to_dict
from lorax_ft.methods import METHODS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rank: int = 8
    alpha: float = 16.0
    kind: Literal["nf4", "int8"] = "nf4"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"Inner.rank must be at least 1, got {self.rank}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Csv:
    kind: Literal["csv"] = "csv"
    csv: str
    separator: str = ","


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    kind: Literal["package"] = "package"
    package: str
    depth: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    optional: Inner | None = None
    source: Csv | Package | None = None
    targets: str | tuple[str, ...] = "all-linear"
    pairs: tuple[tuple[str, int], ...] = ()
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shape: tuple[int, int] = (1, 1)
    flag: bool = False
    anything: Any = None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"inner": {"rank": 4}},
        {"optional": {}},
        {"source": {"csv": "a.csv"}},
        {"source": {"package": "logging", "depth": 2}},
        {"targets": ("query", "value"), "pairs": (("query", 2),), "shape": (2, 4), "flag": True},
        {"ranks": {"query": 2}, "anything": [1, "two"]},
    ],
)
def test_config_dict_to_dataclass_to_json_and_back_is_the_identity(values):
    config = parse(ConfigDict(values), Outer)

    assert parse(json.loads(json.dumps(to_dict(config))), Outer) == config


def test_an_empty_section_turns_an_optional_part_on():
    assert parse(ConfigDict({"optional": {}}), Outer).optional == Inner()


def test_a_list_stands_for_a_tuple_and_an_int_for_a_float():
    config = parse({"targets": ["query"], "inner": {"alpha": 2}}, Outer)

    assert config.targets == ("query",)
    assert config.inner.alpha == 2.0
    assert isinstance(config.inner.alpha, float)


def test_patterns_with_dots_come_as_pairs():
    config = parse(ConfigDict({"ranks": ((".*query", 2),), "pairs": ((".*query", 2),)}), Outer)

    assert config.ranks == {".*query": 2}
    assert config.pairs == ((".*query", 2),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 4}, "config.rank = 4: there is no such key. Nearest: config.inner.rank"),
        (
            {"inner": {"rnak": 4}},
            "inner.rnak = 4: there is no such key. Nearest: config.inner.rank.",
        ),
        ({"iner": {}}, "config.iner = {}: there is no such key. Nearest: config.inner."),
        ({"inner": {"rank": "4"}}, "config.inner.rank = '4' (str): expected an int."),
        ({"inner": {"rank": True}}, "config.inner.rank = True (bool): expected an int."),
        ({"inner": {"rank": 4.0}}, "config.inner.rank = 4.0 (float): expected an int."),
        ({"inner": {"rank": 0}}, "config.inner: Inner.rank must be at least 1, got 0."),
        ({"inner": None}, "config.inner = None (NoneType): expected the keys of a Inner."),
        ({"optional": 3}, "config.optional = 3 (int): expected the keys of a Inner or None."),
        ({"optional": {"rnak": 4}}, "config.optional.rnak = 4: there is no such key."),
        ({"inner": {"kind": "nf5"}}, "expected one of 'nf4', 'int8'. Nearest: 'nf4'."),
        ({"source": {"package": "os", "deth": 1}}, "config.source.deth = 1: there is no such key."),
        ({"source": {"depth": 1}}, "config.source.package is missing; expected a str."),
        ({"source": {"kind": "package"}}, "config.source.package is missing; expected a str."),
        ({"targets": ("query", 3)}, "config.targets = ('query', 3) (tuple)"),
        ({"shape": (1, 2, 3)}, "shape = (1, 2, 3) (tuple): expected a tuple of an int, an int."),
        ({"pairs": (("query", "2"),)}, "config.pairs[0][1] = '2' (str): expected an int."),
        ({"ranks": {"query": "2"}}, "config.ranks.query = '2' (str): expected an int."),
    ],
)
def test_an_error_names_the_key_the_value_and_what_was_expected(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(ConfigDict(values), Outer)


def test_flat_names_every_value_by_its_dotted_key():
    assert flat({"a": {"b": 1, "c": {}}, "d": 2}) == {
        "config.a.b": 1,
        "config.a.c": {},
        "config.d": 2,
    }


SMALL = {"model": {"path": "somewhere"}, "data": {"source": {"train": "a.csv"}}, "lora": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantization": {"kind": "nf4"}, "lora": {"rank": 4, "layers": (0, 2)}},
        {"data": {"source": {"train": "a.txt"}, "task": {"kind": "language_modelling"}}},
        {"lora": {"rank_pattern": ((".*query", 2),)}, "trainable": (".*norm.*",)},
        {"lora": None, "full": {}, "model": {"path": "p", "overrides": {"rope_theta": 1.0}}},
    ],
)
def test_an_experiment_survives_json(changes):
    config = parse(ConfigDict(SMALL | changes), ExperimentConfig)

    assert parse(json.loads(json.dumps(to_dict(config))), ExperimentConfig) == config


def test_every_method_of_the_table_has_a_section():
    for name in METHODS:
        config = parse(SMALL | {"lora": None, name: {}}, ExperimentConfig)

        assert [type(method) for method in config.methods] == [METHODS[name].config]


def test_an_experiment_without_a_method_says_how_to_add_one():
    with pytest.raises(ValueError, match=r"config: nothing would be trained: .*lora"):
        parse(SMALL | {"lora": None}, ExperimentConfig)


def test_a_cache_of_quantised_weights_without_a_quantisation_is_refused():
    model = SMALL["model"] | {"cache": "quantised"}
    with pytest.raises(ValueError, match=r"model\.cache = 'quantised'.*quantization"):
        parse(SMALL | {"model": model}, ExperimentConfig)
    assert parse(SMALL | {"model": model, "quantization": {}}, ExperimentConfig).model.cache
