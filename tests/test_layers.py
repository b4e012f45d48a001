"""Layers stacked or not, checkpointed or not, in any dtype compute the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import models, trees
from lorax_ft.inspection import inspect
from lorax_ft.models.attending import KERNELS, Products, Seen, attend
from lorax_ft.models.layers import activate, gelu
from lorax_ft.products import einsum_float32, product

CONFIGS = {
    "bert": models.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    ),
    "gpt2": models.Gpt2Config(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    ),
    "llama": models.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
        attention_dropout=0.1,
    ),
}
CONFIGS["gemma2"] = dataclasses.replace(
    CONFIGS["llama"],
    model_type="gemma2",
    sliding_window=2,
    layer_types=("sliding_attention", "full_attention"),
    query_pre_attn_scalar=6,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=5.0,
)
INPUTS = {
    "input_ids": jnp.array([[3, 4, 5, 6], [7, 8, 0, 0]]),
    "attention_mask": jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
}
families = pytest.mark.parametrize("family", CONFIGS)


def build(family, **overrides):
    return models.build(CONFIGS[family], task="sequence_classification", **overrides)


@families
def test_unrolled_layers_compute_what_stacked_ones_do(family):
    stacked, unrolled = build(family), build(family, scan_layers=False)
    params = stacked.init(jax.random.key(0))

    apart = models.unstack_layers(params)

    assert jax.tree.map(jnp.shape, apart) == jax.tree.map(lambda x: x.shape, unrolled.shapes())
    np.testing.assert_allclose(  # float32, and XLA fuses the two differently
        jax.jit(unrolled.apply)(apart, INPUTS), jax.jit(stacked.apply)(params, INPUTS), atol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, models.stack_layers(apart), params)


@pytest.mark.parametrize(
    ("family", "scan_layers", "remat"),
    [
        ("bert", True, "full"),
        ("bert", True, "dots"),
        ("llama", True, "dots_without_batch"),
        ("llama", False, "full"),
        ("gemma2", True, "full"),
        ("llama", True, "offload"),
        ("gpt2", False, "offload_dots"),
    ],
)
def test_remat_changes_no_gradient_even_with_dropout(family, scan_layers, remat):
    plain = build(family, scan_layers=scan_layers)
    checkpointed = build(family, scan_layers=scan_layers, remat=remat)
    params = plain.init(jax.random.key(0))

    def gradient(model):
        key = jax.random.key(1, impl="rbg")  # compiles in a third of threefry's time

        def loss(params):
            return jnp.square(model.apply(params, INPUTS, key)).sum()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(  # float32, computed twice in another order
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        gradient(checkpointed),
        gradient(plain),
    )


@families
def test_bfloat16_computes_nearly_the_same_and_returns_float32(family):
    model, half = build(family), build(family, dtype="bfloat16")
    params = model.init(jax.random.key(0))

    logits = jax.jit(half.apply)(params, INPUTS)

    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(half.init(jax.random.key(0)))} == {
        jnp.dtype("float32")
    }
    np.testing.assert_allclose(  # eight bits of mantissa
        logits, jax.jit(model.apply)(params, INPUTS), atol=0.05, rtol=0.05
    )


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_parameter_is_used_as_its_name_says(family, dtype):
    """So that whatever stands for a kernel need only be able to multiply."""
    model = build(family, dtype=dtype, remat="full")

    uses = inspect(model.apply, model.shapes(), INPUTS)

    assert {path: use.kind for path, use in uses.items()} == {
        path: path.rpartition("/")[2] for path in trees.flatten(model.shapes())
    }


@families
def test_parameters_can_be_kept_in_bfloat16(family):
    params = build(family, param_dtype="bfloat16").init(jax.random.key(0))

    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@families
def test_a_batch_may_hold_what_the_loss_reads_but_nothing_unknown(family):
    model = build(family)
    params = model.init(jax.random.key(0))
    labels = {"labels": jnp.array([0, 1]), "weights": jnp.ones(2)}

    assert jnp.array_equal(
        jax.jit(model.apply)(params, INPUTS | labels), jax.jit(model.apply)(params, INPUTS)
    )
    with pytest.raises(ValueError, match="attention_masks"):
        jax.jit(model.apply)(params, INPUTS | {"attention_masks": INPUTS["attention_mask"]})


@families
def test_a_row_that_is_all_padding_gives_numbers(family):
    model = build(family)
    params = model.init(jax.random.key(0))

    logits = jax.jit(model.apply)(params, INPUTS | {"attention_mask": jnp.zeros((2, 4), jnp.int32)})

    assert jnp.isfinite(logits).all()


@families
def test_inputs_beyond_the_tables_raise_on_the_host(family):
    config = CONFIGS[family]
    batch = {name: np.array(value) for name, value in INPUTS.items()}
    models.check_inputs(config, batch)

    wrong = batch["input_ids"].copy()
    wrong[1, 2] = 20
    with pytest.raises(ValueError, match=r"input_ids\[1, 2\] is 20, but must be less than 20"):
        models.check_inputs(config, batch | {"input_ids": wrong})
    with pytest.raises(ValueError, match=r"input_ids\[1, 2\] is -1"):
        models.check_inputs(config, batch | {"input_ids": np.where(wrong == 20, -1, wrong)})
    with pytest.raises(ValueError, match="position_ids"):
        models.check_inputs(config, batch | {"position_ids": np.full((2, 4), 5000)})
    short = dataclasses.replace(config, max_position_embeddings=3)
    with pytest.raises(ValueError, match="4 tokens long"):
        models.check_inputs(short, batch)


@families
def test_too_long_a_sequence_raises_when_the_model_is_traced(family):
    model = build(family, max_position_embeddings=3)

    with pytest.raises(ValueError, match="4 tokens long, but the model has positions for 3"):
        jax.eval_shape(model.apply, model.shapes(), INPUTS)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_jaxs_own(is_causal):
    query, key, value = qkv()
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)[:, None, None]

    ours = attend(query, key, value, Seen(mask=mask, is_causal=is_causal))
    jaxs = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)

    np.testing.assert_allclose(ours, jaxs, atol=1e-6)


def test_the_fused_kernel_is_asked_for_with_a_whole_mask(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **kwargs: asked.update(kwargs)
    )

    KERNELS["cudnn"].attend(
        *qkv(), Seen(mask=jnp.ones((2, 1, 1, 5), bool), is_causal=True), Products()
    )

    assert asked["mask"].shape == (2, 1, 5, 5)
    assert (asked["implementation"], asked["is_causal"]) == ("cudnn", True)
    assert asked["key_value_seq_lengths"] is None  # a mask may hide anything


def test_dropped_attention_weights_keep_their_mean():
    ones = jnp.ones((1, 64, 1, 4))

    output = attend(
        ones, ones, ones, Seen(), Products(dropout_rate=0.25, dropout_key=jax.random.key(0))
    )

    assert output.std() > 0.01
    np.testing.assert_allclose(output.mean(), 1, atol=0.03)  # 4096 weights: 0.009 a deviation


def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, 5, heads, 8)) for k, heads in zip(keys, (4, 2, 2))]


def test_float32_products_of_bfloat16_have_gradients_in_bfloat16():
    x, y = jnp.ones((3, 4), jnp.bfloat16), jnp.full((4, 5), 1.5, jnp.bfloat16)

    output, pull_back = jax.vjp(lambda x, y: einsum_float32("ab,bc->ac", x, y), x, y)
    dx, dy = pull_back(jnp.full((3, 5), 2.0))

    assert (output.dtype, dx.dtype, dy.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert (output[0, 0], dx[0, 0], dy[0, 0]) == (6, 15, 6)
    jaxpr = str(jax.make_jaxpr(pull_back)(jnp.ones((3, 5))))
    assert jaxpr.count("dot_general") == 2
    assert "f32[3,4]" not in jaxpr  # no product was computed in float32 and narrowed after


def test_product_flattens_and_gives_the_same_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 5))

    ours = jax.value_and_grad(lambda *a: jnp.sin(product(*a, jnp.float32)).sum(), (0, 1))(x, kernel)
    plain = jax.value_and_grad(lambda x, kernel: jnp.sin(x @ kernel).sum(), (0, 1))(x, kernel)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, plain)


def test_gelu_is_jaxs_exact_one():
    x = jnp.linspace(-8, 8, 1001)

    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)


@pytest.mark.parametrize("field", ["dtype", "param_dtype", "remat", "attention"])
def test_a_wrong_compute_setting_raises_with_its_name(field):
    with pytest.raises(ValueError, match=rf"ComputeConfig\.{field}.*'fast'"):
        models.ComputeConfig(**{field: "fast"})


def test_an_unknown_override_raises_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'scan_layer'.*scan_layers"):
        build("bert", scan_layer=True)


def test_a_task_that_the_family_lacks_raises():
    with pytest.raises(ValueError, match=r"causal_lm.*LlamaConfig.*'masked_lm'"):
        models.build(CONFIGS["llama"], task="masked_lm")


@pytest.mark.parametrize("name", ["silu", "gelu_new"])
def test_an_activation_in_half_precision_keeps_its_input_alone_for_gradients(name):
    x = jnp.linspace(-4, 4, 33, dtype=jnp.bfloat16)

    y, backward = jax.vjp(lambda x: activate(x, name), x)
    (gradient,) = backward(jnp.ones_like(y))

    assert [(kept.shape, kept.dtype) for kept in jax.tree.leaves(backward)] == [(x.shape, x.dtype)]
    exact = jax.vmap(jax.grad(lambda x: activate(x, name)))(x.astype(jnp.float32))
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, atol=1e-2)
