"""AdaLoRA within an optimizer: the step's arithmetic, and a budget that is kept in the end."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_ft import trees
from lorax_ft.lift import lift
from lorax_ft.methods import (
    AdaLoraConfig,
    add_methods,
    allocate,
    orthogonality,
    start_allocation,
)
from lorax_ft.training import OptimizerConfig, allocate_budget, build_optimizer
from lorax_ft.training.optimizers import learning_rate

CONFIG = AdaLoraConfig(
    targets=".*kernel",
    rank=4,
    target_rank=1,
    warmup_steps=1,
    interval=2,
    modules_to_save=("head",),
)
STEPS = 6
x = jax.random.normal(jax.random.key(2), (3, 6))


@pytest.fixture(scope="module")
def halves():
    keys = jax.random.split(jax.random.key(1))
    params = {
        "layers": {"kernel": jax.random.normal(keys[0], (2, 6, 6))},
        "head": {"weight": jax.random.normal(keys[1], (6, 2))},
    }
    params, trainable = add_methods(params, [CONFIG], jax.random.key(0))
    return trees.partition(params, trainable)


def loss(train, frozen):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def apply(params):
        y, _ = jax.lax.scan(layer, x, params["layers"]["kernel"])
        return y @ params["head"]["weight"]

    return jnp.sum(jnp.square(lift(apply)(trees.combine(train, frozen)) - 1.0))


def test_a_step_is_the_regularised_update_and_then_the_allocation(halves):
    train, frozen = halves
    tx, plain = allocate_budget(optax.sgd(0.1), CONFIG, STEPS), optax.sgd(0.1)
    state, before, allocation = tx.init(train), train, start_allocation(train)
    for step in (1, 2):

        def regularised(train):
            return loss(train, frozen) + CONFIG.orthogonality_weight * orthogonality(train)

        slopes = jax.grad(regularised)(before)
        moved = optax.apply_updates(before, plain.update(slopes, plain.init(before))[0])
        want, allocation = allocate(moved, slopes, allocation, step, CONFIG, STEPS)
        updates, state = tx.update(jax.grad(loss)(before, frozen), state, before)
        before = optax.apply_updates(before, updates)
        chex.assert_trees_all_close(before, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.allocation, allocation, rtol=1e-5, atol=1e-9)
    assert sum(int(a.sum()) for a in allocation.active.values()) < 8


def test_a_run_ends_with_its_budget_in_one_program_and_under_adam(halves):
    train, frozen = halves
    tx = build_optimizer(OptimizerConfig(learning_rate=1e-2), STEPS)
    tx = allocate_budget(tx, CONFIG, STEPS)

    @jax.jit
    def step(train, state):
        value, slopes = jax.value_and_grad(loss)(train, frozen)
        updates, state = tx.update(slopes, state, train)
        return optax.apply_updates(train, updates), state, value

    state, losses = tx.init(train), []
    for _ in range(STEPS):
        train, state, value = step(train, state)
        losses.append(float(value))
    assert step._cache_size() == 1
    assert losses[-1] < losses[0]
    values = np.asarray(train["layers"]["kernel"].values)
    assert np.count_nonzero(values) == 2 * CONFIG.target_rank
    assert learning_rate(state) is not None


def test_what_cannot_be_allocated_is_refused(halves):
    with pytest.raises(ValueError, match="none of the run's 1 for the budget"):
        allocate_budget(optax.sgd(0.1), CONFIG, 1)
    tx = allocate_budget(optax.sgd(0.1), CONFIG, STEPS)
    with pytest.raises(ValueError, match="See add_adalora"):
        tx.init({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="pass params"):
        tx.update(halves[0], tx.init(halves[0]))
