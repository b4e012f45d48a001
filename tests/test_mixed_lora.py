"""The MixedLoRA leaf: each example by its own adapter, with true gradients, and errors that say
what to do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft.lift import lift
from lorax_ft.methods.mixed_lora import MixedLoRA

INDEX = jnp.array([2, 0, -1, 2], jnp.int32)
LENGTH = 5


def random_leaf(shape=(4, 6), in_axes=(-2,), adapters=3, rank=2, index=INDEX):
    keys = jax.random.split(jax.random.key(0), 4)
    in_size = int(np.prod([shape[axis] for axis in in_axes]))
    out_size = int(np.prod(shape)) // in_size
    return MixedLoRA(
        base=jax.random.normal(keys[0], shape),
        a=jax.random.normal(keys[1], (adapters, rank, in_size)),
        b=jax.random.normal(keys[2], (adapters, rank, out_size)),
        scale=jax.random.uniform(keys[3], (adapters,), minval=0.5),
        rank=jnp.full((adapters,), rank, jnp.int32),
        index=index,
        base_in_axes=in_axes,
    )


def kernels(leaf):
    """The kernel `[batch, in, out]` that each example is multiplied with, of a 2-D base."""
    updates = jnp.einsum("kri,kro->kio", leaf.a, leaf.b) * leaf.scale[:, None, None]
    every = jnp.concatenate([updates, jnp.zeros((1, *updates.shape[1:]))])  # -1: the last
    return leaf.base[None] + every[leaf.index]


def gradients(function, leaf, x):
    def loss(base, a, b, scale, x):
        return jnp.sum(jnp.sin(function(leaf.replace(base=base, a=a, b=b, scale=scale), x)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))(
        leaf.base, leaf.a, leaf.b, leaf.scale, x
    )


x = jax.random.normal(jax.random.key(9), (4, LENGTH, 4))
FORMS = {
    "flattened": lambda w, x: (x.reshape(-1, 4) @ w).reshape(4, LENGTH, 6),
    "batch first": lambda w, x: x @ w,
    "by heads": lambda w, x: jnp.einsum("bld,dhk->bhlk", x, w.reshape(4, 2, 3)),
}
DENSE = {
    "flattened": lambda w, x: jnp.einsum("bld,bdf->blf", x, w),
    "batch first": lambda w, x: jnp.einsum("bld,bdf->blf", x, w),
    "by heads": lambda w, x: jnp.einsum("bld,bdhk->bhlk", x, w.reshape(4, 4, 2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_example_meets_its_own_kernel_and_gradients_are_true_for_every_field(form):
    leaf = random_leaf()
    got = gradients(lift(FORMS[form]), leaf, x)
    want = gradients(lambda leaf, x: DENSE[form](kernels(leaf), x), leaf, x)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert jnp.all(got[1][1][1] == 0), "adapter 1 is nobody's"


def test_a_table_serves_look_ups_and_the_head_that_is_tied_to_it():
    ids = jnp.array([[0, 3], [3, 3], [6, 1], [2, 2]])
    leaf = random_leaf((7, 4))

    def tied(table, x):
        return jnp.take(table, ids, axis=0) @ table.T + x[0, 0, 0]

    def formula(leaf, x):
        tables = kernels(leaf)
        rows = jax.vmap(lambda table, ids: table[ids])(tables, ids)
        return jnp.einsum("bld,bvd->blv", rows, tables) + x[0, 0, 0]

    got, want = gradients(lift(tied), leaf, x), gradients(formula, leaf, x)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_vmap_over_indices_and_over_members_of_a_sweep():
    indices = jnp.stack([INDEX, INDEX[::-1]])
    leaf = random_leaf()
    members = leaf.replace(a=jnp.stack([leaf.a, 2 * leaf.a]), index=indices)
    axes = jax.tree.map(lambda _: None, leaf).replace(a=0, index=0)
    got = jax.vmap(lift(lambda w, x: x @ w), in_axes=(axes, None))(members, x)
    want = [
        DENSE["flattened"](kernels(leaf.replace(a=a, index=i)), x)
        for a, i in zip(members.a, indices)
    ]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_diverged_spoils_its_own_examples_alone():
    leaf = random_leaf()
    broken = leaf.replace(a=leaf.a.at[2].set(jnp.nan), b=leaf.b.at[2].set(jnp.inf))
    (_, before), (_, after) = (
        gradients(lambda leaf, x: leaf.linear(x)[1:3], each, x) for each in (leaf, broken)
    )
    assert not jnp.all(jnp.isfinite(broken.linear(x)[0]))
    chex.assert_trees_all_equal(broken.linear(x)[1:3], leaf.linear(x)[1:3])
    chex.assert_trees_all_equal(after[1][:2], before[1][:2])
    chex.assert_trees_all_equal(after[2][:2], before[2][:2])


def test_a_traced_index_of_no_adapter_gives_nan_and_minus_one_the_base():
    leaf = random_leaf()
    y = jax.jit(lambda index: leaf.replace(index=index).linear(x))(jnp.array([0, 3, -1, -2]))
    assert jnp.array_equal(jnp.isnan(y).all(axis=(1, 2)), jnp.array([False, True, False, True]))
    base = (x.reshape(-1, 4) @ leaf.base).reshape(y.shape)
    np.testing.assert_allclose(y[2], base[2], rtol=1e-6, atol=1e-6)


def test_dropout_has_each_adapters_rate_and_the_gradients_of_the_masked_formula():
    leaf = random_leaf().replace(dropout=jnp.array([0.5, 0.0, 0.25]), key=jax.random.key(3))
    rates = jnp.repeat(jnp.array([0.25, 0.5, 0.0, 0.25]), LENGTH)[:, None]
    keep = jax.random.bernoulli(leaf.key, 1.0 - rates, (4 * LENGTH, 4)).reshape(x.shape)
    factor = keep.astype(jnp.float32) / (1.0 - rates.reshape(4, LENGTH, 1))

    def formula(leaf, x):
        rest = jnp.einsum("bld,bdf->blf", factor * x, kernels(leaf) - leaf.base[None])
        return jnp.einsum("bld,df->blf", x, leaf.base) + rest

    got = gradients(lambda leaf, x: leaf.linear(x), leaf, x)
    chex.assert_trees_all_close(got, gradients(formula, leaf, x), rtol=1e-4, atol=1e-5)


def test_half_precision_reaches_base_and_factors_whose_gradients_stay_float32():
    leaf = random_leaf()
    half = lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    y = lift(half)(leaf, x)
    assert y.dtype == jnp.bfloat16
    want = DENSE["flattened"](kernels(leaf), x)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=0.05, atol=0.2)  # 8 bits
    slope = jax.grad(lambda a: jnp.sum(lift(half)(leaf.replace(a=a), x).astype(jnp.float32)))
    assert slope(leaf.a).dtype == jnp.float32


def test_specs_and_counts_follow_the_fields():
    leaf = random_leaf()
    specs = leaf.partition_specs(jax.sharding.PartitionSpec(None, "tensor"))
    assert jax.tree.structure(specs) == jax.tree.structure(leaf)
    assert tuple(specs.b) == (None, None, "tensor")
    assert tuple(specs.index) == (None,)
    assert leaf.trainable_count() == 3 * 2 * (4 + 6)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda leaf: leaf.dense(), "stands for no single array"),
        (lambda leaf: leaf.replace(index=None).linear(x), "Call mix"),
        (lambda leaf: leaf.linear(x[:3]), r"x \[3, 5, 4\], .* the 4 examples"),
        (lambda leaf: leaf.linear(x[0, :, :]), r"x \[5, 4\]"),
        (lambda leaf: leaf.take(jnp.arange(4)), r"ids \[4\]; .* ids must be \[4, length\]"),
        (lambda leaf: leaf.take(jnp.zeros((1, 8), jnp.int32)), r"ids \[1, 8\]"),
    ],
)
def test_what_has_no_adapter_for_each_example_raises_with_the_remedy(use, message):
    with pytest.raises(ValueError, match=message):
        use(random_leaf())
