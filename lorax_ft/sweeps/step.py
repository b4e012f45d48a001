"""The step of many members in one program: that of one run, mapped over them, the base shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
    vectorized: bool = True,
) -> Callable[..., tuple[PyTree, PyTree, dict[str, Array]]]:
    """A jitted `step(train, opt_state, own, shared, keys, counts, batch)` of K members.

    All but `shared` have an axis of K in front: `train`, `opt_state` and `own` those of a `Stack`,
    `keys` [K, ...] the raw data of the members' PRNG keys, `counts` [K] how many steps each has
    made, `batch` {name: [K, batch, ...]}. Returns (train, opt_state, metrics), each metric [K] as
    `training.step.train_step` has it. `train` and `opt_state` are donated.

    Nothing of a member depends on the others. One whose batch has weight zero stays as it is, which
    is how a slot waits; it costs nothing where members are not `vectorized` (see `_each`).
    """
    one = single.train_step(apply, objective, tx, accumulation=accumulation)

    @jax.jit  # so that it is traced once, whoever asks for its shapes
    def step(shared, member):
        train, opt_state, own, key, count, batch = member
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        return one(train, opt_state, trees.combine(own, shared), batch, key)

    def skip(shared, member):
        """The member as it is, and metrics that nobody reads."""
        train, opt_state, *_ = member
        _, _, metrics = jax.eval_shape(step, shared, member)
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in metrics.items()}
        return train, opt_state, zeros

    def step_or_skip(shared, member):
        has_weight = jnp.any(member[-1]["weights"] > 0)
        return jax.lax.cond(has_weight, step, skip, shared, member)

    each = _each(step if vectorized else step_or_skip, vectorized)

    def steps(train, opt_state, own, shared, keys, counts, batch):
        return each(shared, (train, opt_state, own, keys, counts, batch))

    return jax.jit(steps, donate_argnums=(0, 1))


def make_eval_steps(
    apply: single.Apply, objective: Objective, *, vectorized: bool = True
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Jitted evaluation steps of all K members, and of the one in a slot.

    `every(train, own, shared, batch)` gives (loss sums [K], weight sums [K], extras {name: [K,
    ...]}) on one batch for all; `one(train, own, shared, index, batch)` the same of a single slot,
    without the axis.
    """
    step = single.eval_step(apply, objective)

    def member(common, halves):
        shared, batch = common
        train, own = halves
        return step(train, trees.combine(own, shared), batch)

    each = _each(member, vectorized)

    def every(train, own, shared, batch):
        return each((shared, batch), (train, own))

    def one(train, own, shared, index, batch):
        return member((shared, batch), jax.tree.map(lambda x: x[index], (train, own)))

    return jax.jit(every), jax.jit(one)


def _each(function: Callable[[PyTree, PyTree], PyTree], vectorized: bool) -> Callable[..., PyTree]:
    """`(shared, members) -> results` of `function(shared, member)` for every member of a stack.

    Vectorized they are computed side by side, which fills a device that one of them leaves idle.
    Otherwise one after another in the same program: on a processor that one fills already this is
    faster, since what a member works on stays in its caches.
    """
    if vectorized:
        return jax.vmap(function, in_axes=(None, 0))
    return lambda shared, members: jax.lax.map(lambda member: function(shared, member), members)
