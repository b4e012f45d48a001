"""Whether several adapters belong together: LoRA on the same parameters of the same base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorax_ft import trees
from lorax_ft.jaxprs import is_concrete
from lorax_ft.methods.lora_leaf import LoRA


def check_agreement(adapters: Mapping[str, Any], *, field: str) -> tuple[list[str], list[str]]:
    """Paths of the LoRA leaves that all adapters have, and of plain arrays in which they differ.

    `adapters` are whole params by name. Bases that are the same arrays are not read; others are
    compared number by number. Raises ValueError naming the parameter where one adapter has a LoRA
    leaf and another does not, where bases differ, where a parameter has another shape, dtype or
    kind of leaf, and where there is no adapter or no LoRA leaf at all.
    """
    if not adapters:
        raise ValueError(f"{field}: there is no adapter; expected at least one params tree.")
    first, *others = adapters
    reference = trees.flatten(adapters[first])
    different: dict[str, None] = {}
    for name in others:
        parameters = trees.flatten(adapters[name])
        _check_paths(first, reference, name, parameters, field)
        for path, value in reference.items():
            if not _agrees(path, first, value, name, parameters[path], field):
                different[path] = None
    targets = [path for path, value in reference.items() if isinstance(value, LoRA)]
    held = [p for p, v in reference.items() if trees.parameter_counts(v)[0] and p not in targets]
    if held:
        raise ValueError(
            f"{field}: {held[0]} is a {trees.kind(reference[held[0]])} leaf; only LoRA leaves can "
            "be put together."
        )
    if not targets:
        raise ValueError(f"{field}: {first!r} holds no LoRA leaf.")
    return targets, list(different)


def _check_paths(
    first: str, reference: Mapping[str, Any], name: str, found: Mapping[str, Any], field: str
) -> None:
    for one, other, path in (
        *((first, name, path) for path in reference if path not in found),
        *((name, first, path) for path in found if path not in reference),
    ):
        raise ValueError(f"{field}: {one!r} has a parameter {path} and {other!r} has none.")


def _agrees(path: str, first: str, value: Any, name: str, other: Any, field: str) -> bool:
    """Whether two adapters' versions of a parameter are equal but for their factors; False where
    they are plain arrays that differ in their numbers alone."""
    where = f"{field}: {path} in {first!r} and in {name!r}"
    if trees.kind(value) != trees.kind(other):
        raise ValueError(
            f"{where} is {trees.kind(value)} and {trees.kind(other)}: the adapters have different "
            "targets or different bases."
        )
    if value.shape != other.shape or value.dtype != other.dtype:
        raise ValueError(
            f"{where} is {value.dtype} {list(value.shape)} and {other.dtype} {list(other.shape)}."
        )
    if not isinstance(value, LoRA):
        equal = _equal(value, other)
        if not equal and trees.kind(value) != "array":
            raise ValueError(f"{where} is quantised differently: the adapters' bases differ.")
        return equal
    if value.in_axes != other.in_axes or (value.a.dtype, value.b.dtype) != (
        other.a.dtype,
        other.b.dtype,
    ):
        raise ValueError(
            f"{where} has factors for inputs {value.in_axes} in {value.a.dtype} and for "
            f"{other.in_axes} in {other.a.dtype}."
        )
    if not _equal(value.base, other.base):
        raise ValueError(
            f"{where} has two different bases. Adapters go together on one base only; starts such "
            "as PiSSA, OLoRA and LoftQ change it."
        )
    return True


def _equal(value: Any, other: Any) -> bool:
    """Whether two arrays or leaves are the same: by identity where they share their arrays, else by
    their numbers, which traced arrays do not have."""
    if value is other:
        return True
    arrays, tree = jax.tree.flatten(value)
    others, other_tree = jax.tree.flatten(other)
    return tree == other_tree and all(
        a is b
        or (
            is_concrete(a)
            and is_concrete(b)
            and a.dtype == b.dtype
            and np.array_equal(np.asarray(a), np.asarray(b))
        )
        for a, b in zip(arrays, others)
    )
