"""LLaMA computes what transformers computes, padded on either side, positions scaled or not."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import models, trees

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models"

# Float32 sums in another order; logits are of size 1 to 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def recorded(file, which):
    """(inputs, output) of one set of an io.npz."""
    arrays = {
        k.removeprefix(which + "."): v for k, v in np.load(file).items() if k[: len(which)] == which
    }
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: jnp.asarray(arrays[name], jnp.int32) for name in names if name in arrays}
    return inputs, arrays["logits"]


@pytest.mark.parametrize("which", ["full", "right", "left"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_grouped_query_attention_gives_the_logits_of_transformers(shared, which, scan_layers):
    directory = shared / "golden" / "llama_gqa"
    model, params = models.load(directory, scan_layers=scan_layers)
    inputs, expected = recorded(directory / "io.npz", which)

    assert_same_tokens(jax.jit(model.apply)(params, inputs), expected, inputs)


@pytest.mark.parametrize("which", ["full", "right", "left"])
@pytest.mark.parametrize("name", ["llama_llama3", "llama_linear"])
def test_scaled_rotary_positions_give_the_logits_of_transformers(name, which):
    model, params = models.load(GOLDEN / name)
    inputs, expected = recorded(GOLDEN / name / "io.npz", which)

    assert_same_tokens(jax.jit(model.apply)(params, inputs), expected, inputs)


@pytest.mark.parametrize("which", ["full", "right", "left"])
def test_a_sequence_is_classified_by_its_last_token_as_in_transformers(which):
    directory = GOLDEN / "llama_sequence_classification"
    model, params = models.load(directory)
    inputs, expected = recorded(directory / "io.npz", which)

    np.testing.assert_allclose(jax.jit(model.apply)(params, inputs), expected, **TOLERANCE)


def test_stories260k_gives_the_oracles_logits_and_text(shared):
    directory = shared / "models" / "stories260K" / "hf"
    model, params = models.load(directory)
    oracle = np.load(directory / "greedy_reference.npz")
    text, expected = oracle["ids"], oracle["logits_fp32"]
    ids = np.zeros_like(text)[None]
    ids[0, 0] = text[0]
    step = jax.jit(lambda ids, i: model.apply(params, {"input_ids": ids})[0, i])

    logits = []
    for i in range(len(text)):  # no cache: what comes later is not seen
        logits.append(np.asarray(step(ids, i)))
        if i + 1 < len(text):
            ids[0, i + 1] = logits[-1].argmax()

    assert np.array_equal(ids[0], text)
    np.testing.assert_allclose(np.stack(logits), expected, atol=1e-4, rtol=0)


def test_later_tokens_change_no_earlier_one():
    model = tiny("causal_lm")
    params = model.init(jax.random.key(0))

    first = jax.jit(model.apply)(params, {"input_ids": jnp.array([[3, 4, 5, 6]])})
    second = jax.jit(model.apply)(params, {"input_ids": jnp.array([[3, 4, 9, 9]])})

    np.testing.assert_allclose(first[:, :2], second[:, :2], **TOLERANCE)


def test_without_a_padding_id_the_mask_says_which_token_is_last():
    model = tiny("sequence_classification")
    params = model.init(jax.random.key(0))
    ids = jnp.array([[3, 4, 5, 0, 0]])

    padded = jax.jit(model.apply)(
        params, {"input_ids": ids, "attention_mask": jnp.array([[1, 1, 1, 0, 0]])}
    )

    np.testing.assert_allclose(
        padded, jax.jit(model.apply)(params, {"input_ids": ids[:, :3]}), **TOLERANCE
    )


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 6_738_415_616),
        (
            {"vocab_size": 128_256, "num_key_value_heads": 8, "intermediate_size": 14_336},
            8_030_261_248,
        ),
        (
            {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
            | {"intermediate_size": 22_016},
            65_285_660_672,
        ),
    ],
)
def test_7b_8b_and_65b_have_the_published_numbers_of_parameters(fields, count):
    model = models.build(models.LlamaConfig(**fields), task="causal_lm")

    assert trees.count(model.shapes()).total == count


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 20000.0, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {},
    ],
)
def test_rotary_settings_before_transformers_5_read_as_those_after(old):
    config = models.LlamaConfig.from_hugging_face({"model_type": "llama", **old})
    written = config.to_hugging_face()
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}

    assert config.rotary.rope_theta == old.get("rope_theta", 10000.0)
    for raw in (new, json.loads(json.dumps(written))):
        assert models.LlamaConfig.from_hugging_face(raw).to_hugging_face() == written


def test_linear_scaling_lengthens_the_sequences_that_are_accepted():
    rotary = models.RotaryConfig(rope_type="linear", factor=2.0)
    model = tiny("causal_lm", rotary=rotary)
    params = model.init(jax.random.key(0))

    assert jax.jit(model.apply)(params, {"input_ids": jnp.ones((1, 16), jnp.int32)}).shape == (
        1,
        16,
        20,
    )
    with pytest.raises(ValueError, match=r"17 tokens long.*positions for 16"):
        jax.jit(model.apply)(params, {"input_ids": jnp.ones((1, 17), jnp.int32)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not handled"),
        ({"rope_parameters": {"rope_type": "linear", "attention_factor": 2.0}}, "attention_factor"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ],
)
def test_a_config_field_that_is_not_handled_raises_with_its_name(fields, message):
    with pytest.raises(ValueError, match=message):
        models.LlamaConfig.from_hugging_face({"model_type": "llama", **fields})


def assert_same_tokens(logits, expected, inputs, **tolerance):
    is_token = np.asarray(inputs.get("attention_mask", np.ones(expected.shape[:2]))) == 1
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(logits)[is_token], expected[is_token], **(TOLERANCE | tolerance)
    )


def tiny(task, **fields):
    config = models.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        initializer_range=0.5,
        **fields,
    )
    return models.build(config, task=task)
