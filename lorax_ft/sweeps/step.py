"""The step of many members in one program: that of one run, mapped over them, the base shared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lorax_ft import trees
from lorax_ft.axes import MEMBER
from lorax_ft.sweeps.devices import spread
from lorax_ft.sweeps.members import Stack, pad, unpad
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
    sizes: Sequence[Stack] | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., tuple[PyTree, PyTree, dict[str, Array]]]:
    """A jitted `step(train, opt_state, own, shared, keys, sizes, counts, batch)` of K members.

    All but `shared` have an axis of K in front: `train`, `opt_state` and `own` those of a `Stack`,
    `keys` [K, ...] the raw data of the members' PRNG keys, `sizes` [K] which of `sizes` each
    member has, `counts` [K] how many steps each has made, `batch` {name: [K, batch, ...]}. Returns
    (train, opt_state, metrics), each metric [K] as `training.step.train_step` has it. `train` and
    `opt_state` are donated. On a `mesh` of members each device computes its own.

    Without `sizes` members are computed side by side, all as large as the largest. Otherwise they
    are computed in turn, and a member is cut to the shapes of its size for its step: what pads it
    behind those is zero, and stays so. Nothing of a member depends on the others. One whose batch
    has weight zero stays as it is, which is how a slot waits; it costs nothing in turn.
    """
    one = single.train_step(apply, objective, tx, accumulation=accumulation)
    of_sizes = tuple(sizes or ())

    @jax.jit  # so that it is traced once for each size, whoever asks for its shapes
    def step(shared, stack, key, count, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), count)
        params = trees.combine(stack.own, shared)
        return one(stack.train, stack.opt_state, params, batch, key)

    def sized(size, shared, stack, *rest):
        train, opt_state, metrics = step(shared, unpad(stack, size), *rest)
        return *pad((train, opt_state), (stack.train, stack.opt_state)), metrics

    def skip(shared, stack, *rest):
        """The member as it is, and metrics that nobody reads."""
        _, _, metrics = jax.eval_shape(functools.partial(sized, of_sizes[0]), shared, stack, *rest)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
        return stack.train, stack.opt_state, zeros

    def in_turn(shared, member):
        stack, key, size, count, batch = member
        has_weight = jnp.any(batch["weights"] > 0)
        branches = [skip, *(functools.partial(sized, s) for s in of_sizes)]
        index = jnp.where(has_weight, 1 + size, 0)
        return jax.lax.switch(index, branches, shared, stack, key, count, batch)

    def side_by_side(shared, member):
        stack, key, _, count, batch = member
        return step(shared, stack, key, count, batch)

    each = _each(side_by_side if sizes is None else in_turn, vectorized=sizes is None)

    def steps(train, opt_state, own, shared, keys, sizes, counts, batch):
        return each(shared, (Stack(train, opt_state, own), keys, sizes, counts, batch))

    return spread(steps, mesh, common=(3,), donate=(0, 1))


def make_eval_steps(
    apply: single.Apply,
    objective: Objective,
    *,
    vectorized: bool = True,
    mesh: Mesh | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Jitted evaluation steps of all K members, and of the one in a slot.

    `every(train, own, shared, asked, batch)` gives (loss sums [K], weight sums [K], extras {name:
    [K, ...]}) on one batch for all; in turn it passes over those that are not `asked` for, a bool
    [K]. `one(train, own, shared, index, batch)` gives the same of a single slot, without the axis.
    """
    step = single.eval_step(apply, objective)

    def member(common, halves):
        shared, batch = common
        train, own = halves
        return step(train, trees.combine(own, shared), batch)

    def if_asked(common, asked_halves):
        asked, halves = asked_halves
        found = jax.eval_shape(member, common, halves)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
        return jax.lax.cond(asked, member, lambda *_: zeros, common, halves)

    def whoever(common, asked_halves):
        return member(common, asked_halves[1])

    each = _each(whoever if vectorized else if_asked, vectorized)

    def every(train, own, shared, asked, batch):
        return each((shared, batch), (asked, (train, own)))

    def one(train, own, shared, index, batch):
        return member((shared, batch), jax.tree.map(lambda x: x[index], (train, own)))

    return spread(every, mesh, common=(2, 4)), jax.jit(one)


def _each(function: Callable[[PyTree, PyTree], PyTree], vectorized: bool) -> Callable[..., PyTree]:
    """`(shared, members) -> results` of `function(shared, member)` for every member of a stack.

    Vectorized they are computed side by side, which fills a device that one of them leaves idle.
    Otherwise one after another in the same program: on a processor that one fills already this is
    faster, since what a member works on stays in its caches.
    """
    if vectorized:
        return jax.vmap(function, in_axes=(None, 0), axis_name=MEMBER)
    return lambda shared, members: jax.lax.map(lambda member: function(shared, member), members)
