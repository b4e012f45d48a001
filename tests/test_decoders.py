"""Mistral, Qwen2, Qwen3, Gemma and Gemma 2 compute what transformers computes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import models, trees
from lorax_ft.inspection import inspect
from lorax_ft.lift import lift
from lorax_ft.methods import LoraConfig, add_lora
from lorax_ft.models.attending import Products, Seen, attend
from lorax_ft.models.decoders import FULL, SLIDING, VARIANTS
from tests.test_llama import TOLERANCE, assert_same_tokens, recorded

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models"
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma", "gemma2")
SETS = ("full", "right", "left")
INPUTS = {
    "input_ids": jnp.array([[3, 4, 5, 6, 9], [7, 8, 1, 0, 0]]),
    "attention_mask": jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
families = pytest.mark.parametrize("family", FAMILIES)


# --- Transformers' numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("which", SETS)
@families
def test_logits_are_those_of_transformers(family, which):
    directory = GOLDEN / f"{family}_causal_lm"
    model, params = models.load(directory)
    inputs, expected = recorded(directory / "io.npz", which)

    assert model.config.model_type == family
    assert_same_tokens(jax.jit(model.apply)(params, inputs), expected, inputs)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2"])
def test_with_windows_longer_than_the_text_logits_are_those_of_transformers(family):
    directory = GOLDEN / f"{family}_causal_lm"
    model, params = models.load(directory, sliding_window=64)
    inputs, expected = recorded(directory / "io.npz", "long")

    assert_same_tokens(jax.jit(model.apply)(params, inputs), expected, inputs)


@families
def test_layers_of_their_own_computed_twice_give_the_logits_of_transformers(family):
    directory = GOLDEN / f"{family}_causal_lm"
    model, params = models.load(directory, scan_layers=False, remat="full")
    inputs, expected = recorded(directory / "io.npz", "right")

    assert_same_tokens(jax.jit(model.apply)(params, inputs), expected, inputs)


@pytest.mark.parametrize("which", SETS)
def test_a_sequence_is_classified_by_its_last_token_as_in_transformers(which):
    directory = GOLDEN / "gemma2_sequence_classification"
    model, params = models.load(directory)
    inputs, expected = recorded(directory / "io.npz", which)

    np.testing.assert_allclose(jax.jit(model.apply)(params, inputs), expected, **TOLERANCE)


# --- Windows and softcaps -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 9])
def test_a_window_is_jaxs_own(window):
    query, key, value = qkv()

    ours = attend(query, key, value, Seen(is_causal=True, window=window))
    jaxs = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=(window - 1, 0)
    )

    np.testing.assert_allclose(ours, jaxs, atol=1e-6)


def test_a_small_softcap_evens_the_weights_and_a_large_one_changes_nothing():
    query, key, value = qkv()

    even = attend(query, key, value, products=Products(softcap=1e-6))
    same = attend(query, key, value, products=Products(softcap=1e6))

    mean = jnp.repeat(value.mean(axis=1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(even, jnp.broadcast_to(mean, even.shape), atol=1e-5)
    np.testing.assert_allclose(same, attend(query, key, value), atol=1e-5)


def test_a_fused_kernel_that_knows_no_softcap_is_refused():
    model = tiny("gemma2", attention="cudnn")

    with pytest.raises(ValueError, match="'cudnn' knows no softcap"):
        jax.eval_shape(model.apply, model.shapes(), INPUTS)


def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, 7, heads, 8)) for k, heads in zip(keys, (4, 2, 2))]


# --- Kernels and their adapters -------------------------------------------------------------------


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
@families
def test_every_parameter_is_used_as_its_name_says_and_all_linear_means_the_layers(family, task):
    model = tiny(family, task, tie_word_embeddings=False, remat="full")
    shapes = model.shapes()

    uses = inspect(model.apply, shapes, INPUTS)

    assert {p: u.kind for p, u in uses.items()} == {
        p: p.rpartition("/")[2] for p in trees.flatten(shapes)
    }
    head = "lm_head" if task == "causal_lm" else "score"
    assert [path for path, use in uses.items() if use.is_head] == [f"{head}/kernel"]


@families
def test_a_prompt_is_what_its_words_would_be(family):
    """In Gemma a word's vector is its row of the table, scaled; a prompt's is what it is."""
    model = tiny(family)
    params = model.init(jax.random.key(0))
    scale = 4.0 if VARIANTS[family].scales_embeddings else 1.0
    rows = scale * params["embeddings"]["word"]["embedding"][jnp.array([2, 11])]
    text = {"input_ids": jnp.array([[3, 4, 5]])}
    whole = {"input_ids": jnp.array([[2, 11, 3, 4, 5]])}

    np.testing.assert_allclose(
        jax.jit(model.apply)({**params, "prompt": {"embedding": rows}}, text),
        jax.jit(model.apply)(params, whole)[:, 2:],
        **TOLERANCE,
    )


@families
def test_fresh_adapters_on_all_linear_layers_change_nothing(family):
    model = tiny(family, scan_layers=False)
    params = model.init(jax.random.key(0))
    uses = inspect(model.apply, params, INPUTS)

    adapted = add_lora(params, LoraConfig(rank=2), jax.random.key(1), uses)

    kernels = {p for p, value in trees.flatten(adapted).items() if trees.kind(value) == "LoRA"}
    assert {path.split("/")[-2] for path in kernels} == {
        *("query", "key", "value", "output", "gate", "up", "down")
    }
    # Operation by operation: two programs that are compiled whole may round sums otherwise.
    np.testing.assert_array_equal(lift(model.apply)(adapted, INPUTS), model.apply(params, INPUTS))


# --- Configs --------------------------------------------------------------------------------------

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
QWEN2_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_HALF_B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256,
    "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
    "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "rope_scaling": None, "vocab_size": 256000,
}  # fmt: skip
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304, "intermediate_size": 9216, "model_type": "gemma2",
    "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
PUBLISHED = [
    (MISTRAL_7B, 7_241_732_096),
    (QWEN2_HALF_B, 494_032_768),
    (QWEN3_HALF_B, 596_049_920),
    (GEMMA_2B, 2_506_172_416),
    (GEMMA2_2B, 2_614_341_888),
]


@pytest.mark.parametrize(("raw", "count"), PUBLISHED, ids=FAMILIES)
def test_published_configs_are_read_whole_and_have_the_published_numbers_of_parameters(raw, count):
    model = models.build(raw)

    assert trees.count(model.shapes()).total == count
    written = model.config.to_hugging_face()
    again = models.LlamaConfig.from_hugging_face(json.loads(json.dumps(written)))
    assert again.to_hugging_face() == written


@families
def test_a_config_that_says_nothing_has_the_familys_defaults(family):
    config = models.LlamaConfig.from_hugging_face({"model_type": family})

    for name, value in VARIANTS[family].defaults.items():
        expected = None if family.startswith("qwen") and name == "sliding_window" else value
        assert getattr(config, name) == expected


def test_which_layers_slide_is_said_as_each_family_says_it():
    def windows(**raw):
        raw = {"num_hidden_layers": 4, "sliding_window": 7, **raw}
        config = models.LlamaConfig.from_hugging_face(raw)
        assert config.windows(keys=7) is None  # it hides none of so few
        if (each := config.windows(keys=100)) is None:
            return config.window
        assert config.window is None
        return [int(w) if w < 100 else None for w in each]

    assert windows(model_type="mistral") == 7
    assert windows(model_type="mistral", sliding_window=None) is None
    assert windows(model_type="gemma2") == [7, None, 7, None]
    assert windows(model_type="gemma2", layer_types=[FULL, FULL, SLIDING, FULL]) == [
        *(None, None, 7, None)
    ]
    for family in ("qwen2", "qwen3"):
        assert windows(model_type=family) is None
        switched = {"model_type": family, "use_sliding_window": True}
        assert windows(**switched, max_window_layers=3) == [None, None, None, 7]
        assert windows(**switched, layer_types=[SLIDING, FULL, FULL, FULL])[0] == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "layer_types": [FULL]}, "layer_types"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"model_type": "gemma", "hidden_activation": "relu"}, "hidden_activation"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window must be given"),
        ({"model_type": "gemma2", "layer_types": [FULL]}, "layer_types has 1 entries for 26"),
        ({"model_type": "qwen3", "layer_types": [SLIDING] * 32}, "sliding_window must be given"),
        ({"model_type": "llama", "final_logit_softcapping": 3.0}, "final_logit_softcapping"),
    ],
)
def test_a_field_that_the_family_does_not_handle_raises_with_its_name(fields, message):
    with pytest.raises(ValueError, match=message):
        models.LlamaConfig.from_hugging_face(fields)


def test_a_setting_of_another_family_raises():
    with pytest.raises(ValueError, match=r"sliding_window is 8, but is no setting of a llama"):
        models.LlamaConfig(sliding_window=8)
    with pytest.raises(ValueError, match=r"model_type must be one of .*'gemma2'.*'mixtral'"):
        models.LlamaConfig(model_type="mixtral")


def tiny(family, task="causal_lm", **fields):
    raw = {
        "model_type": family,
        "vocab_size": 20,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "initializer_range": 0.3,
    }
    if VARIANTS[family].layer_types or family == "mistral":
        raw |= {"sliding_window": 3}
    if VARIANTS[family].has_window_switch:
        raw |= {"use_sliding_window": True, "max_window_layers": 1}
    return models.build(raw, task=task, **fields)
