"""AdaLoRA within an optimizer: its regulariser in the gradients, its budget after the updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_ft.methods.adalora import (
    AdaLoraConfig,
    Allocation,
    allocate,
    budget_schedule,
    orthogonality,
    start_allocation,
)
from lorax_ft.training.paging import PagedOptimizer


class AllocationState(NamedTuple):
    """What `allocate_budget` remembers."""

    inner: Any  # the optimizer's own state
    allocation: Allocation
    count: jax.Array  # updates made so far


def allocate_budget(
    tx: optax.GradientTransformation, config: AdaLoraConfig, total_steps: int
) -> optax.GradientTransformation:
    """`tx` for parameters with AdaLoRA leaves, in a run of `total_steps` updates.

    Before an update the gradient of `orthogonality_weight * orthogonality(params)` is added, so the
    loss that is reported is without it. After it the scores are brought up to date, and where an
    allocation is due the singular values that lose their place are set to zero. Updates count from
    1: the last allocation of a run without `final_steps` is that after its last update. Raises
    ValueError where `tx` is paged and where `total_steps` leave the budget no step to fall in;
    `init` where there is no AdaLoRA leaf; `update` where it is not given the parameters.
    """
    if isinstance(tx, PagedOptimizer):
        raise ValueError(
            "AdaLoRA looks at all of an update to deal its budget out, and a paged optimizer makes "
            "it page by page. Set optimizer.paged=False."
        )
    budget_schedule(
        config, config.rank, total_steps
    )  # raises now what would else at the first step

    def init(params: Any) -> AllocationState:
        return AllocationState(tx.init(params), start_allocation(params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ValueError("allocate_budget: update needs the parameters; pass params.")
        pull = jax.grad(orthogonality)(params)
        gradients = jax.tree.map(
            lambda g, p: g + (config.orthogonality_weight * p).astype(g.dtype), updates, pull
        )
        updates, inner = tx.update(gradients, state.inner, params)
        moved = optax.apply_updates(params, updates)
        count = state.count + 1
        kept, allocation = allocate(moved, gradients, state.allocation, count, config, total_steps)
        # a value that was set to zero gets the update -p, for p - p is exactly zero
        updates = jax.tree.map(
            lambda u, k, m, p: jnp.where(k == m, u, (-p).astype(u.dtype)),
            updates,
            kept,
            moved,
            params,
        )
        return updates, AllocationState(inner, allocation, count)

    return optax.GradientTransformation(init, update)
