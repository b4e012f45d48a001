"""Objectives: sums that add up, in float32, over what is labelled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft.training.objectives import OBJECTIVES


def example(task: str, rows: int = 4, length: int = 6, classes: int = 5):
    """Random logits and a batch with ignored labels and uneven weights."""
    rng = np.random.default_rng(0)
    shape = (rows,) if task == "sequence_classification" else (rows, length)
    labels = rng.integers(0, classes, shape).astype(np.int32)
    labels[rng.random(shape) < 0.3] = -100
    weights = np.linspace(0, 1.5, rows, dtype=np.float32)
    logits = rng.normal(size=(*shape, classes)).astype(np.float32)
    return jnp.array(logits), {"labels": jnp.array(labels), "weights": jnp.array(weights)}


def by_hand(task: str, logits, batch) -> tuple[float, float, float]:
    """(loss sum, weight sum, correct weight), one label at a time in float64."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(batch["labels"])
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = weight = correct = 0.0
    for index in np.ndindex(labels.shape):
        if labels[index] != -100:
            w, row = float(batch["weights"][index[0]]), logits[index]
            loss += w * (np.log(np.exp(row).sum()) - row[labels[index]])
            correct += w * (row.argmax() == labels[index])
            weight += w
    return loss, weight, correct


@pytest.mark.parametrize("task", OBJECTIVES)
def test_sums_are_those_of_the_labelled_places_one_by_one(task):
    logits, batch = example(task)

    loss_sum, weight_sum, extras = OBJECTIVES[task](logits, batch)

    # float32 sums of about thirty terms
    np.testing.assert_allclose(
        (loss_sum, weight_sum, extras["correct"]), by_hand(task, logits, batch), rtol=1e-5
    )
    assert extras["predictions"].shape == batch["labels"].shape


@pytest.mark.parametrize("task", OBJECTIVES)
def test_sums_of_parts_are_the_sums_of_the_whole(task):
    logits, batch = example(task)
    parts = [
        OBJECTIVES[task](logits[rows], {name: x[rows] for name, x in batch.items()})[:2]
        for rows in (slice(0, 1), slice(1, 4))
    ]

    whole = OBJECTIVES[task](logits, batch)[:2]

    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)  # another order of addition


@pytest.mark.parametrize("task", OBJECTIVES)
def test_bfloat16_logits_are_summed_in_float32(task):
    logits, batch = example(task)
    rounded = logits.astype(jnp.bfloat16)

    found = OBJECTIVES[task](rounded, batch)[0]

    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, OBJECTIVES[task](rounded.astype(jnp.float32), batch)[0])


def test_ignored_labels_and_rows_of_weight_zero_get_no_gradient():
    logits, batch = example("token_classification")
    silent = (np.asarray(batch["labels"]) == -100) | (np.asarray(batch["weights"]) == 0)[:, None]

    gradient = jax.grad(lambda x: OBJECTIVES["token_classification"](x, batch)[0])(logits)

    assert np.all(np.asarray(gradient)[silent] == 0)
    assert np.all(np.any(np.asarray(gradient)[~silent] != 0, axis=-1))


def test_causal_language_models_are_never_scored_on_a_token_they_have_seen():
    logits, batch = example("causal_lm")

    gradient = jax.grad(lambda x: OBJECTIVES["causal_lm"](x, batch)[0])(logits)

    assert np.all(np.asarray(gradient)[:, -1] == 0)


def test_every_label_counts_one_where_there_are_no_weights():
    logits, batch = example("masked_lm")

    _, weight_sum, _ = OBJECTIVES["masked_lm"](logits, {"labels": batch["labels"]})

    assert int(weight_sum) == np.sum(np.asarray(batch["labels"]) != -100)


def test_the_objective_of_another_task_is_refused():
    logits, _ = example("token_classification")
    _, batch = example("sequence_classification")

    with pytest.raises(ValueError, match=r"labels \[4\] do not fit logits \[4, 6, 5\]"):
        OBJECTIVES["sequence_classification"](logits, batch)
