"""bitsandbytes' four-bit checkpoints go in and out: no code is changed and nothing dequantised."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_ft import trees
from lorax_ft.lift import lift
from lorax_ft.methods import LoraConfig, add_lora
from lorax_ft.models import BertConfig, Gpt2Config, LlamaConfig, build, hub
from lorax_ft.quantization import NF4, QuantizationConfig, quantize

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}
SIZES |= {"max_position_embeddings": 16}
MODELS = {
    "bert": (BertConfig(**SIZES, intermediate_size=96), "sequence_classification"),
    "gpt2": (Gpt2Config(**SIZES), "causal_lm"),
    "llama": (
        LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=1),
        "causal_lm",
    ),
}
KINDS = {
    "nf4": QuantizationConfig(),
    "plain_nf4": QuantizationConfig(double_quantization=False),
    "fp4": QuantizationConfig(kind="fp4", block_size=128),  # 64 inputs: blocks over flat weights
    "bfloat16": QuantizationConfig(dtype="bfloat16"),
}
BATCH = {"input_ids": np.array([[3, 4, 5, 6], [7, 8, 9, 2]], np.int32)}


def quantized(name, kind="nf4", **options):
    config, task = MODELS[name]
    model = build(config, task=task, **options)
    return model, quantize(model.init(jax.random.key(0)), KINDS[kind])


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"), [(n, "nf4") for n in MODELS] + [("llama", k) for k in KINDS]
)
def test_what_goes_out_comes_in_again_to_the_bit(tmp_path, name, kind, scan_layers):
    model, params = quantized(name, kind, scan_layers=scan_layers)

    hub.save(tmp_path / "out", model, params)
    again, found = hub.load(tmp_path / "out", scan_layers=scan_layers)

    assert hub.fingerprint(found) == hub.fingerprint(params)
    if kind == "bfloat16":  # a kernel's dtype is that of the parameters, as in any checkpoint
        return
    assert again.config.to_hugging_face() == model.config.to_hugging_face()
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(params)))
    np.testing.assert_array_equal(lift(again.apply)(found, BATCH), lift(model.apply)(params, BATCH))


def test_a_directory_holds_what_bitsandbytes_writes(tmp_path):
    model, params = quantized("gpt2")

    hub.save(tmp_path / "out", model, params)

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    weight = "transformer.h.1.attn.c_attn.weight"
    found = {n.removeprefix(weight): t for n, t in tensors.items() if n.startswith(weight)}
    assert {name: (t.shape, str(t.dtype)) for name, t in found.items() if "state" not in name} == {
        "": ((64 * 192 // 2, 1), "uint8"),
        ".absmax": ((192,), "uint8"),
        ".quant_map": ((16,), "float32"),
        ".nested_absmax": ((1,), "float32"),
        ".nested_quant_map": ((256,), "float32"),
    }
    state = json.loads(found[".quant_state.bitsandbytes__nf4"].tobytes())
    assert (state["shape"], state["blocksize"], state["dtype"]) == ([192, 64], 64, "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    sizes = sum(t.nbytes for t in tensors.values())
    assert sizes < 0.5 * sum(4 * v.size for v in trees.flatten(params).values())


def test_kernels_that_stay_floats_are_named_to_transformers(tmp_path):
    model, params = quantized("bert")
    hub.save(tmp_path / "out", model, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == [
        "bert.pooler.dense",
        "classifier",
        "cls.predictions.decoder",
    ]


def test_shards_and_adapters_and_transforms_go_round_four_bit_weights(tmp_path):
    model, params = quantized("llama")
    hub.save(tmp_path / "out", model, params, max_shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    seen = []

    _, found = hub.load(
        tmp_path / "out", transform=lambda path, array: (seen.append(path), array)[1]
    )

    assert hub.fingerprint(found) == hub.fingerprint(params)
    assert "norm/scale" in seen
    assert not any(path.endswith("attention/query/kernel") for path in seen)
    adapted = add_lora(found, LoraConfig(targets=("query",)), jax.random.key(1))
    assert isinstance(trees.flatten(adapted)["layers/attention/query/kernel"].base, NF4)
    with pytest.raises(ValueError, match=r"query/kernel is a LoRA leaf.*merge adapters"):
        hub.save(tmp_path / "adapted", model, adapted)
    assert not (tmp_path / "adapted").exists()


def test_layers_of_which_some_are_in_four_bits_are_read_one_by_one(tmp_path):
    config, task = MODELS["llama"]
    model = build(config, task=task, scan_layers=False)
    params = quantize(
        model.init(jax.random.key(0)), QuantizationConfig(targets=r"layers_1/.*kernel")
    )
    hub.save(tmp_path / "out", model, params)

    _, found = hub.load(tmp_path / "out", scan_layers=False)

    assert hub.fingerprint(found) == hub.fingerprint(params)
    with pytest.raises(ValueError, match=r"not all kept alike.*scan_layers=False"):
        hub.load(tmp_path / "out", scan_layers=True)


def test_two_kinds_in_one_checkpoint_are_refused(tmp_path):
    config, task = MODELS["llama"]
    model = build(config, task=task)
    params = quantize(
        model.init(jax.random.key(0)), QuantizationConfig(targets=r".*attention/.*kernel")
    )
    params = quantize(params, QuantizationConfig(kind="fp4", targets=r".*mlp/.*kernel"))
    with pytest.raises(ValueError, match=r"one kind of four-bit weights.*FP4.*NF4"):
        hub.save(tmp_path / "out", model, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method = 'gptq'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit = False"),
        ({"sparsity": 0.5}, "quantization_config has sparsity = 0.5"),
    ],
)
def test_another_quantisation_is_refused_by_name(tmp_path, change, message):
    model, params = quantized("llama")
    hub.save(tmp_path / "out", model, params)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, w: t.pop(f"{w}.absmax"), r"q_proj.weight'.*missing are \['weight\.absmax'\]"),
        (lambda t, w: t.update({f"{w}.quant_map": t[f"{w}.quant_map"] + 1}), "own table"),
        (
            lambda t, w: t.update({f"{w}.other": t[f"{w}.absmax"]}),
            r"q_proj.weight'.*unknown are \['weight\.other'\]",
        ),
        (lambda t, w: t.pop(w), r"lacks 1 tensors that the model needs: .*q_proj\.weight"),
        (lambda t, w: t.update({w: t[w][:-8]}), r"q_proj.weight"),
    ],
)
def test_a_part_that_is_missing_or_does_not_fit_is_named(tmp_path, change, message):
    model, params = quantized("llama")
    hub.save(tmp_path / "out", model, params)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    change(tensors, "model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path / "out")


def test_a_kernels_dtype_is_that_of_the_parameters(tmp_path):
    model, params = quantized("llama")
    hub.save(tmp_path / "out", model, params)
    _, found = hub.load(tmp_path / "out", param_dtype="bfloat16")
    assert {value.dtype for value in trees.flatten(found).values()} == {jnp.dtype("bfloat16")}
