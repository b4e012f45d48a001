"""Configs: a ConfigDict or JSON object is parsed once, here, into frozen dataclasses.

Every part of the library owns its config dataclass, with the defaults and the checks of its values;
this file puts them together and says what is wrong with a key by its full name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from lorax_ft.data import DataConfig
from lorax_ft.methods import (
    METHODS,
    AdaLoraConfig,
    AdapterConfig,
    BitFitConfig,
    FullConfig,
    HeadConfig,
    IA3Config,
    LoraConfig,
    NormConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    TopLayersConfig,
    VeraConfig,
)
from lorax_ft.models import ComputeConfig
from lorax_ft.quantization import QuantizationConfig
from lorax_ft.training import MeshConfig, OptimizerConfig, ProcessesConfig, TrainConfig
from lorax_ft.trees import nearest

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """The model that a run starts from, and how it is computed."""

    path: str  # a directory, a hub id, or "package:NAME/FOLDER" in an installed Python package
    tokenizer: str | None = None  # likewise, or a file; None: the model's own
    compute: ComputeConfig = ComputeConfig()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of its config.json
    ignore_fields: tuple[str, ...] = ()  # of its config.json, that change nothing
    cache: str | None = None  # folder that keeps quantised weights, for later starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole run. A section named after a row of `methods.METHODS` puts that method to use."""

    model: PretrainedConfig
    data: DataConfig
    quantization: QuantizationConfig | None = None
    lora: LoraConfig | None = None
    adalora: AdaLoraConfig | None = None
    vera: VeraConfig | None = None
    ia3: IA3Config | None = None
    adapters: AdapterConfig | None = None
    prompt: PromptConfig | None = None
    p_tuning: PTuningConfig | None = None
    prefix: PrefixConfig | None = None
    bitfit: BitFitConfig | None = None
    norms: NormConfig | None = None
    top_layers: TopLayersConfig | None = None
    head: HeadConfig | None = None
    full: FullConfig | None = None
    train_head: bool = True  # a classifier is trained whole beside any method
    trainable: tuple[str, ...] = ()  # regexes over paths of more arrays to train whole
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    processes: ProcessesConfig | None = None  # of which this one is one; None: it is alone
    baseline: bool = False  # report TF-IDF with logistic regression on the same data, for texts
    seed: int = 0

    def __post_init__(self):
        if not self.methods and not self.trainable:
            raise ValueError(
                "nothing would be trained: add a section for a method "
                f"({', '.join(METHODS)}), such as --config.lora.rank=8."
            )
        if self.model.cache is not None and self.quantization is None:
            raise ValueError(
                f"model.cache = {self.model.cache!r}: it keeps quantised weights. Set quantization "
                "too, such as --config.quantization.kind=nf4, or leave it None."
            )
        if (packed := self.data.packed_length) is not None and (self.prompt or self.p_tuning):
            raise ValueError(
                f"data.packed_length = {packed}: a prompt stands before each text, and packed rows "
                "hold several. Set it to None, or train prefix instead of prompt and p_tuning."
            )

    @property
    def methods(self) -> tuple[Any, ...]:
        """The configs of the methods in use, in the order of `METHODS`."""
        return tuple(c for name in METHODS if (c := getattr(self, name)) is not None)


def parse(values: Any, cls: type[T], name: str = "config") -> T:
    """Makes a frozen dataclass of a ConfigDict or a (JSON) mapping, converting nothing silently.

    Nested dataclasses, tuples, mappings, literals, optionals and unions are followed. A list stands
    for a tuple and an int for a float. Raises ValueError for an unknown key, a missing one and a
    value of the wrong type, naming the dotted key, the value, what was expected and the nearest.
    """
    values = _plain(values)
    if not isinstance(values, Mapping):
        raise ValueError(_wrong(name, values, f"the keys of a {cls.__name__}"))
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in fields:
            raise ValueError(unknown_key(f"{name}.{key}", value, key_names(cls, name)))
    hints = typing.get_type_hints(cls)
    arguments = {key: convert(v, hints[key], f"{name}.{key}") for key, v in values.items()}
    for key, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and key not in arguments:
            raise ValueError(f"{name}.{key} is missing; expected {describe(hints[key])}.")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:  # the dataclass checks itself; say where it stands
        raise ValueError(f"{name}: {error}") from error


def convert(value: Any, expected: Any, name: str) -> Any:
    """`value` as the annotated type `expected`. Raises ValueError naming `name` where it is not."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    value = _plain(value)
    if expected is Any:
        return value
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return value if isinstance(value, expected) else parse(value, expected, name)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, expected, name)
    if origin is tuple:
        return _convert_tuple(value, expected, name)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _convert_mapping(value, expected, name)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is Literal:
        if value in arguments:
            return value
    elif value is None if expected is type(None) else type(value) is expected:
        return value
    near = [v for v in arguments if v in nearest(str(value), map(str, arguments), limit=1)]
    hint = f" Nearest: {near[0]!r}." if near else ""
    raise ValueError(_wrong(name, value, describe(expected)) + hint)


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts that JSON can hold; the inverse of `parse`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(values: Mapping[str, Any], name: str = "config") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        result |= flat(value, f"{name}.{key}") if inner else {f"{name}.{key}": value}  # type: ignore
    return result


def key_names(cls: Any, name: str) -> list[str]:
    """The dotted keys of a config dataclass and of those within it."""
    names = []
    for key, hint in typing.get_type_hints(cls).items():
        names.append(f"{name}.{key}")
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                names += key_names(inner, f"{name}.{key}")
    return names


def unknown_key(name: str, value: Any, names: list[str]) -> str:
    """The message for a key that is not there: misspelt, or in the wrong place."""
    elsewhere = [known for known in names if known.endswith("." + name.rpartition(".")[2])]
    near = elsewhere or nearest(name, names, limit=1) or names
    return f"{name} = {value!r}: there is no such key. Nearest: {', '.join(near) or 'none'}."


def describe(expected: Any) -> str:
    """A type annotation in words: `an int or None`."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin is tuple:
        inner = [describe(a) for a in arguments if a is not Ellipsis]
        return f"a tuple of {inner[0] if Ellipsis in arguments else ', '.join(inner)}"
    if isinstance(origin, type):
        return f"a mapping from {' to '.join(describe(argument) for argument in arguments)}"
    if dataclasses.is_dataclass(expected):
        return f"the keys of a {expected.__name__}"  # type: ignore[union-attr]
    plain = getattr(expected, "__name__", str(expected))
    return {"NoneType": "None", "int": "an int"}.get(plain, f"a {plain}")


def _convert_union(value: Any, expected: Any, name: str) -> Any:
    """The first alternative that fits; the error is that of the one whose keys fit best."""
    errors: dict[Any, ValueError] = {}
    for alternative in typing.get_args(expected):
        try:
            return convert(value, alternative, name)
        except ValueError as error:
            errors[alternative] = error
    classes = [a for a in errors if dataclasses.is_dataclass(a)]
    if isinstance(value, Mapping) and classes:
        raise errors[max(classes, key=lambda cls: _fitting_keys(value, cls))]
    raise ValueError(_wrong(name, value, describe(expected)))


def _convert_tuple(value: Any, expected: Any, name: str) -> tuple[Any, ...]:
    arguments = typing.get_args(expected)
    if isinstance(value, Mapping):  # pairs, such as a pattern with its rank
        value = tuple(value.items())
    if not isinstance(value, list | tuple):
        raise ValueError(_wrong(name, value, describe(expected)))
    items = (arguments[0],) * len(value) if Ellipsis in arguments else arguments
    if len(items) != len(value):
        raise ValueError(_wrong(name, value, describe(expected)))
    return tuple(convert(v, item, f"{name}[{i}]") for i, (v, item) in enumerate(zip(value, items)))


def _convert_mapping(value: Any, expected: Any, name: str) -> dict[Any, Any]:
    key_type, value_type = typing.get_args(expected)
    if isinstance(value, list | tuple) and all(isinstance(v, list | tuple) for v in value):
        value = dict(value)  # a ConfigDict's keys hold no dots, so patterns come as pairs
    if not isinstance(value, Mapping):
        raise ValueError(_wrong(name, value, describe(expected)))
    return {
        convert(k, key_type, name): convert(v, value_type, f"{name}.{k}") for k, v in value.items()
    }


def _fitting_keys(value: Mapping[str, Any], cls: Any) -> int:
    """How many keys a dataclass has and takes the value of."""
    hints, count = typing.get_type_hints(cls), 0
    for key in set(value) & set(hints):
        with contextlib.suppress(ValueError):
            convert(value[key], hints[key], key)
            count += 1
    return count


def _plain(value: Any) -> Any:
    """A ConfigDict as the dict it holds."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def _wrong(name: str, value: Any, expected: str) -> str:
    return f"{name} = {value!r} ({type(value).__name__}): expected {expected}."
