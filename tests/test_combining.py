"""Several adapters as one: the laws of each method, and Hugging Face PEFT's own numbers.

golden/make_adapters.py made the numbers.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import trees
from lorax_ft.leaves import dense
from lorax_ft.methods import (
    CombinationConfig,
    LoRA,
    LoraConfig,
    add_lora,
    combine_adapters,
    combining,
    merge,
)

GOLDEN = pathlib.Path(__file__).parent / "golden" / "adapters" / "combinations.npz"
SHAPES = {"embedding": (7, 6), "query": (6, 5), "value": (5, 6)}
WEIGHTS = (0.7, -0.4, 1.3)
EQUAL, MIXED = ("one", "two", "three"), ("one", "wide", "low")
DENSITY = 0.55


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def adapter(golden, name):
    """One of PEFT's adapters on a base of zeros."""
    leaves = {}
    for module, shape in SHAPES.items():
        a, b = golden[f"{name}.{module}.A"], golden[f"{name}.{module}.B"].T
        leaves[module] = LoRA(
            base=jnp.zeros(shape),
            a=jnp.asarray(a),
            b=jnp.asarray(b),
            scale=jnp.asarray(golden[f"{name}.scale"]),
            rank=jnp.int32(a.shape[0]),
        )
    return leaves


@pytest.fixture
def masks(monkeypatch):
    """The masks of make_adapters.py in place of chance; three adapters take turns."""
    calls = iter(range(1000))

    def kept(key, density, shape):
        i, j = np.indices(shape)
        return (7 * (i + j) + 3 * i * j + 5 * (next(calls) % 3)) % 10 < 10 * density

    monkeypatch.setattr(combining, "keep_mask", kept)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd_rank_2", {"method": "svd", "rank": 2}),
        ("ties_frequency", {"method": "ties", "sign": "frequency", "density": DENSITY}),
        *(
            (name + suffix, {"density": DENSITY})
            for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
            for suffix in ("", "_svd")
        ),
    ],
)
def test_every_method_gives_the_update_that_peft_gives(golden, masks, case, options):
    names = MIXED if case == "cat" or "svd" in case else EQUAL
    config = CombinationConfig(**{"method": case, **options})
    chosen = {name: adapter(golden, name) for name in names}
    combined = combine_adapters(chosen, WEIGHTS, config, jax.random.key(0))
    for module, leaf in combined.items():
        want = golden[f"{case}.{module}"]
        want = want if module == "embedding" else want.T
        np.testing.assert_allclose(leaf.dense(), want, rtol=1e-4, atol=1e-5)
        if f"{case}.{module}.A" in golden:  # of an SVD the signs are free
            np.testing.assert_allclose(
                leaf.a[: leaf.rank], golden[f"{case}.{module}.A"], rtol=1e-5, atol=1e-6
            )


def stacked(seed, rank, **options):
    """An adapter on two stacked layers whose second has a lower rank."""
    params = {"layers": {"up": {"kernel": jnp.zeros((2, 6, 5))}}}
    config = LoraConfig(targets=("up",), rank=rank, rank_pattern={"layers_1/up": 1}, **options)
    adapted = add_lora(params, config, jax.random.key(seed))
    leaf = adapted["layers"]["up"]["kernel"]
    b = jax.random.normal(jax.random.key(seed), leaf.b.shape)
    real = jnp.arange(rank)[None, :, None] < leaf.rank[:, None, None]
    return {"layers": {"up": {"kernel": leaf.replace(b=jnp.where(real, b, 0.0))}}}


def kernel(params):
    return params["layers"]["up"]["kernel"]


def test_concatenation_and_svd_of_full_rank_are_the_weighted_sum_of_updates_in_every_layer():
    pair = {"a": stacked(1, 2), "b": stacked(2, 3)}
    want = 0.5 * dense(kernel(pair["a"])) - 2 * dense(kernel(pair["b"]))
    for config in (CombinationConfig(method="cat"), CombinationConfig(method="svd", rank=5)):
        combined = kernel(combine_adapters(pair, (0.5, -2.0), config))
        np.testing.assert_allclose(combined.dense(), want, rtol=1e-4, atol=1e-5)
    joined = combine_adapters(pair, (1, 1), CombinationConfig(method="cat"))
    assert kernel(joined).rank.tolist() == [5, 2]


@pytest.mark.parametrize("method", combining.COMBINATIONS)
def test_one_adapter_of_weight_one_is_itself_whatever_the_method(method):
    alone = {"a": stacked(1, 3)}
    prunes = method not in ("linear", "cat", "svd")
    config = CombinationConfig(method=method, density=1.0 if prunes else None)
    combined = combine_adapters(alone, (1.0,), config, jax.random.key(0))
    want = kernel(alone["a"]).dense()
    np.testing.assert_allclose(kernel(combined).dense(), want, rtol=1e-4, atol=1e-5)


def test_dare_keeps_the_mean_and_depends_on_nothing_but_its_key():
    tensor = np.full((100, 100), 2.0, np.float32)
    dropped = combining.drop_and_rescale(tensor, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, 8.0}
    assert abs(dropped.mean() - 2.0) < 0.15  # four standard deviations of 10,000 draws
    pair = {"a": stacked(1, 2), "b": stacked(2, 2)}
    config = CombinationConfig(method="dare_linear", density=0.5)
    once, again, other = (
        kernel(combine_adapters(pair, (1, 1), config, jax.random.key(i))).a for i in (1, 1, 2)
    )
    assert jnp.array_equal(once, again)
    assert not jnp.array_equal(once, other)


def test_ties_by_hand():
    tensors = [np.array([3.0, -1.0, 0.0, 2.0]), np.array([-1.0, -2.0, 0.0, -2.0])]
    tensors = [tensor.astype(np.float32) for tensor in tensors]
    # elected: +, -, (nobody), + for a tie; then the mean of the weighted numbers of that sign
    merged = combining.elect_and_merge(tensors, (1.0, 10.0))
    np.testing.assert_array_equal(merged, [3.0, (-1.0 - 20.0) / 2, 0.0, 2.0])
    np.testing.assert_array_equal(combining.keep_largest(tensors[0], 0.5), [3.0, 0.0, 0.0, 2.0])


def test_a_combined_adapter_merges_into_its_base_like_any_other():
    params = {"up": {"kernel": jnp.ones((6, 5))}}
    config = LoraConfig(targets=("up",), rank=2)
    pair = {n: add_lora(params, config, jax.random.key(i)) for i, n in enumerate("ab")}
    combined = combine_adapters(pair, (1, 1), CombinationConfig(method="svd"))
    assert trees.kind(combined["up"]["kernel"]) == "LoRA"
    np.testing.assert_array_equal(merge(combined)["up"]["kernel"], params["up"]["kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sum"}, "expected one of"),
        ({"method": "ties"}, "density is None"),
        ({"method": "linear", "density": 0.5}, "the others take none"),
        ({"method": "ties", "density": 0.0}, r"\(0, 1\]"),
        ({"method": "cat", "rank": 3}, "only svd methods"),
        ({"method": "ties", "density": 0.5, "sign": "mean"}, "expected one of"),
    ],
)
def test_bad_settings_name_the_field(options, message):
    with pytest.raises(ValueError, match=f"CombinationConfig.*{message}"):
        CombinationConfig(**options)


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "message"),
    [
        ({"a": stacked(1, 2)}, (1, 1), {}, "2 weights for 1 adapters"),
        (
            {"a": stacked(1, 2), "b": stacked(1, 3)},
            (1, 1),
            {"method": "linear"},
            r"layers/up/kernel has ranks \[2, 3\]",
        ),
        ({"a": stacked(1, 2)}, (1,), {"method": "dare_linear", "density": 0.5}, "needs a key"),
        ({"a": stacked(1, 2)}, (1,), {"rank": 6}, r"layers/up/kernel allows \(5\)"),
        (
            {"a": stacked(1, 2), "b": {"layers": {"up": {"kernel": jnp.zeros((2, 6, 5))}}}},
            (1, 1),
            {},
            "layers/up/kernel .* different targets",
        ),
        (
            {"a": stacked(1, 2), "b": jax.tree.map(lambda x: x + 1, stacked(1, 2))},
            (1, 1),
            {},
            "layers/up/kernel .* two different bases",
        ),
    ],
)
def test_adapters_that_cannot_be_combined_are_refused_by_parameter(
    adapters, weights, options, message
):
    with pytest.raises(ValueError, match=message):
        combine_adapters(adapters, weights, CombinationConfig(**options))
