"""Optimizers: schedules as transformers has them, decay, clipping, LoRA+, and full trees."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_ft import trees
from lorax_ft.leaves import Leaf, leaf
from lorax_ft.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    schedule,
    trainable_labels,
    trainable_only,
    warmup_steps,
)

NAMES = ("adamw", "sgd", "adafactor", "lion")


@leaf
class Factors(Leaf):
    """A leaf with LoRA's fields and nothing of what it does."""

    base: Any
    a: Any
    b: Any

    trainable: ClassVar[tuple[str, ...]] = ("a", "b")
    stack_shape = core_shape = in_axes = dtype = None
    astype = linear = linear_transposed = take = dense = partition_specs = None


def lora_params():
    factors = Factors(base=jnp.ones((4, 4)), a=jnp.ones((2, 4)), b=jnp.ones((2, 4)))
    return {"query": {"kernel": factors}, "head": {"kernel": jnp.ones((4, 2)), "b": jnp.ones(2)}}


def updates_of(config: OptimizerConfig, params, gradient, total_steps: int = 10):
    tx = build_optimizer(config, total_steps)
    return tx.update(gradient, tx.init(params), params)[0]


def transformers_factor(name: str, step: int, warmup: int, total: int) -> float:
    """`get_{constant,linear,cosine}_schedule_with_warmup` of transformers 5, optimization.py."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    after = {
        "constant": 1.0,
        "linear": max(0.0, (total - step) / max(1, total - warmup)),
        "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
    }
    return after[name]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_are_transformers_numbers(name, warmup):
    shape = schedule(OptimizerConfig(schedule=name, warmup_steps=warmup), total_steps=20)

    found = [float(shape(step)) for step in range(20)]

    wanted = [transformers_factor(name, step, warmup, 20) for step in range(20)]
    np.testing.assert_allclose(found, wanted, atol=2e-7)  # float32 against float64


def test_learning_rates_of_a_run_are_those_torch_recorded():
    # golden/bert_seqcls/train/full_clip_schedule.npz: linear, 2 of 5 steps warm-up, peak 1e-3
    config = OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_steps=2)
    tx = build_optimizer(config, total_steps=5)
    params = {"kernel": jnp.ones(3)}
    state, rates = tx.init(params), []
    for _ in range(5):
        _, state = tx.update(params, state, params)
        rates.append(float(learning_rate(state)))

    np.testing.assert_allclose(rates, [0.0, 5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("fraction", "total", "steps"), [(0.06, 100, 6), (0.06, 101, 7), (0.07, 100, 7), (0.0, 5, 0)]
)
def test_a_fraction_of_warm_up_is_rounded_up(fraction, total, steps):
    assert warmup_steps(OptimizerConfig(warmup_fraction=fraction), total) == steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_optimizer_lowers_a_quadratic_and_keeps_dtypes(name, dtype):
    config = OptimizerConfig(name=name, learning_rate=0.05, schedule="constant", weight_decay=0.01)
    tx = build_optimizer(config, total_steps=30)
    params = {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4).astype(dtype)}
    start, state = params, tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)  # the gradient of |x|²/2
        return optax.apply_updates(params, updates), state

    structure = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    for _ in range(30):
        params, state = step(params, state)

    assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == structure
    assert jnp.linalg.norm(params["kernel"]) < 0.5 * jnp.linalg.norm(start["kernel"])
    assert step._cache_size() == 1


def test_adamw_takes_the_step_of_its_formula():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    params, gradient = {"kernel": jnp.array([2.0, -4.0])}, {"kernel": jnp.array([0.3, -0.01])}

    updates = updates_of(config, params, gradient)["kernel"]

    # the first step of Adam is lr × sign(g); decay is decoupled: lr × decay × p
    np.testing.assert_allclose(updates, [-0.1 - 0.1, 0.1 + 0.2], rtol=1e-5)


def test_clipping_comes_before_the_optimizer_sees_the_gradient():
    params = {"x": jnp.zeros(2), "y": jnp.zeros(1)}
    gradient = {"x": jnp.array([3.0, 0.0]), "y": jnp.array([4.0])}
    config = OptimizerConfig(name="sgd", b1=0.0, learning_rate=1.0, clip_norm=0.5)

    updates = updates_of(config, params, gradient)

    np.testing.assert_allclose(updates["x"], [-0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(updates["y"], [-0.4], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_decay_spares_what_no_decay_names(name):
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(
        name=name, learning_rate=0.5, weight_decay=0.1, no_decay=(".*/bias",), schedule="constant"
    )

    updates = updates_of(config, params, zero)

    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05, rtol=1e-6)
    assert jnp.all(updates["dense"]["bias"] == 0)


def test_lora_plus_speeds_up_the_b_of_leaves_alone():
    train, _ = trees.partition(lora_params(), "head/.*")
    gradient = jax.tree.map(jnp.ones_like, train)
    plain = OptimizerConfig(name="sgd", b1=0.0, clip_norm=None, weight_decay=0.1)
    faster = OptimizerConfig(
        name="sgd", b1=0.0, clip_norm=None, weight_decay=0.1, lora_plus_ratio=16
    )

    ratio = jax.tree.map(
        lambda a, b: float(jnp.max(a / b)),
        updates_of(faster, train, gradient),
        updates_of(plain, train, gradient),
    )

    assert trees.flatten_arrays(ratio) == {
        "head/b": 1.0,
        "head/kernel": 1.0,
        "query/kernel/a": 1.0,
        "query/kernel/b": 16.0,
    }


def test_lora_plus_without_lora_is_an_error():
    tx = build_optimizer(OptimizerConfig(lora_plus_ratio=16), total_steps=2)

    with pytest.raises(ValueError, match="lora_plus_ratio is 16"):
        tx.init({"head": {"b": jnp.ones(2)}})


def test_the_peak_is_state_so_that_a_sweep_needs_no_new_program():
    tx = build_optimizer(OptimizerConfig(name="sgd", b1=0.0, learning_rate=1.0), total_steps=4)
    params = jnp.ones(3)
    states = jax.vmap(lambda _: tx.init(params))(jnp.arange(3))
    states = optax.tree.set(states, peak=jnp.array([0.1, 0.2, 0.4]))

    updates, _ = jax.vmap(lambda state: tx.update(jnp.full(3, 0.5), state, params))(states)

    np.testing.assert_allclose(updates[:, 0], [-0.05, -0.1, -0.2], rtol=1e-6)


@pytest.mark.parametrize("config", [
    OptimizerConfig(clip_norm=0.1, weight_decay=0.1),
    OptimizerConfig(clip_norm=0.1, weight_decay=0.1, no_decay=(".*/bias",), lora_plus_ratio=4.0),
    OptimizerConfig(name="sgd", clip_norm=0.1),
])  # fmt: skip
def test_a_full_tree_and_its_trainable_half_take_the_same_step(config):
    params = lora_params()
    params["dense"] = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    params["frozen"] = jnp.full(5, 7.0)
    trainable = ("head/.*", "dense/bias", "dense/kernel")
    # frozen gradients a thousand times larger: whatever read them would clip otherwise
    gradient = jax.tree.map(lambda x: x * 1e3, params)
    train, frozen = trees.partition(params, trainable)
    gradient = trees.combine(jax.tree.map(jnp.ones_like, train), gradient)
    train_gradient, _ = trees.partition(gradient, trainable)
    half = build_optimizer(config, 4)
    whole = trainable_only(half, trainable_labels(params, trainable))

    half_state, whole_state = half.init(train), whole.init(params)
    for _ in range(2):
        updates, half_state = half.update(train_gradient, half_state, train)
        train = optax.apply_updates(train, updates)
        updates, whole_state = whole.update(gradient, whole_state, params)
        params = optax.apply_updates(params, updates)

    for one, other in zip(jax.tree.leaves(trees.combine(train, frozen)), jax.tree.leaves(params)):
        assert np.array_equal(one, other)
    assert float(learning_rate(whole_state)) == float(learning_rate(half_state))


def test_labels_that_train_nothing_are_an_error():
    with pytest.raises(ValueError, match="nothing would be trained"):
        trainable_only(optax.sgd(1.0), {"x": "freeze"})


@pytest.mark.parametrize(("field", "value"), [
    ("name", "adam"), ("schedule", "linaer"), ("learning_rate", -1.0), ("weight_decay", -0.1),
    ("clip_norm", 0.0), ("lora_plus_ratio", -1.0), ("b1", 1.0), ("b2", -0.1), ("eps", 0.0),
    ("warmup_steps", -1), ("warmup_fraction", 1.0),
])  # fmt: skip
def test_bad_fields_are_named_with_their_values(field, value):
    with pytest.raises(ValueError, match=f"OptimizerConfig.{field} .*{value}"):
        OptimizerConfig(**{field: value})


def test_two_kinds_of_warm_up_are_an_error():
    with pytest.raises(ValueError, match="give one"):
        OptimizerConfig(warmup_steps=1, warmup_fraction=0.1)


def test_a_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="10 warm-up steps leave none of the run's 10"):
        build_optimizer(OptimizerConfig(warmup_steps=10), total_steps=10)


def test_a_no_decay_pattern_that_matches_nothing_is_an_error():
    tx = build_optimizer(OptimizerConfig(weight_decay=0.1, no_decay=(".*/biass",)), total_steps=2)

    with pytest.raises(ValueError, match=r"no_decay: '.*/biass' matches none"):
        tx.init({"dense": {"bias": jnp.ones(2)}})
