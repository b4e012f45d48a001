"""The training step: one jitted, donated function from a batch to new parameters.

Only the trainable half of `trees.partition` is differentiated. The step is given `apply`; it knows
neither models nor methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_ft import trees
from lorax_ft.training import optimizers
from lorax_ft.training.objectives import Batch, Objective
from lorax_ft.training.paging import PagedOptimizer, lying_as, update_where

Array = jax.Array
PyTree = Any
Apply = Callable[
    [PyTree, Mapping[str, Array], Any], Array
]  # (params, inputs, key or None) -> logits

NOT_INPUTS = ("labels", "weights")  # what of a batch the objective reads and the model does not


def make_train_step(
    apply: Apply,
    objective: Objective,
    tx: optax.GradientTransformation | PagedOptimizer,
    *,
    accumulation: int = 1,
    out_shardings: tuple[PyTree, PyTree] | None = None,
) -> Callable[[PyTree, PyTree, PyTree, Batch, Array], tuple[PyTree, PyTree, dict[str, Array]]]:
    """`train_step`, jitted; `train` and `opt_state` are donated: the arrays that went in are gone.

    On a mesh, and for a paged optimizer, `out_shardings` are those of (train, opt_state), so that
    what comes out lies as what went in, and where. Raises ValueError where a paged one lacks them.
    """
    if isinstance(tx, PagedOptimizer):
        if out_shardings is None:
            raise ValueError(
                "make_train_step: a paged optimizer needs out_shardings, or its states would not "
                "go back to the host. Pass (shardings_of(train), shardings_of(opt_state))."
            )
        tx = lying_as(tx, out_shardings[0])
    step = train_step(apply, objective, tx, accumulation=accumulation)
    kept = None if out_shardings is None else (*out_shardings, None)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=kept)


def train_step(
    apply: Apply,
    objective: Objective,
    tx: optax.GradientTransformation | PagedOptimizer,
    *,
    accumulation: int = 1,
) -> Callable[[PyTree, PyTree, PyTree, Batch, Array], tuple[PyTree, PyTree, dict[str, Array]]]:
    """The pure `step(train, opt_state, frozen, batch, key) -> (train, opt_state, metrics)`.

    `apply(params, inputs, key)` is the model on whole params, lifted if they hold leaves; `inputs`
    is the batch without `labels` and `weights`, and the key is for dropout.

    With `accumulation` = k the batch is computed in k parts, one after the other, with the gradient
    of the whole: losses are summed and divided once.

    Metrics, float32 scalars: `loss` (mean over weights), `weight` (their sum), `gradient_norm`
    (before clipping), `learning_rate` (of the last update that was made, by optimizers of
    `build_optimizer`) and `finite`. Where the loss or the gradient is not finite, `finite` is 0 and
    parameters and optimizer state stay as they were; so they do where the weights sum to zero,
    which is no error.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1, got {accumulation}.")

    def step(train, opt_state, frozen, batch, key):
        loss_sum, weight, gradient = _accumulate(
            _loss_and_gradient(apply, objective, frozen), train, batch, key, accumulation
        )
        divisor = jnp.where(weight > 0, weight, 1.0)
        loss, norm = loss_sum / divisor, _norm(gradient) / divisor
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        train, opt_state = update_where(
            tx, gradient, 1.0 / divisor, opt_state, train, finite & (weight > 0)
        )
        rate = optimizers.learning_rate(opt_state)
        metrics = {"loss": loss, "weight": weight, "gradient_norm": norm}
        metrics |= {} if rate is None else {"learning_rate": rate}
        return train, opt_state, metrics | {"finite": finite.astype(jnp.float32)}

    return step


def make_eval_step(apply: Apply, objective: Objective):
    """`eval_step`, jitted."""
    return jax.jit(eval_step(apply, objective))


def eval_step(apply: Apply, objective: Objective):
    """The pure `step(train, frozen, batch) -> (loss_sum, weight_sum, extras)`, without dropout.

    Sums add up over batches; `extras` are the objective's.
    """

    def step(train, frozen, batch):
        logits = apply(trees.combine(train, frozen), inputs_of(batch), None)
        return objective(logits, batch)

    return step


def inputs_of(batch: Batch) -> dict[str, Array]:
    """What of a batch the model reads."""
    return {name: array for name, array in batch.items() if name not in NOT_INPUTS}


def split_batch(batch: Batch, parts: int) -> dict[str, Array]:
    """Each array `[batch, ...]` as `[parts, batch / parts, ...]`.

    Part i takes every `parts`-th row, from row i: that way each device of a sharded batch splits
    the rows that it already holds.
    """

    def split(name: str, array: Array) -> Array:
        rows = array.shape[0]
        if rows % parts:
            raise ValueError(
                f"A batch of {rows} rows ({name}) cannot be accumulated in {parts} equal parts. "
                "Choose a "
                f"batch size that is a multiple of {parts}."
            )
        return jnp.swapaxes(array.reshape(rows // parts, parts, *array.shape[1:]), 0, 1)

    return {name: split(name, array) for name, array in batch.items()}


def signature(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of a batch's arrays by name; each is a compilation of the step."""
    return tuple(sorted((name, tuple(array.shape)) for name, array in batch.items()))


def _loss_and_gradient(apply: Apply, objective: Objective, frozen: PyTree):
    """(train, batch, key) -> (loss sum, weight sum, gradient of the loss sum)."""

    def loss_sum(train, batch, key):
        logits = apply(trees.combine(train, frozen), inputs_of(batch), key)
        total, weight, _ = objective(logits, batch)
        return total, weight

    def run(train, batch, key):
        (total, weight), gradient = jax.value_and_grad(loss_sum, has_aux=True)(train, batch, key)
        return total, weight, gradient

    return run


def _accumulate(run, train: PyTree, batch: Batch, key: Array, parts: int):
    """`run` on the batch at once, or summed over its parts in float32."""
    if parts == 1:
        return run(train, batch, key)

    def add(sums, part):
        index, microbatch = part
        found = run(train, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, found), None

    zero = jnp.zeros((), jnp.float32)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), train)
    sums, _ = jax.lax.scan(add, (zero, zero, zeros), (jnp.arange(parts), split_batch(batch, parts)))
    return sums


def _norm(gradient: PyTree) -> Array:
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradient))
