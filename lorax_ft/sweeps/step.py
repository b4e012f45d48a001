"""The step of many members at once: that of one run under `vmap`, the base shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from lorax_ft import trees
from lorax_ft.training import step as single
from lorax_ft.training.objectives import Objective

Array = jax.Array
PyTree = Any


def make_train_step(
    apply: single.Apply,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    accumulation: int = 1,
) -> Callable[..., tuple[PyTree, PyTree, dict[str, Array]]]:
    """A jitted `step(train, opt_state, own, shared, keys, counts, batch)` of K members.

    All but `shared` have an axis of K in front: `train`, `opt_state` and `own` those of a `Stack`,
    `keys` [K, ...] the raw data of the members' PRNG keys, `counts` [K] how many steps each has
    made, `batch` {name: [K, batch, ...]}. Returns (train, opt_state, metrics), each metric [K] as
    `training.step.train_step` has it. `train` and `opt_state` are donated.

    Nothing of a member depends on the others. One whose batch has weight zero stays as it is, which
    is how a slot waits.
    """
    one = single.train_step(apply, objective, tx, accumulation=accumulation)

    def step(train, opt_state, own, shared, key, count, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        return one(train, opt_state, trees.combine(own, shared), batch, key)

    return jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, 0, 0, 0)), donate_argnums=(0, 1))


def make_eval_steps(
    apply: single.Apply, objective: Objective
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Jitted evaluation steps of all K members, and of the one in a slot.

    `every(train, own, shared, batch)` gives (loss sums [K], weight sums [K], extras {name: [K,
    ...]}) on one batch for all; `one(train, own, shared, index, batch)` the same of a single slot,
    without the axis.
    """
    step = single.eval_step(apply, objective)

    def member(train, own, shared, batch):
        return step(train, trees.combine(own, shared), batch)

    def one(train, own, shared, index, batch):
        train, own = jax.tree.map(lambda x: x[index], (train, own))
        return member(train, own, shared, batch)

    return jax.jit(jax.vmap(member, in_axes=(0, 0, None, None))), jax.jit(one)
