"""T5 computes what transformers computes; its halves, its heads and its names."""

import functools
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
from lorax_ft.models.relative_positions import position_buckets
from tests.test_llama import TOLERANCE

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models"
CASES = ("t5_seq2seq_lm", "t5_gated_seq2seq_lm")
SETS = ("full", "right", "left")
INPUTS = {
    "input_ids": jnp.array([[3, 4, 5, 6, 9], [7, 8, 1, 0, 0]]),
    "attention_mask": jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "decoder_input_ids": jnp.array([[0, 4, 5], [0, 8, 1]]),
}


def recorded(directory, which):
    """(inputs, output, which places of the output are tokens) of one set of an io.npz."""
    with np.load(directory / "io.npz") as file:
        arrays = {k.partition(".")[2]: v for k, v in file.items() if k.split(".")[0] == which}
    output = arrays.pop("logits")
    masks = (arrays.get("decoder_attention_mask"), arrays.get("attention_mask"))
    mask = next((m for m in masks if m is not None), np.ones(output.shape[:2]))
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}, output, mask


@functools.cache
def loaded(name, scan_layers=True):
    """(model, parameters, jitted apply) of a tiny random checkpoint."""
    model, params = models.load(GOLDEN / name, scan_layers=scan_layers)
    return model, params, jax.jit(lift(model.apply))


# --- Transformers' numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_padded_on_either_side(name, which):
    _, params, apply = loaded(name)
    inputs, expected, mask = recorded(GOLDEN / name, which)

    logits = apply(params, inputs)
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_layers_of_their_own_computed_twice_give_the_logits_of_transformers(name):
    model, params = models.load(GOLDEN / name, scan_layers=False, remat="full")
    inputs, expected, mask = recorded(GOLDEN / name, "right")

    logits = jax.jit(model.apply)(params, inputs)
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], **TOLERANCE)


@pytest.mark.parametrize("which", SETS)
def test_the_encoder_alone_gives_the_vectors_of_transformers_and_their_mean(which):
    _, params, apply = loaded("t5_encoder")
    inputs, expected, mask = recorded(GOLDEN / "t5_encoder", which)

    found = apply(params, inputs)
    np.testing.assert_allclose(found.hidden_states[mask == 1], expected[mask == 1], **TOLERANCE)
    means = [vectors[seen == 1].mean(axis=0) for vectors, seen in zip(expected, mask)]
    np.testing.assert_allclose(found.pooled, np.stack(means), **TOLERANCE)


@pytest.mark.parametrize("is_causal", [True, False])
def test_buckets_are_single_distances_first_then_ever_wider_ones(is_causal):
    distance = jnp.array([0, -1, -7, -8, -11, -12, -15, -16, -127, -128, -999, 1, 7, 8, 16, 128])
    found = position_buckets(distance, 32, 128, is_causal=is_causal).tolist()
    if is_causal:
        near, far = [0, 1, 7, 8, 11, 12, 15, 16, 31, 31, 31], [0] * 5
    else:
        near, far = [0, 1, 7, 8, 8, 9, 9, 10, 15, 15, 15], [17, 23, 24, 26, 31]
    assert found == near + far


# --- The two halves -------------------------------------------------------------------------------


def test_later_target_tokens_change_no_earlier_logits_and_padding_none():
    _, params, apply = loaded("t5_seq2seq_lm")
    ids = INPUTS["input_ids"]

    logits = apply(params, INPUTS)
    other = INPUTS["decoder_input_ids"].at[:, 2].set(7)
    changed = apply(params, {**INPUTS, "decoder_input_ids": other})
    padded = apply(params, {**INPUTS, "input_ids": ids.at[1, 3:].set(9)})

    np.testing.assert_allclose(changed[:, :2], logits[:, :2], **TOLERANCE)
    assert np.abs(changed[:, 2] - logits[:, 2]).max() > 1e-3
    np.testing.assert_allclose(padded, logits, **TOLERANCE)


def test_a_batch_without_decoder_input_ids_raises_with_their_name():
    model, _, _ = loaded("t5_seq2seq_lm")
    with pytest.raises(ValueError, match=r"decoder_input_ids is missing.*shift_right"):
        jax.eval_shape(model.apply, model.shapes(), {"input_ids": INPUTS["input_ids"]})


def test_ids_beyond_the_vocabulary_are_refused_in_both_halves():
    config = loaded("t5_seq2seq_lm")[0].config
    models.check_inputs(config, INPUTS)
    with pytest.raises(ValueError, match=r"decoder_input_ids\[1, 0\] is 60, but must be less"):
        models.check_inputs(config, {**INPUTS, "decoder_input_ids": np.array([[0], [60]])})


def test_there_are_no_classes_to_tell_apart():
    with pytest.raises(ValueError, match="num_labels = 3: a T5Config has no classes"):
        models.build({"model_type": "t5"}, task="seq2seq_lm", num_labels=3)


# --- Parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scan_layers"), [(CASES[0], False), (CASES[1], True)])
def test_every_parameter_is_used_as_its_name_says_and_all_linear_means_the_layers(
    name, scan_layers
):
    model, params, apply = loaded(name, scan_layers)
    is_gated = model.config.is_gated

    uses = inspect(model.apply, params, INPUTS)
    adapted = add_lora(params, LoraConfig(rank=2), jax.random.key(1), uses)

    assert {p: u.kind for p, u in uses.items()} == {p: p.rpartition("/")[2] for p in uses}
    heads = ["lm_head/kernel"] if is_gated else []
    assert [path for path, use in uses.items() if use.is_head] == heads
    assert uses["embeddings/word/embedding"].tied != is_gated
    loras = {p for p, v in trees.flatten(adapted).items() if trees.kind(v) == "LoRA"}
    assert loras == {p for p in uses if p.endswith("kernel")} - set(heads)
    np.testing.assert_array_equal(apply(adapted, INPUTS), apply(params, INPUTS))


def test_stacked_layers_become_each_layers_own_and_again_stacked():
    _, params, _ = loaded("t5_seq2seq_lm")
    own = models.unstack_layers(params)

    assert set(trees.flatten(own)) == set(trees.flatten(loaded("t5_seq2seq_lm", False)[1]))
    again = models.stack_layers(own)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))
    assert models.fingerprint(own) == models.fingerprint(params)


@pytest.mark.parametrize("name", [*CASES, "t5_encoder"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_saved_model_has_the_tensors_and_the_config_that_it_was_read_from(
    name, scan_layers, tmp_path
):
    model, params = models.load(GOLDEN / name, scan_layers=scan_layers)

    models.save(tmp_path / "saved", model, params)

    source, saved = (
        safetensors.numpy.load_file(directory / "model.safetensors")
        for directory in (GOLDEN / name, tmp_path / "saved")
    )
    assert set(saved) == set(source)
    assert all(np.array_equal(saved[key], source[key]) for key in source)
    again, _ = models.load(tmp_path / "saved", scan_layers=scan_layers)
    assert again == model


def test_a_whole_model_is_read_as_its_encoder_and_nothing_is_missed():
    whole, params, _ = loaded("t5_gated_seq2seq_lm")
    model, alone = models.load(GOLDEN / "t5_gated_seq2seq_lm", task="encoder")

    assert set(alone) == {"embeddings", "encoder"}
    encode = jax.jit(functools.partial(whole.module.apply, method="encode"))
    x = encode({"params": params}, INPUTS["input_ids"])
    found = jax.jit(model.apply)(alone, {"input_ids": INPUTS["input_ids"]})
    np.testing.assert_allclose(found.hidden_states, x, **TOLERANCE)


def spoiled(directory, target, tensors=lambda t: t, **fields):
    config = json.loads((directory / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    loaded = safetensors.numpy.load_file(directory / "model.safetensors")
    safetensors.numpy.save_file(tensors(loaded), target / "model.safetensors")
    return target


def test_repetitions_and_the_unused_table_of_the_first_releases_are_understood(tmp_path):
    source, unused = GOLDEN / "t5_seq2seq_lm", "EncDecAttention.relative_attention_bias.weight"
    bias = f"decoder.block.0.layer.1.{unused}"

    def repeated(tensors):
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        more = dict.fromkeys(names, tensors["shared.weight"])
        return {**tensors, **more, bias: np.zeros((8, 4), np.float32)}

    _, params = models.load(spoiled(source, tmp_path, repeated))

    assert models.fingerprint(params) == models.fingerprint(models.load(source)[1])


def test_a_head_that_differs_from_the_words_is_its_own_as_in_transformers_5(tmp_path):
    """Which writes that the two are tied, whatever they are."""
    source = GOLDEN / "t5_seq2seq_lm"

    def with_head(tensors):
        return {**tensors, "lm_head.weight": 2 * tensors["shared.weight"]}

    model, params = models.load(spoiled(source, tmp_path, with_head))
    _, tied_params, tied_apply = loaded("t5_seq2seq_lm")

    assert not model.config.tie_word_embeddings
    twice = 2 * tied_apply(tied_params, INPUTS)
    np.testing.assert_allclose(jax.jit(model.apply)(params, INPUTS), twice, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda t: {**t, "encoder.embed_tokens.weight": t["shared.weight"] + 1}, {}, "is not the"),
        (lambda t: t, {"num_decoder_layers": 2}, r"tensors that nothing reads .*decoder\.block\.2"),
        (lambda t: t, {"tie_word_embeddings": False}, r"lacks 1 tensors .*lm_head\.weight"),
        (lambda t: t, {"d_ff": 25}, r"wo\.weight' has shape \[32, 24\].*\[32, 25\]"),
    ],
)
def test_a_checkpoint_that_is_not_the_configs_raises_with_the_tensors_name(
    change, fields, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        models.load(spoiled(GOLDEN / "t5_seq2seq_lm", tmp_path, change, **fields))


# --- Configs --------------------------------------------------------------------------------------

T5_SMALL = {
    "architectures": ["T5WithLMHeadModel"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
    "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0,
    "relative_attention_num_buckets": 32, "task_specific_params": {}, "vocab_size": 32128,
}  # fmt: skip
FLAN_BASE = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 768,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_decoder_layers": 12,
    "num_heads": 12, "num_layers": 12, "output_past": True, "pad_token_id": 0,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "transformers_version": "4.23.1", "use_cache": True,
    "vocab_size": 32128,
}  # fmt: skip
XXL = {**FLAN_BASE, "d_ff": 10240, "d_model": 4096, "num_heads": 64, "num_layers": 24}
XXL = {**XXL, "num_decoder_layers": 24}


@pytest.mark.parametrize(
    ("raw", "count"),
    [(T5_SMALL, 60_506_624), (FLAN_BASE, 247_577_856), (XXL, 11_135_332_352)],
    ids=["small", "flan-base", "xxl"],
)
def test_published_configs_are_read_whole_and_have_the_published_numbers_of_parameters(raw, count):
    model = models.build(raw)

    assert (model.task, trees.count(model.shapes()).total) == ("seq2seq_lm", count)
    written = json.loads(json.dumps(model.config.to_hugging_face()))
    again = models.T5Config.from_hugging_face(written)
    assert again == models.T5Config.from_hugging_face(again.to_hugging_face())
    assert again.scale_decoder_outputs == raw.get("tie_word_embeddings", True)


def test_what_the_feed_forward_net_is_has_two_ways_to_be_said():
    def read(**raw):
        config = models.T5Config.from_hugging_face({"model_type": "t5", **raw})
        return config.hidden_act, config.is_gated, config.to_hugging_face()["feed_forward_proj"]

    assert read() == ("relu", False, "relu")
    assert read(feed_forward_proj="gated-gelu") == ("gelu_new", True, "gated-gelu")
    assert read(feed_forward_proj="gated-silu") == ("silu", True, "gated-silu")
    named = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True}
    assert read(**named)[:2] == ("gelu", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feed_forward_proj": "glu-gelu"}, "feed_forward_proj = 'glu-gelu'"),
        ({"feed_forward_proj": "mish"}, "hidden_act .*got 'mish'"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets must be even"),
        ({"relative_attention_max_distance": 16}, r"relative_attention_max_distance \(16\)"),
        ({"is_decoder": True}, "is_decoder"),
        ({"scalable_attention": True}, "scalable_attention"),
    ],
)
def test_a_field_that_is_not_handled_raises_with_its_name(fields, message):
    with pytest.raises(ValueError, match=message):
        models.T5Config.from_hugging_face({"model_type": "t5", **fields})


def test_shifted_labels_start_with_the_start_and_have_no_ignored_label():
    labels = jnp.array([[7, 8, 1, -100, -100], [9, -100, 3, 4, 5]])
    shifted = models.shift_right(labels, start=2, padding=0)
    assert shifted.tolist() == [[2, 7, 8, 1, 0], [2, 9, 0, 3, 4]]
