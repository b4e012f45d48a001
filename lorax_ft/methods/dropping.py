"""Dropout of what goes into an adapter: keys live in the leaves, and come and go with training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft import trees
from lorax_ft.leaves import Array, Leaf
from lorax_ft.methods.targets import key_of


def set_dropout_key(params: Any, key: jax.Array | None) -> Any:
    """Params whose adapters drop by `key`, each by its own fold of it; with None nothing is
    dropped."""

    def set_key(path: tuple[Any, ...], value: Any) -> Any:
        if not _drops(value) or value.dropout is None:
            return value
        if key is None:
            return value.replace(key=None)
        return value.replace(
            key=jax.random.split(key_of(key, trees.path_name(path)), value.stack_shape)
        )

    return jax.tree_util.tree_map_with_path(set_key, params, is_leaf=_drops)


def drop(key: Array | None, rate: Array | None, x: Array) -> Array:
    """Inverted dropout: zeroes a share `rate` of x and scales up the rest; x itself where there is
    no key."""
    if key is None or rate is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), jnp.zeros((), x.dtype))


def _drops(value: Any) -> bool:
    return isinstance(value, Leaf) and hasattr(value, "dropout")
