"""RoBERTa and DistilBERT compute what transformers computes, and share BERT's layers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorax_ft import models, trees
from lorax_ft.inspection import inspect
from lorax_ft.lift import lift
from lorax_ft.methods import LoraConfig, add_lora
from tests.test_bert import TOLERANCE, recorded

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models"
FAMILIES = ("roberta", "distilbert")
TASKS = ("masked_lm", "sequence_classification", "token_classification")
INPUTS = {
    "input_ids": jnp.array([[3, 4, 5, 6], [7, 8, 1, 1]]),
    "attention_mask": jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("which", ["full", "right", "left"])
@pytest.mark.parametrize("task", TASKS)
@families
def test_logits_are_those_of_transformers(family, task, which):
    assert_golden(f"{family}_{task}", which)


def test_given_positions_are_used_where_the_family_counts_its_own():
    assert_golden("roberta_masked_lm", "placed")


@families
def test_layers_of_their_own_computed_twice_give_the_logits_of_transformers(family):
    assert_golden(f"{family}_masked_lm", "right", scan_layers=False, remat="full")


def assert_golden(name, which, **overrides):
    model, params = models.load(GOLDEN / name, **overrides)
    inputs, expected = recorded(GOLDEN / name / "io.npz", which)

    logits = jax.jit(model.apply)(params, inputs)

    is_token = np.asarray(inputs.get("attention_mask", np.ones(inputs["input_ids"].shape))) == 1
    chosen = is_token if expected.ndim == 3 else ...
    assert f"{model.config.model_type}_{model.task}" == name
    np.testing.assert_allclose(np.asarray(logits)[chosen], expected[chosen], **TOLERANCE)


# --- Positions and token types --------------------------------------------------------------------


def test_positions_start_after_the_padding_id_and_leave_padding_out():
    model = tiny("roberta", "encoder")
    params = model.init(jax.random.key(0))
    ids = jnp.array([[1, 1, 5, 6, 1, 7]])
    counted = {"input_ids": ids, "position_ids": jnp.array([[1, 1, 2, 3, 1, 4]])}

    ours = jax.jit(model.apply)(params, {"input_ids": ids})

    assert jnp.array_equal(ours.hidden_states, jax.jit(model.apply)(params, counted).hidden_states)


def test_sequences_may_be_as_long_as_positions_are_left_after_the_padding_id():
    model = tiny("roberta", "encoder")  # 12 positions, of which 0 and 1 are for padding

    assert model.config.max_length == 10
    jax.eval_shape(model.apply, model.shapes(), {"input_ids": jnp.ones((1, 10), jnp.int32)})
    with pytest.raises(ValueError, match="11 tokens long, but the model has positions for 10"):
        jax.eval_shape(model.apply, model.shapes(), {"input_ids": jnp.ones((1, 11), jnp.int32)})
    last = np.array([[11]])
    models.check_inputs(model.config, {"input_ids": last, "position_ids": last})
    with pytest.raises(ValueError, match="position_ids"):
        models.check_inputs(model.config, {"input_ids": last, "position_ids": last + 1})


def test_token_types_are_left_unread_where_the_family_has_none():
    model = tiny("distilbert", "encoder")
    params = model.init(jax.random.key(0))
    typed = INPUTS | {"token_type_ids": jnp.array([[0, 0, 1, 1], [0, 1, 0, 0]])}

    assert "embeddings/token_type/embedding" not in trees.flatten(params)
    assert jnp.array_equal(
        jax.jit(model.apply)(params, typed).pooled, jax.jit(model.apply)(params, INPUTS).pooled
    )


# --- Heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["encoder", *TASKS])
@families
def test_every_parameter_is_used_as_its_name_says(family, task):
    model = tiny(family, task, remat="full")

    uses = inspect(model.apply, model.shapes(), INPUTS)

    kinds = {path: use.kind for path, use in uses.items()}
    assert {k: v for k, v in kinds.items() if v != "unused"} == {
        path: path.rpartition("/")[2] for path in kinds
    }


@families
def test_fresh_adapters_on_all_linear_layers_change_nothing(family):
    model = tiny(family, "token_classification")
    params = model.init(jax.random.key(0))
    uses = inspect(model.apply, params, INPUTS)

    adapted = add_lora(params, LoraConfig(rank=2), jax.random.key(1), uses)

    kinds = {path: trees.kind(value) for path, value in trees.flatten(adapted).items()}
    names = ("attention/query", "attention/key", "attention/value", "attention/output")
    assert {path for path, kind in kinds.items() if kind == "LoRA"} == {
        f"layers/{name}/kernel" for name in (*names, "mlp/up", "mlp/down")
    }
    np.testing.assert_array_equal(
        jax.jit(lift(model.apply))(adapted, INPUTS), jax.jit(model.apply)(params, INPUTS)
    )


@families
def test_a_new_classifier_is_put_on_a_checkpoint_of_masked_words(family, caplog):
    _, params = models.load(
        GOLDEN / f"{family}_masked_lm",
        task="sequence_classification",
        num_labels=4,
        key=jax.random.key(0),
    )

    heads = {path for path in trees.flatten(params) if not path.startswith(("emb", "lay"))}
    names = {"roberta": ("classifier/dense", "classifier/projection")}
    names = names.get(family, ("classifier", "pooler"))
    assert heads == {f"{name}/{kind}" for name in names for kind in ("kernel", "bias")}
    assert all(path in caplog.text for path in heads)


def test_for_other_classes_only_the_projection_starts_anew():
    directory = GOLDEN / "roberta_sequence_classification"
    _, same = models.load(directory)

    _, other = models.load(directory, num_labels=7, key=jax.random.key(0))

    assert other["classifier"]["projection"]["kernel"].shape == (32, 7)
    jax.tree.map(
        np.testing.assert_array_equal, other["classifier"]["dense"], same["classifier"]["dense"]
    )


@families
def test_dropout_needs_a_key_and_follows_it(family):
    model = tiny(family, "sequence_classification")
    params = model.init(jax.random.key(0))
    logits = jax.jit(model.apply)

    first = logits(params, INPUTS, jax.random.key(1))
    assert jnp.array_equal(first, logits(params, INPUTS, jax.random.key(1)))
    assert not jnp.allclose(first, logits(params, INPUTS, jax.random.key(2)))


# --- Checkpoints and configs ----------------------------------------------------------------------


def test_buffers_and_repetitions_of_published_checkpoints_are_understood(tmp_path):
    """The form of FacebookAI/roberta-base."""
    directory = GOLDEN / "roberta_masked_lm"
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    words = tensors["roberta.embeddings.word_embeddings.weight"]
    tensors |= {
        "roberta.embeddings.position_ids": np.arange(24)[None],
        "lm_head.decoder.weight": words.copy(),
        "lm_head.decoder.bias": tensors["lm_head.bias"].copy(),
        "roberta.pooler.dense.weight": np.zeros((32, 32), np.float32),
        "roberta.pooler.dense.bias": np.zeros(32, np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())

    _, params = models.load(tmp_path)

    assert models.fingerprint(params) == models.fingerprint(models.load(directory)[1])


ROBERTA_BASE = {
    "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "roberta",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "type_vocab_size": 1,
    "vocab_size": 50265,
}  # fmt: skip
DISTILBERT_BASE = {
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1,
    "dim": 768, "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02,
    "max_position_embeddings": 512, "model_type": "distilbert", "n_heads": 12, "n_layers": 6,
    "pad_token_id": 0, "qa_dropout": 0.1, "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "task", "count"),
    [
        (ROBERTA_BASE, "encoder", 124_645_632),
        (ROBERTA_BASE, "sequence_classification", 124_647_170),
        (ROBERTA_BASE, "masked_lm", 124_697_433),
        (DISTILBERT_BASE, "encoder", 66_362_880),
        (DISTILBERT_BASE, "sequence_classification", 66_955_010),
        (DISTILBERT_BASE, "masked_lm", 66_985_530),
    ],
)
def test_published_configs_are_read_whole_and_have_the_published_numbers_of_parameters(
    raw, task, count
):
    model = models.build(raw, task=task)

    assert trees.count(model.shapes()).total == count
    again = json.loads(json.dumps(model.config.to_hugging_face()))
    assert models.build(again, task=task) == model


@families
def test_a_config_that_says_nothing_has_the_familys_defaults(family):
    config = models.BertConfig.from_hugging_face({"model_type": family})

    assert (config.num_hidden_layers, config.pad_token_id, config.vocab_size) == {
        "roberta": (12, 1, 50265),
        "distilbert": (6, 0, 30522),
    }[family]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "distilbert", "sinusoidal_pos_embds": True}, "sinusoidal_pos_embds"),
        ({"model_type": "distilbert", "hidden_size": 64}, "hidden_size"),
        ({"model_type": "distilbert", "layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"model_type": "roberta", "is_decoder": True}, "is_decoder"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id must be given"),
        ({"model_type": "electra"}, "model_type must be one of"),
    ],
)
def test_a_field_that_the_family_does_not_handle_raises_with_its_name(fields, message):
    with pytest.raises(ValueError, match=message):
        models.BertConfig.from_hugging_face(fields)


def test_a_setting_of_another_family_raises():
    with pytest.raises(ValueError, match="type_vocab_size is no setting of a distilbert"):
        models.BertConfig(model_type="distilbert", type_vocab_size=3)


def tiny(family, task, **compute):
    config = models.BertConfig(
        model_type=family,
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.5,
        pad_token_id=1,
    )
    return models.build(config, task=task, **compute)
