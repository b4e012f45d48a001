"""LoRA and DoRA: laws of the rewrite, targets, starts, ranks, dropout and counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import trees
from lorax_ft.inspection import Use, inspect
from lorax_ft.leaves import dense
from lorax_ft.lift import lift
from lorax_ft.methods import (
    DoRA,
    LoRA,
    LoraConfig,
    add_lora,
    add_methods,
    merge,
    set_dropout_key,
    unmerge,
)
from lorax_ft.methods.selection import BitFitConfig, FullConfig, HeadConfig
from lorax_ft.quantization import QuantizationConfig, quantize

KEY = jax.random.key(0)
STARTS = ["default", "gaussian", "pissa", "olora"]


def apply(params, x):
    def layer(x, p):
        return x + jnp.tanh(x @ p["query"]["kernel"] + p["query"]["bias"][None]) @ p["value"][
            "kernel"
        ], None

    x, _ = jax.lax.scan(layer, params["embedding"][jnp.arange(3)] + x, params["layers"])
    return x @ params["classifier"]["kernel"]


def base(layers=2, d=8):
    keys = jax.random.split(jax.random.key(1), 5)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape) / np.sqrt(d)
    return {
        "embedding": normal(0, 5, d),
        "layers": {
            "query": {"kernel": normal(1, layers, d, d), "bias": normal(2, layers, d)},
            "value": {"kernel": normal(3, layers, d, d)},
        },
        "classifier": {"kernel": normal(4, d, 2)},
    }


x = jax.random.normal(jax.random.key(2), (3, 8))
QUERY = ("query",)


def adapted(params=None, **options):
    params = base() if params is None else params
    return add_lora(params, LoraConfig(**{"targets": QUERY, "rank": 3, **options}), KEY)


def trained(params):
    """The params after their trainable arrays have moved, as any training moves them."""
    train, frozen = trees.partition(params)
    keys = iter(jax.random.split(jax.random.key(7), 100))
    train = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), train)
    return trees.combine(train, frozen)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dora", [False, True])
def test_every_start_is_the_identity_and_merging_keeps_the_trained_output(start, dora):
    params = adapted(initialization=start, dora=dora, alpha=6.0)
    assert isinstance(params["layers"]["query"]["kernel"], DoRA if dora else LoRA)
    np.testing.assert_allclose(lift(apply)(params, x), apply(base(), x), rtol=1e-5, atol=1e-5)
    moved = trained(params)
    difference = np.abs(lift(apply)(moved, x) - apply(base(), x)).max()
    assert difference > 1e-2
    np.testing.assert_allclose(apply(merge(moved), x), lift(apply)(moved, x), rtol=1e-5, atol=1e-5)


def test_a_default_start_leaves_the_output_bit_equal():
    chex.assert_trees_all_equal(jax.jit(lift(apply))(adapted(), x), jax.jit(apply)(base(), x))


def test_unmerging_gives_the_base_back():
    moved = trained(adapted())
    again = unmerge(merge(moved), moved)
    np.testing.assert_allclose(
        again["layers"]["query"]["kernel"].base, base()["layers"]["query"]["kernel"], atol=1e-6
    )
    with pytest.raises(ValueError, match="DoRA leaf"):
        unmerge(merge(adapted(dora=True)), adapted(dora=True))


def test_merging_a_quantised_base_gives_dequantised_weights_at_the_dtype_asked_for():
    config = QuantizationConfig(targets=".*/(query|value)/kernel", exclude=())
    moved = trained(adapted(quantize(base(d=64), config)))
    merged = merge(moved, jnp.bfloat16)
    kernel = moved["layers"]["query"]["kernel"]
    assert merged["layers"]["query"]["kernel"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(
        merged["layers"]["query"]["kernel"], kernel.dense().astype(jnp.bfloat16)
    )
    assert merged["classifier"]["kernel"].dtype == jnp.float32


def test_loftq_is_nearer_to_the_weights_than_plain_quantisation():
    params, config = base(d=64), QuantizationConfig(targets=".*/query/kernel", exclude=())
    weight = params["layers"]["query"]["kernel"]
    plain = jnp.linalg.norm(dense(quantize(params, config)["layers"]["query"]["kernel"]) - weight)
    lora = LoraConfig(targets=QUERY, rank=16, initialization="loftq", loftq_iterations=3)
    kernel = add_lora(params, lora, KEY, quantization=config)["layers"]["query"]["kernel"]
    assert trees.kind(kernel) == "LoRA(NF4)"
    assert jnp.linalg.norm(kernel.dense() - weight) < 0.8 * plain


def test_layers_and_patterns_give_each_layer_its_own_rank_and_padding_never_moves():
    params = adapted(rank_pattern={"layers_1/query": 2}, alpha_pattern={"query": 8.0}, rank=4)
    kernel = params["layers"]["query"]["kernel"]
    assert kernel.rank.tolist() == [4, 2]
    assert kernel.scale.tolist() == [2.0, 4.0]
    assert trees.count(params).trainable == (4 + 2) * 16
    train, frozen = trees.partition(trained_padding_aside(params))
    gradient = jax.grad(lambda t: jnp.sum(lift(apply)(trees.combine(t, frozen), x) ** 2))(train)
    for factor in (
        gradient["layers"]["query"]["kernel"].a,
        gradient["layers"]["query"]["kernel"].b,
    ):
        assert jnp.all(factor[1, 2:] == 0)
        assert jnp.any(factor[1, :2] != 0)


def trained_padding_aside(params):
    kernel = params["layers"]["query"]["kernel"]
    return trees.with_fields(
        params, {"layers/query/kernel": kernel.replace(b=kernel.b.at[:, :2].add(0.3))}
    )


def test_only_the_chosen_layers_get_an_adapter():
    moved = trained_padding_aside(adapted(layers=(1,)))
    merged = merge(moved)["layers"]["query"]["kernel"]
    chex.assert_trees_all_equal(merged[0], base()["layers"]["query"]["kernel"][0])
    assert jnp.any(merged[1] != base()["layers"]["query"]["kernel"][1])
    assert trees.count(moved).trainable == 3 * 16


def test_rslora_divides_by_the_root_of_the_rank():
    assert adapted(rank=4, rslora=True)["layers"]["query"]["kernel"].scale.tolist() == [8.0, 8.0]


def test_all_linear_leaves_the_head_and_the_embedding_out():
    uses = inspect(apply, base(), x)
    params = add_lora(base(), LoraConfig(), KEY, uses)
    kinds = {path: trees.kind(value) for path, value in trees.flatten(params).items()}
    assert [path for path, kind in kinds.items() if kind == "LoRA"] == [
        "layers/query/kernel",
        "layers/value/kernel",
    ]


def test_embeddings_start_with_a_zero_and_serve_as_tied_heads():
    params = {"tok": {"embedding": jax.random.normal(KEY, (7, 4))}}

    def tied(p, ids):
        return jnp.take(p["tok"]["embedding"], ids, axis=0) @ p["tok"]["embedding"].T

    ids = jnp.array([[0, 3]])
    leaf = add_lora(params, LoraConfig(targets=("tok",), rank=2), KEY)
    assert jnp.all(leaf["tok"]["embedding"].a == 0)
    moved = trained(leaf)
    np.testing.assert_allclose(
        lift(tied)(moved, ids), tied(merge(moved), ids), rtol=1e-5, atol=1e-5
    )


def test_torch_oriented_kernels_are_adapted_where_inspect_says_so():
    params = {"weight": jax.random.normal(KEY, (6, 4))}
    uses = inspect(lambda p, x: x @ p["weight"].T, params, jnp.ones((2, 4)))
    leaf = add_lora(params, LoraConfig(targets=".*", rank=2), KEY, uses)["weight"]
    assert (leaf.a.shape, leaf.b.shape, leaf.in_axes) == ((2, 4), (2, 6), (-1,))


def test_dropout_acts_only_with_a_key_and_differs_between_layers():
    params = trained(adapted(dropout=0.5))
    assert jnp.array_equal(lift(apply)(params, x), lift(apply)(set_dropout_key(params, None), x))
    keyed = [set_dropout_key(params, jax.random.key(i)) for i in (1, 1, 2)]
    outputs = [lift(apply)(p, x) for p in keyed]
    assert jnp.array_equal(outputs[0], outputs[1])
    assert not jnp.array_equal(outputs[0], outputs[2])
    kernel = keyed[0]["layers"]["query"]["kernel"]
    assert kernel.key.shape == (2,)
    assert kernel.key[0] != kernel.key[1]


def test_dropout_gradients_equal_those_of_the_masked_formula():
    leaf = jax.tree.map(lambda f: f[0], trained(adapted(dropout=0.5))["layers"]["query"]["kernel"])
    leaf = leaf.replace(key=jax.random.key(3))
    keep = jax.random.bernoulli(leaf.key, 1.0 - leaf.dropout, x.shape)

    def formula(a, b, x):
        return x @ leaf.base + leaf.scale * (jnp.where(keep, x / 0.5, 0.0) @ a.T) @ b

    def ours(a, b, x):
        return leaf.replace(a=a, b=b).linear(x)

    got, want = (
        jax.grad(lambda *v, f=f: jnp.sum(jnp.sin(f(*v))), (0, 1, 2))(leaf.a, leaf.b, x)
        for f in (ours, formula)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_states_the_gradient_of_a_float_base_and_of_the_scale():
    leaf = jax.tree.map(lambda f: f[0], trained(adapted())["layers"]["query"]["kernel"])
    got = jax.grad(lambda w, s: jnp.sum(jnp.sin(leaf.replace(base=w, scale=s).linear(x))), (0, 1))(
        leaf.base, leaf.scale
    )
    want = jax.grad(
        lambda w, s: jnp.sum(jnp.sin(x @ leaf.replace(base=w, scale=s).dense())), (0, 1)
    )(leaf.base, leaf.scale)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_bases_keep_float32_factors():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), base())
    kernel = adapted(params)["layers"]["query"]["kernel"]
    assert (kernel.base.dtype, kernel.a.dtype, kernel.dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.bfloat16,
    )


def test_keys_come_from_paths_so_another_target_changes_nothing():
    alone, beside = adapted(), adapted(targets=("query", "value"))
    chex.assert_trees_all_equal(
        alone["layers"]["query"]["kernel"].a, beside["layers"]["query"]["kernel"].a
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("quary",)}, r"no module is named 'quary'. Nearest: query"),
        ({"targets": ".*/quary/kernel"}, "matches none of the 5 parameters"),
        ({"targets": "all-linear"}, "needs to know how the model uses"),
        ({"exclude": ".*query.*"}, "leaves no parameter"),
        ({"layers": (7,)}, "leaves no layer"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"initialization": "pizza"}, "expected one of"),
        ({"initialization": "loftq"}, "needs a quantisation"),
        ({"initialization": "pissa", "rank": 9}, r"larger than layers/query/kernel allows \(8\)"),
        ({"bias": "some"}, "expected one of"),
    ],
)
def test_bad_settings_name_the_field_and_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        adapted(**options)


def test_a_second_adapter_on_one_kernel_is_refused():
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        adapted(adapted())


def test_methods_compose_and_say_which_arrays_they_train():
    configs = [LoraConfig(targets=QUERY, rank=2, bias="lora_only"), HeadConfig()]
    params, patterns = add_methods(base(), configs, KEY)
    train, _ = trees.partition(params, patterns)
    assert set(trees.flatten_arrays(train)) == {
        "layers/query/kernel/a",
        "layers/query/kernel/b",
        "layers/query/bias",
        "classifier/kernel",
    }
    _, patterns = add_methods(base(), [BitFitConfig(modules_to_save=("classifier",))], KEY)
    assert trees.count(base(), patterns).trainable == 16 + 16
    _, patterns = add_methods(base(), [FullConfig()], KEY)
    assert trees.count(base(), patterns).share == 1.0
    with pytest.raises(ValueError, match="LoRA leaf"):
        add_methods(params, [FullConfig()], KEY)
    with pytest.raises(ValueError, match="config of no method"):
        add_methods(base(), [Use(kind="kernel")], KEY)


# --- Published counts -----------------------------------------------------------------------------


def shapes(layers, kernels):
    """A tree of [layers, d_in, d_out] kernels that are only shapes."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"layers": {name: {"kernel": struct(layers, *shape)} for name, shape in kernels.items()}}


def transformer(layers, d, ffn, kv=None, gated=True):
    kv = kv or d
    mlp = {"gate": (d, ffn)} if gated else {}
    attention = {"query": (d, d), "key": (d, kv), "value": (d, kv), "output": (d, d)}
    return shapes(layers, attention | mlp | {"up": (d, ffn), "down": (ffn, d)})


LLAMA_7B = transformer(32, 4096, 11008)
ALL = tuple(LLAMA_7B["layers"])
QV = ("query", "value")


@pytest.mark.parametrize(
    ("params", "options", "count"),
    [
        (shapes(1, {"k": (1000, 1000)}), {"targets": ("k",), "rank": 4}, 8_000),
        (shapes(1, {"k": (1024, 1024)}), {"targets": ("k",), "rank": 8}, 16_384),
        *(
            (shapes(1, {"k": (4096, 4096)}), {"targets": ("k",), "rank": r}, r * 8192)
            for r in (2, 8, 16, 32)
        ),
        (transformer(12, 768, 3072, gated=False), {"targets": QV, "rank": 8}, 294_912),
        (transformer(24, 1024, 4096, gated=False), {"targets": QV, "rank": 8}, 786_432),
        (LLAMA_7B, {"targets": QV, "rank": 8}, 4_194_304),
        (LLAMA_7B, {"targets": QV, "rank": 8, "dora": True}, 4_456_448),
        (LLAMA_7B, {"targets": ALL, "rank": 16}, 39_976_960),
        (LLAMA_7B, {"targets": ALL, "rank": 64}, 159_907_840),
        (transformer(32, 4096, 14336, kv=1024), {"targets": ALL, "rank": 16}, 41_943_040),
    ],
)
def test_published_counts_of_trainable_parameters_are_exact(params, options, count):
    adapted = jax.eval_shape(lambda p: add_lora(p, LoraConfig(**options), KEY), params)
    assert trees.count(adapted).trainable == count
