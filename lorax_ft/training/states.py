"""Which arrays of an optax state belong to a parameter each, such as Adam's moments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

from lorax_ft import trees

PyTree = Any


def map_states(
    function: Callable[..., Any],
    params: PyTree,
    state: PyTree,
    *others: PyTree,
    is_leaf: Callable[[Any], bool] = lambda value: False,
) -> PyTree:
    """The state with `function(field, path, value, *values of others)` for what belongs to a
    parameter.

    optax keeps these in trees of the parameters' own structure. `field` is the name of such a tree
    in its state ("mu", "nu", "trace"), `path` that of the array among the parameters; what
    `is_leaf` says is one value of such a tree. All else, counts and numbers, stays as it is.
    `params` may have holes, and the state the same. `others` are states of the same structure.
    """
    structure = jax.tree.structure(params)
    shapes = [array.shape for array in jax.tree.leaves(params)]

    def mirrors(node: Any) -> bool:
        values, found = jax.tree.flatten(node, is_leaf=is_leaf)
        return (
            found == structure
            and bool(values)
            and all(is_leaf(v) or v.shape == shape for v, shape in zip(values, shapes))
        )

    def visit(key_path: tuple[Any, ...], node: Any, *rest: Any) -> Any:
        if not mirrors(node):
            return node
        field = trees.path_name(key_path[-1:])
        return jax.tree_util.tree_map_with_path(
            lambda path, _, *values: function(field, trees.path_name(path), *values),
            params,
            node,
            *rest,
        )

    return jax.tree_util.tree_map_with_path(visit, state, *others, is_leaf=mirrors)


def is_stacked(path: str) -> bool:
    """Whether an array's first axis is that of layers: those of scanned models lie at
    `layers/...`."""
    return re.search(r"(^|/)layers/", path) is not None
