"""Random weights, made where they are used: nothing of a model passes through the host's memory.

Quantised kernels get random codes, with absmax as a normal kernel's is: what a step costs depends
on its shapes, and quantising eight billion weights on the host takes minutes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft import trees
from lorax_ft.leaves import is_leaf

PyTree = Any
DEVIATION = 0.02
ABSMAX = 2.6 * DEVIATION  # of 64 normal numbers, about
CONSTANTS = {"offset": ABSMAX, "nested_absmax": 0.3 * ABSMAX}  # of double quantisation


def random_params(shapes: PyTree, key: jax.Array) -> PyTree:
    """Params of these shapes on the default device, the largest array first.

    Scales of norms are one, all else is normal; of leaves in few bits codes are uniform.
    """
    flat = trees.flatten(shapes)
    by_size = sorted(flat, key=lambda path: -trees.count({path: flat[path]}).bytes)
    made = {
        path: _random(path, flat[path], jax.random.fold_in(key, n))
        for n, path in enumerate(by_size)
    }
    return trees.map_with_path(lambda path, _: made[path], shapes)


def peak_bytes() -> int:
    """The most that the process has held of its device; 0 where nobody counts, as for CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _random(path: str, value: Any, key: jax.Array) -> Any:
    if not is_leaf(value):
        return _ones(value) if path.endswith("scale") else _array(value, key)
    fields = {
        field.name: shape
        for field in dataclasses.fields(value)
        if isinstance(shape := getattr(value, field.name), jax.ShapeDtypeStruct)
    }
    return value.replace(
        **{
            name: jnp.full(shape.shape, CONSTANTS[name], shape.dtype)
            if name in CONSTANTS
            else _array(shape, jax.random.fold_in(key, number))
            for number, (name, shape) in enumerate(fields.items())
        }
    )


def _ones(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.ones(shape.shape, shape.dtype)


def _array(shape: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    made = _filled(shape.shape, shape.dtype, key)
    return jax.block_until_ready(made)  # so that what it takes is free again before the next


@functools.partial(jax.jit, static_argnums=(0, 1))
def _filled(shape: tuple[int, ...], dtype: Any, key: jax.Array) -> jax.Array:
    if dtype == jnp.uint8:
        return jax.random.bits(key, shape, jnp.uint8)
    return DEVIATION * jax.random.normal(key, shape, dtype)
