"""Parameter trees: the names of their parameters, matching by pattern, trainable and frozen halves,
counts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lorax_ft.leaves import Leaf, is_leaf

PyTree = Any
Patterns = str | Iterable[str]


def path_name(key_path: tuple[Any, ...]) -> str:
    """A JAX key path as a name: `"layers/attention/query/kernel"`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(params: PyTree) -> dict[str, Any]:
    """Every parameter by its path, a leaf being one parameter; holes (`None`) are left out."""
    return {
        path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
    }


def flatten_arrays(params: PyTree) -> dict[str, jax.Array]:
    """Every array by its path, also those inside leaves: `".../kernel/a"`."""
    return {path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(params)}


def map_with_path(function: Callable[[str, Any], Any], params: PyTree) -> PyTree:
    """The tree with `function(path, parameter)` in place of each parameter, a leaf being one
    parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: function(path_name(path), value), params, is_leaf=is_leaf
    )


def matches(path: str, patterns: Patterns) -> bool:
    """Whether any regular expression matches the whole path."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def select(paths: Iterable[str], patterns: Patterns, *, field: str) -> list[str]:
    """The paths that some pattern matches whole, in their order.

    Raises ValueError where a pattern matches nothing, naming `field` and the nearest paths; also
    for a pattern that is no regular expression.
    """
    paths = list(paths)
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else tuple(patterns):
        try:
            found = [path for path in paths if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is no regular expression ({error}).") from None
        if not found:
            raise ValueError(_nothing_matched(pattern, paths, field))
        chosen.update(found)
    return [path for path in paths if path in chosen]


def partition(params: PyTree, trainable: Patterns = ()) -> tuple[PyTree, PyTree]:
    """Splits params into a trainable and a frozen tree of the same structure, `None` where the
    other has the array.

    Trainable are the fields that leaves declare so, and the plain arrays whose path some pattern of
    `trainable` matches. `jax.grad` and optax see the first tree alone. Raises ValueError where
    nothing is trainable, where a pattern matches nothing, and where one matches a parameter that
    cannot be trained: a leaf (its own fields decide) or an array that is not floating-point.
    """
    parameters = flatten(params)
    plain = set(select(parameters, trainable, field="trainable"))
    for path in plain:
        _check_trainable(path, parameters[path])
    halves = {path: _split(value, path in plain) for path, value in parameters.items()}
    train = map_with_path(lambda path, _: halves[path][0], params)
    frozen = map_with_path(lambda path, _: halves[path][1], params)
    if not jax.tree.leaves(train):
        raise ValueError(
            "partition: nothing is trainable. Add a method (such as LoRA) to the parameters, or "
            "name the arrays to train with `trainable`, such as '.*' for full fine-tuning."
        )
    return train, frozen


def combine(train: PyTree, frozen: PyTree) -> PyTree:
    """Puts the two halves of `partition` together again."""
    return jax.tree.map(
        lambda t, f: f if t is None else t, train, frozen, is_leaf=lambda x: x is None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """How many parameters a tree has and what they weigh."""

    trainable: int
    total: int  # a 4-bit kernel counts its weights, adapters count too
    bytes: int  # of all arrays as stored

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of all."""
        return self.trainable / self.total


def count(params: PyTree, trainable: Patterns = ()) -> Counts:
    """Counts parameters of arrays or of `ShapeDtypeStruct`s; nothing need be trainable."""
    parameters = flatten(params)
    plain = set(select(parameters, trainable, field="trainable"))
    rows = [parameter_counts(value, path in plain) for path, value in parameters.items()]
    return Counts(
        trainable=sum(r[0] for r in rows),
        total=sum(r[1] for r in rows),
        bytes=sum(array_bytes(x) for x in jax.tree.leaves(params)),
    )


def parameter_counts(value: Any, trained: bool = False) -> tuple[int, int]:
    """(trainable, total) numbers of one array or leaf."""
    if isinstance(value, Leaf):
        trainable = value.trainable_count()
        return trainable, value.size + trainable
    size = math.prod(value.shape)
    return (size if trained else 0), size


def array_bytes(array: Any) -> int:
    """Bytes of an array or `ShapeDtypeStruct`; a PRNG key counts its key data."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return math.prod(array.shape) * 8
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def summary(params: PyTree, trainable: Patterns = ()) -> str:
    """A table of every parameter: path, shape, dtype, kind, trainable count, bytes; totals
    below."""
    plain = set(select(flatten(params), trainable, field="trainable"))
    rows = [("parameter", "shape", "dtype", "kind", "trainable", "bytes")]
    for path, value in flatten(params).items():
        arrays = jax.tree.leaves(value)
        rows.append(
            (
                path,
                str(list(value.shape)).replace(" ", ""),
                str(value.dtype),
                kind(value),
                f"{parameter_counts(value, path in plain)[0]:,}",
                f"{sum(array_bytes(a) for a in arrays):,}",
            )
        )
    counts = count(params, trainable)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(_pad(c, w, i) for i, (c, w) in enumerate(zip(row, widths))) for row in rows]
    lines.append(
        f"trainable {counts.trainable:,} of {counts.total:,} ({counts.share:.2%}), "
        f"{counts.bytes:,} bytes"
    )
    return "\n".join(lines)


def kind(value: Any) -> str:
    """What a parameter is made of, outermost first: `array`, `NF4`, `LoRA(NF4)`."""
    if not isinstance(value, Leaf):
        return "array"
    base = getattr(value, "base", None)
    return type(value).__name__ + (f"({kind(base)})" if is_leaf(base) else "")


def nearest(name: str, names: Iterable[str], limit: int = 5) -> list[str]:
    """The names most like `name`, best first, for an error message."""
    return difflib.get_close_matches(name, list(names), n=limit, cutoff=0.3)


def with_fields(params: PyTree, fields: Mapping[str, Any]) -> PyTree:
    """Params with whole parameters replaced by path. Raises ValueError for a path that is not
    there."""
    missing = set(fields) - set(flatten(params))
    if missing:
        raise ValueError(f"No parameter named {sorted(missing)}.")
    return map_with_path(lambda path, value: fields.get(path, value), params)


def _split(value: Any, trained: bool) -> tuple[Any, Any]:
    """(trainable, frozen) halves of one parameter."""
    if not isinstance(value, Leaf):
        return (value, None) if trained else (None, value)
    train, frozen = {}, {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        if field.metadata.get("static"):
            continue
        content = getattr(value, field.name)
        if is_leaf(content):
            train[field.name], frozen[field.name] = _split(content, False)
        elif field.name in value.trainable:
            train[field.name], frozen[field.name] = content, None
        else:
            train[field.name], frozen[field.name] = None, content
    return value.replace(**train), value.replace(**frozen)


def _check_trainable(path: str, value: Any) -> None:
    if isinstance(value, Leaf):
        raise ValueError(
            f"trainable: {path} is a {kind(value)} leaf, whose own fields decide what is "
            "trained. Leave it out of `trainable`, or out of quantisation and of the method's "
            "targets."
        )
    if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
        raise ValueError(
            f"trainable: {path} has dtype {value.dtype}; only floating-point arrays can be trained."
        )


def _nothing_matched(pattern: str, paths: list[str], field: str) -> str:
    words = re.sub(r"\.\*|[\\^$()|?+\[\]]", " ", pattern).replace(" ", "")
    near = nearest(words, paths) or paths[:5]
    return (
        f"{field}: {pattern!r} matches none of the {len(paths)} parameters. A pattern is "
        f"a regular expression over the whole '/'-joined path. Nearest: "
        f"{', '.join(near) or '(the tree is empty)'}."
    )


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column >= 4 else cell.ljust(width)
