"""AdaLoRA: the leaf's laws, the budget, and the allocation that Hugging Face PEFT makes.

golden/make_adapters.py made PEFT's numbers.
"""

import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import trees
from lorax_ft.lift import lift
from lorax_ft.methods import (
    AdaLoRA,
    AdaLoraConfig,
    LoraConfig,
    add_adalora,
    add_lora,
    allocate,
    as_lora,
    budget_schedule,
    merge,
    orthogonality,
    set_dropout_key,
    start_allocation,
    unmerge,
)

GOLDEN = pathlib.Path(__file__).parent / "golden" / "adapters" / "allocation.npz"
KEY = jax.random.key(0)
CONFIG = AdaLoraConfig(
    targets=".*kernel",
    rank=4,
    target_rank=2,
    warmup_steps=2,
    final_steps=3,
    interval=2,
    beta1=0.8,
    beta2=0.7,
)


def base():
    keys = jax.random.split(jax.random.key(1))
    return {
        "layers": {"kernel": jax.random.normal(keys[0], (2, 6, 6))},
        "out": {"kernel": jax.random.normal(keys[1], (6, 5))},
    }


def apply(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])
    return x @ params["out"]["kernel"]


x = jax.random.normal(jax.random.key(2), (3, 6))


def moved(params):
    train, frozen = trees.partition(params)
    keys = iter(jax.random.split(jax.random.key(7), 100))
    train = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), train)
    return trees.combine(train, frozen)


def test_a_fresh_update_is_the_identity_and_merging_keeps_the_trained_output():
    params = add_adalora(base(), CONFIG, KEY)
    assert isinstance(params["layers"]["kernel"], AdaLoRA)
    assert params["layers"]["kernel"].scale.tolist() == [4.0, 4.0]
    assert trees.count(params).trainable == 2 * 4 * 13 + 4 * 12
    np.testing.assert_allclose(lift(apply)(params, x), apply(base(), x), rtol=1e-6, atol=1e-6)
    trained = moved(params)
    np.testing.assert_allclose(
        apply(merge(trained), x), lift(apply)(trained, x), rtol=1e-5, atol=1e-5
    )
    again = unmerge(merge(trained), trained)
    np.testing.assert_allclose(again["out"]["kernel"].base, base()["out"]["kernel"], atol=1e-5)


def test_a_second_adapter_on_one_kernel_and_an_unknown_target_are_refused():
    params = add_adalora(base(), CONFIG, KEY)
    with pytest.raises(ValueError, match=r"AdaLoraConfig\.targets: no module is named 'q'"):
        add_adalora(params, dataclasses.replace(CONFIG, targets=("q",)), KEY)
    with pytest.raises(ValueError, match="layers/kernel has a AdaLoRA adapter already"):
        add_lora(params, LoraConfig(targets=".*kernel"), KEY)


def test_gradients_are_those_of_the_dense_kernel():
    leaf = moved(add_adalora(base(), CONFIG, KEY))["out"]["kernel"]

    def gradients(function):
        def loss(base, a, values, b):
            return jnp.sum(jnp.sin(function(leaf.replace(base=base, a=a, values=values, b=b))))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(leaf.base, leaf.a, leaf.values, leaf.b)

    got, want = gradients(lambda leaf: leaf.linear(x)), gradients(lambda leaf: x @ leaf.dense())
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_dropout_acts_with_a_key_only():
    config = AdaLoraConfig(targets=".*kernel", rank=4, target_rank=2, dropout=0.5)
    params = moved(add_adalora(base(), config, KEY))
    keyed = set_dropout_key(params, jax.random.key(3))
    assert not jnp.array_equal(lift(apply)(keyed, x), lift(apply)(params, x))


def tree(golden, step, suffix=""):
    """PEFT's parameters or gradients of one step, its first two modules as two layers."""

    def array(module, part):
        return jnp.asarray(golden[f"{step}.{module}.{part}{suffix}"])

    def factors(module):
        return array(module, "A"), array(module, "E")[:, 0], array(module, "B").T

    first, second = (factors(module) for module in ("first", "second"))
    a, values, b = (jnp.stack(pair) for pair in zip(first, second))
    params = add_adalora(base(), CONFIG, KEY)
    train, _ = trees.partition(params)
    train["layers"]["kernel"] = train["layers"]["kernel"].replace(a=a, values=values, b=b)
    a, values, b = factors("out")
    train["out"]["kernel"] = train["out"]["kernel"].replace(a=a, values=values, b=b)
    return train


def test_the_allocation_is_pefts_at_every_step_in_one_program():
    golden = np.load(GOLDEN)
    allocation = start_allocation(add_adalora(base(), CONFIG, KEY))
    budgets = budget_schedule(CONFIG, 12, 14)
    step_once = jax.jit(
        chex.assert_max_traces(
            lambda train, slopes, state, step: allocate(train, slopes, state, step, CONFIG, 14), n=1
        )
    )
    for step in range(14):
        train, allocation = step_once(
            tree(golden, step), tree(golden, step, ".gradient"), allocation, step
        )
        assert budgets[step] == golden[f"{step}.budget"]
        got = [*train["layers"]["kernel"].values, train["out"]["kernel"].values]
        for module, values in zip(("first", "second", "out"), got):
            np.testing.assert_array_equal(values, golden[f"{step}.{module}.after"][:, 0])
    assert sum(int(active.sum()) for active in allocation.active.values()) == 2 * 3


def test_what_the_budget_left_is_a_lora_of_each_layers_own_rank():
    params = moved(add_adalora(base(), CONFIG, KEY))
    leaf = params["layers"]["kernel"]
    values = leaf.values * jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    params["layers"]["kernel"] = leaf.replace(values=values)
    lora = as_lora(params)
    assert lora["layers"]["kernel"].rank.tolist() == [2, 1]
    assert lora["layers"]["kernel"].a.shape == (2, 2, 6)
    assert jnp.all(lora["layers"]["kernel"].b[1, 1] == 0)
    chex.assert_trees_all_close(merge(lora), merge(params), rtol=1e-5, atol=1e-5)


def test_orthogonality_is_the_mean_distance_and_has_a_gradient_where_it_is_zero():
    params = add_adalora(base(), CONFIG, KEY)
    distances = [
        np.linalg.norm(p @ p.T - np.eye(4))
        for leaf in trees.flatten(params).values()
        for factor in (leaf.a, leaf.b)
        for p in np.asarray(factor).reshape(-1, *factor.shape[-2:])
    ]
    np.testing.assert_allclose(orthogonality(params), np.mean(distances), rtol=1e-5)
    straight = params["out"]["kernel"].replace(a=jnp.eye(4, 6), b=jnp.eye(4, 5))
    value, slope = jax.value_and_grad(lambda a: orthogonality([straight.replace(a=a)]))(straight.a)
    assert value == 0
    assert jnp.all(slope == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 5, "rank": 4}, "target_rank must be from 1 to rank"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\)"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"warmup_steps": -1}, "steps not negative"),
    ],
)
def test_bad_settings_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**options)


def test_a_run_without_a_step_for_the_budget_to_fall_in_is_refused():
    with pytest.raises(ValueError, match=r"2 warmup_steps and 3 final_steps .* the run's 5"):
        budget_schedule(CONFIG, 12, 5)


def test_params_without_the_leaf_are_told():
    with pytest.raises(ValueError, match="See add_adalora"):
        start_allocation(base())
