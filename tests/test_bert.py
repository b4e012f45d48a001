"""BERT computes what transformers computes, padded or not, for each of its tasks."""

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
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    inputs = {name: jnp.asarray(arrays[name], jnp.int32) for name in names if name in arrays}
    return inputs, arrays["logits"]


@pytest.mark.parametrize("which", ["full", "right"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_sequence_classification_gives_the_logits_of_transformers(shared, which, scan_layers):
    directory = shared / "golden" / "bert_seqcls"
    model, params = models.load(directory, scan_layers=scan_layers)
    inputs, expected = recorded(directory / "io.npz", which)

    assert model.task == "sequence_classification"
    np.testing.assert_allclose(jax.jit(model.apply)(params, inputs), expected, **TOLERANCE)


@pytest.mark.parametrize("which", ["full", "right", "left"])
@pytest.mark.parametrize("task", ["masked_lm", "token_classification"])
def test_logits_of_every_token_are_those_of_transformers(task, which):
    directory = GOLDEN / f"bert_{task}"
    model, params = models.load(directory)
    inputs, expected = recorded(directory / "io.npz", which)

    logits = jax.jit(model.apply)(params, inputs)

    is_token = np.asarray(inputs.get("attention_mask", np.ones(expected.shape[:2]))) == 1
    assert model.task == task
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(logits)[is_token], expected[is_token], **TOLERANCE)


def test_minilm_gives_the_vectors_of_transformers(minilm):
    model, params = models.load(minilm)
    golden = np.load(GOLDEN / "minilm.npz")
    inputs = {k: jnp.asarray(golden[k]) for k in ("input_ids", "attention_mask", "token_type_ids")}

    output = jax.jit(model.apply)(params, inputs)

    is_token = golden["attention_mask"] == 1
    np.testing.assert_allclose(
        np.asarray(output.hidden_states)[is_token], golden["hidden_states"][is_token], **TOLERANCE
    )
    np.testing.assert_allclose(output.pooled, golden["pooled"], **TOLERANCE)


def test_padding_changes_no_token():
    model = tiny("encoder")
    params = model.init(jax.random.key(0))
    ids = jnp.array([[5, 6, 7]])
    padded = {
        "input_ids": jnp.array([[5, 6, 7, 9, 9]]),
        "attention_mask": jnp.array([[1, 1, 1, 0, 0]]),
    }

    alone = jax.jit(model.apply)(params, {"input_ids": ids}).hidden_states
    beside = jax.jit(model.apply)(params, padded).hidden_states[:, :3]

    np.testing.assert_allclose(beside, alone, **TOLERANCE)


def test_dropout_needs_a_key_and_follows_it():
    model = tiny("sequence_classification", attention_probs_dropout_prob=0.5)
    params = model.init(jax.random.key(0))
    inputs = {"input_ids": jnp.array([[5, 6, 7]]), "attention_mask": jnp.array([[1, 1, 0]])}

    def logits(key):
        return jax.jit(model.apply)(params, inputs, key)

    assert jnp.array_equal(logits(None), logits(None))
    assert jnp.array_equal(logits(jax.random.key(1)), logits(jax.random.key(1)))
    assert not jnp.allclose(logits(jax.random.key(1)), logits(jax.random.key(2)))
    assert not jnp.allclose(logits(None), logits(jax.random.key(1)))


def test_the_decoder_of_masked_words_is_the_table_of_word_vectors():
    model = tiny("masked_lm")
    params = model.init(jax.random.key(0))

    assert {path for path in trees.flatten(params) if path.startswith("lm_head")} == {
        "lm_head/bias",
        "lm_head/norm/bias",
        "lm_head/norm/scale",
        "lm_head/transform/bias",
        "lm_head/transform/kernel",
    }


@pytest.mark.parametrize(
    ("fields", "task", "count"),
    [
        ({}, "encoder", 109_482_240),
        ({}, "sequence_classification", 109_483_778),
        ({}, "masked_lm", 109_514_298),
        (
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
            | {"intermediate_size": 4096},
            "encoder",
            335_141_888,
        ),
    ],
)
def test_base_and_large_have_the_published_numbers_of_parameters(fields, task, count):
    model = models.build(models.BertConfig(**fields), task=task)

    assert trees.count(model.shapes()).total == count


@pytest.mark.parametrize(
    ("config", "biases"),
    [
        ({}, 102_912),
        (
            {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
            | {"intermediate_size": 4096},
            272_384,
        ),
    ],
)
def test_biases_are_as_many_as_bitfit_trains(config, biases):
    shapes = models.build(models.BertConfig(**config), task="sequence_classification").shapes()
    of_the_encoder = {k: v for k, v in shapes.items() if k != "classifier"}

    assert trees.count(of_the_encoder, r".*/bias").trainable == biases


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("hidden_act", "mish"),
        ("tie_word_embeddings", False),
        ("problem_type", "regression"),
        ("rotary_dim", 8),
    ],
)
def test_a_config_field_that_changes_the_computation_raises_with_its_name(field, value):
    with pytest.raises(ValueError, match=field):
        models.BertConfig.from_hugging_face({"model_type": "bert", field: value})


def test_a_field_that_the_caller_vouches_for_is_ignored():
    config = models.BertConfig.from_hugging_face({"made_by": "me"}, ignore_fields=("made_by",))

    assert config == models.BertConfig()


def test_config_goes_to_hugging_face_and_back():
    config = models.BertConfig(hidden_act="gelu_new", label_names=("no", "yes", "maybe"))

    assert models.BertConfig.from_hugging_face(config.to_hugging_face()) == config


def test_a_width_that_the_heads_do_not_divide_raises():
    with pytest.raises(ValueError, match=r"hidden_size \(30\).*num_attention_heads \(4\)"):
        models.BertConfig(hidden_size=30, num_attention_heads=4)


def tiny(task, **fields):
    config = models.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        initializer_range=0.5,
        **fields,
    )
    return models.build(config, task=task)
