"""The step: only the trainable half moves, parts equal the whole, bad numbers change nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_ft import trees
from lorax_ft.training.flops import count_flops
from lorax_ft.training.objectives import OBJECTIVES
from lorax_ft.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    trainable_labels,
    trainable_only,
)
from lorax_ft.training.step import inputs_of, make_eval_step, make_train_step, split_batch

VOCABULARY, WIDTH, LAYERS = 11, 8, 3
OBJECTIVE = OBJECTIVES["causal_lm"]
KEY = jax.random.key(0)


def apply(params, inputs, key):
    """A toy language model with scanned layers, and dropout where it is given a key."""
    x = params["embedding"][inputs["input_ids"]]
    if key is not None:
        x = x * jax.random.bernoulli(key, 0.8, x.shape).astype(x.dtype) / 0.8
    x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["kernel"]), None), x, params["layers"])
    return x @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, 1, -1)


def no_dropout(params, inputs, key):
    del key
    return apply(params, inputs, None)


def make_params():
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "layers": {"kernel": jax.random.normal(keys[1], (LAYERS, WIDTH, WIDTH)) / 3},
        "head": {
            "kernel": jax.random.normal(keys[2], (WIDTH, VOCABULARY)),
            "bias": jnp.zeros(VOCABULARY),
        },
    }


def make_batch(rows: int = 8, length: int = 6, seed: int = 0):
    """Rows of very different numbers of labels, one of them of weight zero."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    places = np.arange(length)[None] < np.linspace(1, length, rows).astype(int)[:, None]
    weights = np.ones(rows, np.float32)
    weights[-1] = 0.0
    return {"input_ids": ids, "labels": np.where(places, ids, -100), "weights": weights}


def start(tx, trainable=".*head.*"):
    train, frozen = trees.partition(make_params(), trainable)
    return train, tx.init(train), frozen


def all_bytes(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


ADAM = build_optimizer(OptimizerConfig(learning_rate=0.01, clip_norm=0.1), total_steps=10)


def test_a_step_is_the_gradient_of_the_weighted_mean():
    tx = optax.sgd(0.5)
    train, opt_state, frozen = start(tx)
    batch = make_batch()

    def mean_loss(train):
        params = trees.combine(train, frozen)
        loss_sum, weight, _ = OBJECTIVE(apply(params, inputs_of(batch), None), batch)
        return loss_sum / weight

    loss, gradient = jax.value_and_grad(mean_loss)(train)
    wanted = jax.tree.map(lambda p, g: p - 0.5 * g, train, gradient)
    norm = optax.tree.norm(gradient)
    step = make_train_step(no_dropout, OBJECTIVE, tx)
    train, _, metrics = step(train, opt_state, frozen, batch, KEY)

    # the two programs may add in different orders
    chex.assert_trees_all_close(train, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert "learning_rate" not in metrics


def test_metrics_tell_weights_rates_and_finiteness():
    train, opt_state, frozen = start(ADAM)
    batch = make_batch()
    labels = np.asarray(batch["labels"])[:-1, 1:]

    step = make_train_step(apply, OBJECTIVE, ADAM)
    _, _, metrics = step(train, opt_state, frozen, batch, KEY)

    assert int(metrics["weight"]) == np.sum(labels != -100)
    np.testing.assert_allclose(metrics["learning_rate"], 0.01, rtol=1e-6)
    assert float(metrics["finite"]) == 1.0
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_parts_equal_the_large_batch_whatever_their_token_counts(parts):
    batch = make_batch()
    counts = (np.asarray(split_batch(batch, parts)["labels"]) != -100).sum(axis=(1, 2))
    assert len(set(counts)) > 1

    found = {}
    for accumulation in (1, parts):
        train, opt_state, frozen = start(ADAM, ".*")
        step = make_train_step(no_dropout, OBJECTIVE, ADAM, accumulation=accumulation)
        for _ in range(3):
            train, opt_state, metrics = step(train, opt_state, frozen, batch, KEY)
        found[accumulation] = train, metrics

    # float32 sums in another order; Adam's first steps divide small gradients by themselves
    chex.assert_trees_all_close(found[1], found[parts], rtol=1e-4, atol=1e-5)


def test_parts_of_an_accumulated_step_have_dropout_of_their_own():
    tx = optax.sgd(1.0)
    one_row = make_batch(rows=1)
    doubled = {name: np.concatenate([x, x]) for name, x in one_row.items()}
    doubled["weights"] = np.ones(2, np.float32)
    doubled["labels"] = doubled["input_ids"]
    losses = []
    for index in range(2):
        train, opt_state, frozen = start(tx)
        step = make_train_step(apply, OBJECTIVE, tx)
        half = {name: x[:1] for name, x in doubled.items()}
        key = jax.random.fold_in(KEY, index)
        losses.append(float(step(train, opt_state, frozen, half, key)[2]["loss"]))

    train, opt_state, frozen = start(tx)
    step = make_train_step(apply, OBJECTIVE, tx, accumulation=2)
    metrics = step(train, opt_state, frozen, doubled, KEY)[2]

    assert losses[0] != losses[1]
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


def test_frozen_arrays_keep_every_byte_and_trained_ones_move():
    train, opt_state, frozen = start(ADAM)
    before, moved = all_bytes(frozen), all_bytes(train)
    step = make_train_step(apply, OBJECTIVE, ADAM)

    for n in range(5):
        key = jax.random.fold_in(KEY, n)
        train, opt_state, _ = step(train, opt_state, frozen, make_batch(seed=n), key)

    assert all_bytes(frozen) == before
    assert all(a != b for a, b in zip(all_bytes(train), moved))


def test_the_step_and_the_masked_optimizer_over_the_full_tree_agree():
    params = make_params()
    batch = make_batch()
    whole = trainable_only(ADAM, trainable_labels(params, ".*head.*"))

    @jax.jit
    def full_step(params, state):
        def mean_loss(params):
            logits = apply(params, inputs_of(batch), None)
            loss_sum, weight, _ = OBJECTIVE(logits, batch)
            return loss_sum / weight

        updates, state = whole.update(jax.grad(mean_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    train, opt_state, frozen = start(ADAM)
    step = make_train_step(no_dropout, OBJECTIVE, ADAM)
    state = whole.init(params)
    for _ in range(4):
        train, opt_state, _ = step(train, opt_state, frozen, batch, KEY)
        params, state = full_step(params, state)

    # two programs, which may add in different orders
    chex.assert_trees_all_close(trees.combine(train, frozen), params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(bad, accumulation):
    train, opt_state, frozen = start(ADAM)
    step = make_train_step(no_dropout, OBJECTIVE, ADAM, accumulation=accumulation)
    train, opt_state, _ = step(train, opt_state, frozen, make_batch(), KEY)
    before = all_bytes((train, opt_state))
    broken = make_batch()
    broken["weights"] = np.full(8, bad, np.float32)

    train, opt_state, metrics = step(train, opt_state, frozen, broken, KEY)

    assert all_bytes((train, opt_state)) == before
    assert float(metrics["finite"]) == 0.0
    assert step._cache_size() == 1


def test_a_gradient_that_overflows_is_skipped_though_its_loss_is_finite():
    def steep(params, inputs, key):
        # finite values, whose square root has an infinite slope at zero
        del inputs, key
        return jnp.sqrt(params["x"] * 0.0).reshape(1, 2)

    tx = optax.sgd(1.0)
    train, frozen = trees.partition({"x": jnp.ones(2), "y": jnp.ones(1)}, "x")
    step = make_train_step(steep, OBJECTIVES["sequence_classification"], tx)

    batch = {"labels": np.array([0], np.int32)}
    train, _, metrics = step(train, tx.init(train), frozen, batch, KEY)

    assert np.isfinite(metrics["loss"])
    assert float(metrics["finite"]) == 0.0
    assert np.array_equal(train["x"], np.ones(2))


def test_a_batch_without_labels_changes_nothing_and_is_no_error():
    train, opt_state, frozen = start(ADAM)
    before = all_bytes((train, opt_state))
    batch = make_batch()
    batch["labels"] = np.full_like(batch["labels"], -100)

    train, opt_state, metrics = make_train_step(apply, OBJECTIVE, ADAM)(
        train, opt_state, frozen, batch, KEY
    )

    assert all_bytes((train, opt_state)) == before
    assert (float(metrics["finite"]), float(metrics["loss"])) == (1.0, 0.0)


def test_steps_of_equal_shape_are_traced_and_compiled_once():
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(apply, n=2)  # one trace for each shape
    train, opt_state, frozen = start(ADAM)
    step = make_train_step(counted, OBJECTIVE, ADAM)

    for n in range(6):
        batch = make_batch(length=6 if n % 2 else 4, seed=n)
        key = jax.random.fold_in(KEY, n)
        train, opt_state, _ = step(train, opt_state, frozen, batch, key)

    assert step._cache_size() == 2


def test_what_goes_in_is_donated():
    train, opt_state, frozen = start(ADAM)

    make_train_step(apply, OBJECTIVE, ADAM)(train, opt_state, frozen, make_batch(), KEY)

    assert all(x.is_deleted() for x in jax.tree.leaves(train))
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))


def test_bfloat16_parameters_accumulate_in_float32_and_stay_bfloat16():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    train, frozen = trees.partition(params, ".*head.*")
    tx = build_optimizer(OptimizerConfig(learning_rate=0.01), total_steps=4)

    step = make_train_step(no_dropout, OBJECTIVE, tx, accumulation=2)
    train, _, metrics = step(train, tx.init(train), frozen, make_batch(), KEY)

    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(train))
    assert metrics["loss"].dtype == jnp.float32


def test_evaluation_sums_over_batches_without_dropout():
    train, _, frozen = start(ADAM)
    batch = make_batch()
    step = make_eval_step(apply, OBJECTIVE)
    halves = [{name: x[rows] for name, x in batch.items()} for rows in (slice(4), slice(4, 8))]

    whole = step(train, frozen, batch)
    parts = [step(train, frozen, half) for half in halves]

    np.testing.assert_allclose(sum(p[0] for p in parts), whole[0], rtol=1e-5)
    assert float(sum(p[1] for p in parts)) == float(whole[1])
    assert whole[2]["predictions"].shape == (8, 6)


def test_a_batch_that_does_not_divide_into_parts_is_an_error():
    train, opt_state, frozen = start(ADAM)
    step = make_train_step(apply, OBJECTIVE, ADAM, accumulation=3)

    with pytest.raises(ValueError, match=r"8 rows \(input_ids\) .* 3 equal parts"):
        step(train, opt_state, frozen, make_batch(), KEY)


def test_flops_count_every_turn_of_a_scan_and_both_products_of_its_gradient():
    params = make_params()
    inputs = {"input_ids": jnp.zeros((2, 5), jnp.int32)}

    def loss(layers):
        return apply(params | {"layers": layers}, inputs, None).sum()

    forward = 2 * 2 * 5 * WIDTH * (LAYERS * WIDTH + VOCABULARY)
    traced = jax.jit(loss).trace(params["layers"])
    backward = jax.jit(jax.value_and_grad(loss)).trace(params["layers"])

    assert count_flops(traced.jaxpr) == forward
    # to the layers' inputs and their kernels; the head has the first alone
    assert count_flops(backward.jaxpr) == forward + 2 * 2 * 5 * WIDTH * (
        2 * LAYERS * WIDTH + VOCABULARY
    )


def test_flops_of_a_frozen_kernels_gradient_are_not_counted():
    frozen, x = jnp.ones((8, 8)), jnp.ones((4, 8))

    def loss(scale, kernel):  # whose backward pass states a gradient that nobody takes
        layer = jax.checkpoint(lambda x, _: (product(x, kernel), None))
        return jax.lax.scan(layer, scale * x, None, length=3)[0].sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(1.0, frozen)
    one = 2 * 4 * 8 * 8

    assert count_flops(traced.jaxpr) == 3 * (one + one)  # there and back


@jax.custom_vjp
def product(x, kernel):
    return x @ kernel


product.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda saved, dy: (dy @ saved[1].T, saved[0].T @ dy),
)
