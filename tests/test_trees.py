"""Names, patterns, halves and counts of parameter trees."""

import chex
import jax
import jax.numpy as jnp
import pytest

from lorax_ft import trees
from tests.test_lift import random_lora

params = {
    "layers": {"query": {"kernel": random_lora((4, 6)), "bias": jnp.ones(6)}},
    "head": {"kernel": jnp.ones((6, 2))},
    "steps": jnp.ones(1, jnp.int32),
}


def test_a_leaf_is_one_parameter_and_its_fields_are_arrays_of_their_own():
    assert list(trees.flatten(params)) == [
        "head/kernel",
        "layers/query/bias",
        "layers/query/kernel",
        "steps",
    ]
    assert "layers/query/kernel/a" in trees.flatten_arrays(params)


def test_combine_undoes_partition_and_only_chosen_arrays_are_trainable():
    train, frozen = trees.partition(params, "head/.*")
    assert set(trees.flatten_arrays(train)) == {
        "head/kernel",
        "layers/query/kernel/a",
        "layers/query/kernel/b",
    }
    chex.assert_trees_all_equal(trees.combine(train, frozen), params)
    assert (
        trees.combine(train, frozen)["layers"]["query"]["bias"] is params["layers"]["query"]["bias"]
    )


def test_gradients_of_the_trainable_half_alone_can_be_taken():
    train, frozen = trees.partition(params)
    gradient = jax.grad(
        lambda t: jnp.sum(trees.combine(t, frozen)["layers"]["query"]["kernel"].dense())
    )(train)
    assert set(trees.flatten_arrays(gradient)) == {"layers/query/kernel/a", "layers/query/kernel/b"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers/quary/bias", r"matches none of the 4 parameters.*layers/query/bias"),
        ("(", "no regular expression"),
        ("layers/query/kernel", "LoRA leaf, whose own fields decide"),
        ("steps", "dtype int32"),
    ],
)
def test_a_pattern_that_cannot_be_followed_names_the_parameter_and_the_remedy(pattern, message):
    with pytest.raises(ValueError, match=message):
        trees.partition(params, pattern)


def test_nothing_trainable_is_an_error():
    with pytest.raises(ValueError, match="nothing is trainable"):
        trees.partition({"kernel": jnp.ones((2, 2))})


def test_counts_are_of_arrays_as_stored_and_of_rows_that_are_real():
    counts = trees.count(params, "head/.*")
    assert counts.trainable == 12 + 3 * (4 + 6)
    assert counts.total == 12 + 6 + 24 + 30 + 1
    assert counts.bytes == sum(x.nbytes for x in jax.tree.leaves(params))
    padded = params["layers"]["query"]["kernel"].replace(rank=jnp.int32(2))
    assert trees.count({"kernel": padded}).trainable == 2 * (4 + 6)


def test_the_summary_names_every_parameter_and_the_totals():
    text = trees.summary(params, "head/.*")
    assert all(path in text for path in trees.flatten(params))
    assert "trainable 42 of 73 (57.53%)" in text
