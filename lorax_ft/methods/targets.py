"""Which parameters a method works on: by regular expression, by module names, or all linear
layers."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from lorax_ft import trees
from lorax_ft.inspection import Use
from lorax_ft.leaves import Leaf

ALL_LINEAR = "all-linear"
Uses = Mapping[str, Use] | None
Targets = str | tuple[str, ...]


def find(params: Any, targets: Targets, exclude: Targets, uses: Uses, *, field: str) -> list[str]:
    """Paths of the kernels and embeddings that `targets` names and `exclude` does not.

    `"all-linear"` means every kernel that the model multiplies with, except its head, and needs
    `uses` from `inspect`. Any other string is a regular expression over the whole path. A tuple
    holds module names: `"query"` means every `.../query/kernel`. Raises ValueError where nothing is
    left.
    """
    candidates = [path for path, value in trees.flatten(params).items() if len(value.shape) >= 2]
    if targets == ALL_LINEAR:
        chosen = _all_linear(candidates, uses, field)
    else:
        chosen = named(candidates, targets, field=field)
    if exclude:
        dropped = set(named(candidates, exclude, field=f"{field} (exclude)"))
        chosen = [path for path in chosen if path not in dropped]
    if not chosen:
        raise ValueError(
            f"{field}: {targets!r} without {exclude!r} leaves no parameter to work on."
        )
    return chosen


def named(paths: Sequence[str], targets: Targets, *, field: str) -> list[str]:
    """Paths that a regular expression matches, or whose module has one of the names in a tuple."""
    if isinstance(targets, str):
        return trees.select(paths, targets, field=field)
    patterns = [rf"(.*/)?{re.escape(name)}(/(kernel|embedding|weight))?" for name in targets]
    _check_names(paths, targets, patterns, field)
    return trees.select(paths, patterns, field=field)


def modules(paths: Iterable[str], names: Sequence[str], *, field: str) -> list[str]:
    """Every parameter inside a module of one of these names: `"classifier"` means its kernel and
    bias."""
    paths = list(paths)
    patterns = [rf"(.*/)?{re.escape(name)}(/.*)?" for name in names]
    _check_names(paths, names, patterns, field)
    return trees.select(paths, patterns, field=field) if patterns else []


def bias_of(kernel: str, paths: Iterable[str], uses: Uses) -> str | None:
    """The bias that the model adds to the product of a kernel; without `uses`, its neighbour."""
    if uses is None:
        neighbour = f"{kernel.rpartition('/')[0]}/bias".lstrip("/")
        return neighbour if neighbour in set(paths) else None
    return next((path for path, use in uses.items() if use.kernel == kernel), None)


def norms(params: Any, targets: Targets, uses: Uses, *, field: str) -> list[str]:
    """Paths of the scales and biases of the norms whose paths the targets match."""
    parameters = trees.flatten(params)
    if uses is None:
        scales = [path for path in parameters if path.rpartition("/")[2] == "scale"]
    else:
        scales = [path for path in parameters if path in uses and uses[path].kind == "scale"]
    owners = {path.rpartition("/")[0] for path in scales}
    biases = [
        path
        for path in parameters
        if path.rpartition("/")[2] == "bias" and path.rpartition("/")[0] in owners
    ]
    if not scales:
        raise ValueError(f"{field}: the model has no norm with a scale.")
    found = set(named([*scales, *biases], targets, field=field))
    return [path for path in parameters if path in found]


def input_axes(path: str, value: Any, uses: Uses) -> tuple[int, ...]:
    """The axes of a kernel that a product contracts, counted from the end."""
    if isinstance(value, Leaf):
        return value.in_axes
    return uses[path].in_axes or (-2,) if uses and path in uses else (-2,)


def stack_depth(path: str, value: Any, uses: Uses) -> int:
    """How many leading axes of a kernel or embedding are stacked layers or experts."""
    if isinstance(value, Leaf):
        return len(value.stack_shape)
    if uses and path in uses and uses[path].kind in ("kernel", "embedding"):
        return uses[path].stack
    return len(value.shape) - 2


@dataclasses.dataclass(frozen=True)
class MatrixShape:
    """A kernel seen as matrices `[*stack, in_size, out_size]`."""

    stack: tuple[int, ...]
    in_axes: tuple[int, ...]
    in_size: int
    out_size: int


def matrix_shape(path: str, value: Any, uses: Uses) -> MatrixShape:
    """The sizes of a kernel or embedding, by the way that the model uses it."""
    depth, in_axes = stack_depth(path, value, uses), input_axes(path, value, uses)
    stack, core = tuple(value.shape[:depth]), tuple(value.shape[depth:])
    in_size = math.prod(core[axis] for axis in in_axes)
    return MatrixShape(stack, in_axes, in_size, math.prod(core) // in_size)


def key_of(key: jax.Array, path: str) -> jax.Array:
    """A parameter's own key: it depends on its path, not on the order of visits."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def layer_path(path: str, index: Sequence[int]) -> str:
    """The name one layer of a stack has: `layers/mlp/up/kernel`, (3,) to
    `layers_3/mlp/up/kernel`."""
    number = "_".join(map(str, index))
    if not number:
        return path
    head, separator, rest = re.sub(r"(^|/)layers(/)", r"\1layers@\2", path, count=1).partition("@")
    return f"{head}_{number}{rest}" if separator else f"{path}_{number}"


def layer_number(path: str) -> int | None:
    """The layer that a per-layer path belongs to: 3 for `layers_3/...` or `blocks/3/...`."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def stack_name(path: str) -> str:
    """What stands before the layer in a per-layer path: "encoder" for `encoder/layers_3/...`."""
    found = _LAYER.search(path)
    return path[: found.start()] if found else ""


_LAYER = re.compile(r"(?:^|/)[A-Za-z]+[_/](\d+)(?:/|$)")


def pattern_value(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The entry whose key, a regular expression, matches the end of the module's path; else
    `default`."""
    module = path.rsplit("/", 1)[0]
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*/)?({key})", module) or re.fullmatch(key, path):
            return value
    return default


def _all_linear(candidates: list[str], uses: Uses, field: str) -> list[str]:
    if uses is None:
        raise ValueError(
            f"{field}: 'all-linear' needs to know how the model uses its parameters. Pass "
            "uses=inspect(apply, params, *inputs), or name the targets."
        )
    chosen = [
        p for p in candidates if p in uses and uses[p].kind == "kernel" and not uses[p].is_head
    ]
    if not chosen:
        raise ValueError(f"{field}: the model multiplies with none of its parameters but its head.")
    return chosen


def _check_names(
    paths: Sequence[str], names: Sequence[str], patterns: list[str], field: str
) -> None:
    for name, pattern in zip(names, patterns):
        if not any(re.fullmatch(pattern, path) for path in paths):
            known = sorted({part for path in paths for part in path.split("/")[:-1]})
            near = trees.nearest(name, known) or known
            raise ValueError(
                f"{field}: no module is named {name!r}. Nearest: {', '.join(near[:8])}."
            )
