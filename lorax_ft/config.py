"""Configs: a ConfigDict or JSON object is parsed once, here, into frozen dataclasses.

Every part of the library owns its config dataclass, with the defaults and the checks of its values;
this file puts them together and says what is wrong with a key by its full name.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from lorax_ft.trees import nearest

T = TypeVar("T")


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
    alternatives = typing.get_args(expected)
    errors: dict[Any, ValueError] = {}
    for alternative in alternatives:
        try:
            return convert(value, alternative, name)
        except ValueError as error:
            errors[alternative] = error
    classes = [a for a in alternatives if dataclasses.is_dataclass(a)]
    if isinstance(value, Mapping) and classes:
        raise errors[max(classes, key=lambda cls: _shared_keys(value, cls))]
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


def _shared_keys(value: Mapping[str, Any], cls: Any) -> int:
    return len(set(value) & {field.name for field in dataclasses.fields(cls)})


def _plain(value: Any) -> Any:
    """A ConfigDict as the dict it holds."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def _wrong(name: str, value: Any, expected: str) -> str:
    return f"{name} = {value!r} ({type(value).__name__}): expected {expected}."
