"""GPT-2 computes what transformers computes; its fused kernel takes PEFT's adapters as they are."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorax_ft import models, trees
from lorax_ft.inspection import inspect
from lorax_ft.interop import load_peft, save_peft
from lorax_ft.lift import lift
from lorax_ft.methods import LoraConfig, add_lora, merge
from tests.test_llama import TOLERANCE, assert_same_tokens, recorded

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models"
INPUTS = {"input_ids": jnp.array([[3, 4, 5, 6], [7, 8, 9, 0]])}


@pytest.mark.parametrize("which", ["full", "right", "left"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_tied_model_gives_the_logits_of_transformers(shared, which, scan_layers):
    directory = shared / "golden" / "gpt2"
    model, params = models.load(directory, scan_layers=scan_layers, remat="full")
    inputs, expected = recorded(directory / "io.npz", which)

    # logits of size 20, and torch's own two ways of attention differ by 7e-6 here
    logits = jax.jit(model.apply)(params, inputs)
    assert_same_tokens(logits, expected, inputs, atol=2e-5)


@pytest.mark.parametrize("which", ["full", "right", "left"])
def test_an_untied_head_of_another_width_inside_gives_the_logits_of_transformers(which):
    directory = GOLDEN / "gpt2_causal_lm"
    model, params = models.load(directory)
    inputs, expected = recorded(directory / "io.npz", which)

    assert params["lm_head"]["kernel"].shape == (32, 60)
    assert_same_tokens(jax.jit(model.apply)(params, inputs), expected, inputs)


@pytest.mark.parametrize("which", ["full", "right", "left"])
def test_a_sequence_is_classified_by_its_last_token_as_in_transformers(which):
    directory = GOLDEN / "gpt2_sequence_classification"
    model, params = models.load(directory)
    inputs, expected = recorded(directory / "io.npz", which)

    np.testing.assert_allclose(jax.jit(model.apply)(params, inputs), expected, **TOLERANCE)


def test_kernels_keep_the_orientation_that_their_files_have():
    directory = GOLDEN / "gpt2_causal_lm"
    _, params = models.load(directory, scan_layers=False)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")

    fused = params["layers_1"]["attention"]["qkv"]["kernel"]
    assert jnp.array_equal(fused, tensors["transformer.h.1.attn.c_attn.weight"])
    assert jnp.array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)


def test_names_without_a_prefix_and_buffers_of_the_first_checkpoints_are_understood(tmp_path):
    """The form of openai-community/gpt2."""
    directory = GOLDEN / "gpt2_causal_lm"
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    old["h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)
    safetensors.numpy.save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())

    _, params = models.load(tmp_path)

    assert models.fingerprint(params) == models.fingerprint(models.load(directory)[1])


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 124_439_808),
        ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 354_823_168),
        ({"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25}, 1_557_611_200),
    ],
)
def test_small_medium_and_xl_have_the_published_numbers_of_parameters(fields, count):
    model = models.build(models.Gpt2Config(**fields), task="causal_lm")

    assert trees.count(model.shapes()).total == count


@pytest.mark.parametrize(
    ("fields", "rank", "count"),
    [
        ({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, 4, 393_216),
        ({"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20}, 4, 737_280),
    ],
)
def test_lora_on_the_fused_kernel_trains_as_many_numbers_as_pefts(fields, rank, count):
    model = models.build(models.Gpt2Config(**fields), task="causal_lm")
    config = LoraConfig(targets=("qkv",), rank=rank)

    adapted = jax.eval_shape(lambda p, k: add_lora(p, config, k), model.shapes(), jax.random.key(0))

    assert trees.count(adapted).trainable == count


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_all_linear_layers_are_the_four_of_each_layer_and_no_head(task, scan_layers):
    model, params = tiny(task, scan_layers=scan_layers, tie_word_embeddings=task != "causal_lm")
    uses = inspect(model.apply, params, INPUTS)

    adapted = add_lora(params, LoraConfig(rank=2), jax.random.key(1), uses)

    names = {"attention/qkv", "attention/output", "mlp/up", "mlp/down"}
    layers = ["layers"] if scan_layers else ["layers_0", "layers_1"]
    assert {
        path for path, value in trees.flatten(adapted).items() if trees.kind(value) == "LoRA"
    } == {f"{layer}/{name}/kernel" for layer in layers for name in names}
    np.testing.assert_array_equal(
        jax.jit(lift(model.apply))(adapted, INPUTS), jax.jit(model.apply)(params, INPUTS)
    )


@pytest.mark.parametrize("adapter", ["lora", "lora_all_linear"])
def test_our_export_says_that_kernels_are_stored_in_out(shared, adapter, tmp_path):
    directory = shared / "golden" / "gpt2"
    model, base = models.load(directory)
    params, _ = load_peft(directory / "adapters" / adapter, model, base)

    save_peft(tmp_path / "adapter", model, params)

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def test_whole_modules_go_out_and_come_back_in_their_own_orientation(tmp_path):
    model, params = tiny("sequence_classification")
    config = LoraConfig(targets=("qkv",), rank=2)
    adapted = add_lora(params, config, jax.random.key(1))
    trained = (".*/mlp/down/kernel", "score/kernel")

    save_peft(tmp_path / "adapter", model, adapted, trained)

    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.transformer.h.0.mlp.c_proj.weight"].shape == (64, 16)
    assert tensors["base_model.model.score.weight"].shape == (2, 16)
    blank = jax.tree.map(jnp.zeros_like, params)
    again, patterns = load_peft(tmp_path / "adapter", model, blank, check_base=False)
    assert len(patterns) == 2
    assert jnp.array_equal(
        again["layers"]["mlp"]["down"]["kernel"], params["layers"]["mlp"]["down"]["kernel"]
    )
    assert jnp.array_equal(again["score"]["kernel"], params["score"]["kernel"])


def test_a_published_adapter_of_gpt2_is_read_whole(shared):
    """Its base is not here, so that its shapes stand for it."""
    directory = shared / "adapters" / "gpt2_lora_seqcls_deepbiolab"
    tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    classes = tensors["base_model.model.score.weight"].shape[0]
    model = models.build(models.Gpt2Config(), task="sequence_classification", num_labels=classes)

    params, trained = load_peft(directory, model, model.shapes())

    leaves = {p: v for p, v in trees.flatten(params).items() if trees.kind(v) == "LoRA"}
    assert set(leaves) == {
        f"layers/{name}/kernel" for name in ("attention/qkv", "attention/output", "mlp/down")
    }
    assert trained == ("score/kernel",)
    lora = leaves["layers/attention/qkv/kernel"]
    assert (lora.a.shape, lora.b.shape) == ((12, 8, 768), (12, 8, 2304))
    np.testing.assert_array_equal(lora.scale, np.full(12, 4.0))
    third = tensors["base_model.model.transformer.h.3.mlp.c_proj.lora_B.weight"]
    assert jnp.array_equal(leaves["layers/mlp/down/kernel"].b[3], third.T)


def test_merged_weights_give_the_adapted_logits():
    model, params = tiny("causal_lm")
    adapted = add_lora(params, LoraConfig(targets=r".*/kernel", rank=2), jax.random.key(1))
    moved = trees.map_with_path(
        lambda _, v: v.replace(b=jnp.ones_like(v.b)) if trees.kind(v) == "LoRA" else v, adapted
    )

    np.testing.assert_allclose(
        jax.jit(model.apply)(merge(moved), INPUTS),
        jax.jit(lift(model.apply))(moved, INPUTS),
        atol=1e-4,  # float32, and logits of size 10
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("activation_function", "mish"),
        ("hidden_size", 64),
    ],
)
def test_a_config_field_that_changes_the_computation_raises_with_its_name(field, value):
    with pytest.raises(ValueError, match=field):
        models.Gpt2Config.from_hugging_face({"model_type": "gpt2", field: value})


def test_config_goes_to_hugging_face_and_back():
    config = models.Gpt2Config(hidden_size=24, intermediate_size=7, eos_token_id=(1, 2))
    raw = json.loads(json.dumps(config.to_hugging_face()))

    assert (raw["n_embd"], raw["n_inner"], raw["attn_pdrop"]) == (24, 7, 0.1)
    assert models.Gpt2Config.from_hugging_face(raw) == config


def tiny(task, scan_layers=True, **fields):
    config = models.Gpt2Config(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        initializer_range=0.5,
        **fields,
    )
    model = models.build(config, task=task, scan_layers=scan_layers)
    return model, model.init(jax.random.key(0))
