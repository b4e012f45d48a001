"""Adapters that others made give the numbers that their own libraries compute with them."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_ft import trees
from lorax_ft.interop import load_loralib, load_peft, read_torch, save_peft
from lorax_ft.lift import lift
from lorax_ft.methods import AdaLoRA, as_lora, merge
from lorax_ft.models import build, hub
from lorax_ft.models.attention import halved_rows
from lorax_ft.models.hugging_face import is_turned
from lorax_ft.models.matching import tensor_names
from tests.golden import random_weights

IMPORTS = pathlib.Path(__file__).parent / "golden" / "adapters" / "imports"
BATCH = {"input_ids": random_weights.IDS, "attention_mask": random_weights.MASK}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}


@pytest.fixture(scope="module")
def expected():
    with np.load(IMPORTS / "logits.npz") as file:
        return {name: file[name] for name in file}


def base(name, **overrides):
    """A model and parameters that follow from their names."""
    model = build(random_weights.CONFIGS[name], **overrides)

    def parameter(path, shape):
        names = tensor_names(model, path, shape.shape)
        core = shape.shape if None in names else shape.shape[1:]
        turned = is_turned(model.family.tables, path)
        arrays = [random_weights.array(n, core[::-1] if turned else core) for n in names.values()]
        arrays = [array.T if turned else array for array in arrays]
        return jnp.asarray(arrays[0] if None in names else np.stack(arrays))

    return model, trees.map_with_path(parameter, model.shapes())


def logits(model, params):
    return np.asarray(jax.jit(lift(model.apply))(params, BATCH))


def check(got, want, atol=2e-5):
    """Equal at tokens; float32 sums of some hundred products in another order."""
    tokens = random_weights.MASK == 1 if got.ndim == 3 else ...
    np.testing.assert_allclose(got[tokens], want[tokens], atol=atol, rtol=1e-4)


# --- Real adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"),
    [("bert", "bert_base_lora_vykhvan"), ("gpt2", "gpt2_lora_seqcls_deepbiolab")],
)
def test_a_trained_adapter_changes_a_random_base_as_peft_does(shared, expected, name, folder):
    model, params = base(name)
    check(logits(model, params), expected[f"{name}.base"])

    adapted, trained = load_peft(shared / "adapters" / folder, model, params, allow_pickle=True)

    assert np.abs(expected[name] - expected[f"{name}.base"]).max() > 0.05
    check(logits(model, adapted), expected[name])
    check(logits(model, merge(adapted)), expected[name])
    head = "classifier" if name == "bert" else "score"
    assert {pattern.split("/")[0] for pattern in trained} == {head}


def test_a_prompt_without_a_config_is_read_with_the_callers(shared, expected):
    model, params = base("llama")
    check(logits(model, params), expected["llama.base"])
    folder = shared / "adapters" / "tinyllama_prompt_ibm"

    adapted, trained = load_peft(folder, model, params, config=PROMPT)

    check(logits(model, adapted), expected["llama"])
    assert trained == ("prompt/.*",)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_peft(folder, model, params)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["lin0"]["kernel"] + params["lin0"]["bias"][None])
    out = hidden @ params["lin1"]["kernel"] + params["lin1"]["bias"][None]
    return jax.nn.log_softmax(out, axis=-1)


@pytest.mark.parametrize("adapter", ["lora_mlp", "ia3_mlp", "ia3_no_ff_mlp"])
def test_pefts_regression_adapters_on_a_plain_function_give_their_recorded_outputs(
    shared, expected, adapter
):
    params = {
        name: {
            "kernel": jnp.asarray(expected[f"mlp.{name}.weight"].T),
            "bias": jnp.asarray(expected[f"mlp.{name}.bias"]),
        }
        for name in ("lin0", "lin1")
    }
    folder = shared / "adapters" / "hf_peft_regression" / adapter
    names = {"lin0": "lin0", "lin1": "lin1"}

    adapted, trained = load_peft(folder, names, params, allow_pickle=True)

    x = jnp.arange(90, dtype=jnp.float32).reshape(9, 10)
    np.testing.assert_allclose(
        lift(mlp)(adapted, x), read_torch(folder / "output.pt"), atol=1e-4, rtol=1e-4
    )
    np.testing.assert_allclose(mlp(merge(adapted), x), lift(mlp)(adapted, x), atol=1e-4)
    assert trained == ()


def test_a_pickle_is_read_only_when_asked_for(shared):
    model = build(random_weights.CONFIGS["bert"])
    folder = shared / "adapters" / "bert_base_lora_vykhvan"
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*allow_pickle=True"):
        load_peft(folder, model, model.shapes())


# --- AdaLoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False])
def test_adalora_whose_ranks_were_cut_gives_pefts_logits(expected, scan_layers):
    model, params = base("llama", scan_layers=scan_layers)

    adapted, trained = load_peft(IMPORTS / "adalora", model, params)

    leaves = [v for v in trees.flatten(adapted).values() if isinstance(v, AdaLoRA)]
    assert len(leaves) == (2 if scan_layers else 4)
    assert trained == ()
    check(logits(model, adapted), expected["adalora"])
    check(logits(model, merge(adapted)), expected["adalora"])


def test_adalora_goes_out_again_as_lora(expected, tmp_path):
    model, params = base("llama")
    adapted, _ = load_peft(IMPORTS / "adalora", model, params)

    save_peft(tmp_path / "lora", model, as_lora(adapted))
    again, _ = load_peft(tmp_path / "lora", model, params)

    check(logits(model, again), expected["adalora"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [True] * 4}, "rank of 4"),
        ("init_r", 5, "E are"),
        ("use_rslora", True, "use_rslora = True may change the maths"),
    ],
)
def test_adalora_that_does_not_fit_its_config_is_named(tmp_path, field, value, message):
    model, params = base("llama")
    folder = tmp_path / "adalora"
    shutil.copytree(IMPORTS / "adalora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if field == "init_r":
        config["rank_pattern"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=message):
        load_peft(folder, model, params)


# --- loralib --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False])
def test_loralib_with_merged_linear_gives_its_logits(expected, scan_layers):
    model, params = base("gpt2_tiny", scan_layers=scan_layers)

    adapted, trained = load_loralib(
        IMPORTS / "loralib.bin",
        model,
        params,
        alpha=6,
        enabled=(True, False, True),
        allow_pickle=True,
    )

    check(logits(model, adapted), expected["loralib"])
    check(logits(model, merge(adapted)), expected["loralib"])
    assert len(trained) == (2 if scan_layers else 4)  # the biases of what is adapted


def test_what_a_loralib_checkpoint_leaves_open_is_asked_for(tmp_path):
    model, params = base("gpt2_tiny")
    path = IMPORTS / "loralib.bin"
    with pytest.raises(ValueError, match=r"allow_pickle=True reads the tensors"):
        load_loralib(path, model, params, alpha=6)
    with pytest.raises(ValueError, match=r"c_attn has lora_A .*enabled=\(True, False, True\)"):
        load_loralib(path, model, params, alpha=6, allow_pickle=True)
    with pytest.raises(ValueError, match=r"do not fit 1 parts of 3"):
        load_loralib(path, model, params, alpha=6, enabled=(True, False, False), allow_pickle=True)
    save_file({"transformer.h.0.attn.c_proj.lora_A": np.zeros((2, 16))}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"c_proj has only lora_A"):
        load_loralib(tmp_path / "a.safetensors", model, params, alpha=6)
    save_file({"transformer.h.0.attn.c_proj.bias": np.zeros(16)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"holds no lora_A and lora_B"):
        load_loralib(tmp_path / "b.safetensors", model, params, alpha=6)


# --- Orientation and order ------------------------------------------------------------------------


def test_fan_in_fan_out_that_denies_gpt2s_orientation_is_read_right_with_a_warning(
    shared, tmp_path, caplog
):
    model, params = hub.load(shared / "golden" / "gpt2")
    source = shared / "golden" / "gpt2" / "adapters" / "lora"
    right, _ = load_peft(source, model, params)
    assert caplog.text == ""
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text()) | {"fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    found, _ = load_peft(folder, model, params)

    assert "fan_in_fan_out is false" in caplog.text
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(right)))


def interleaved(rows, head_dim):
    """The inverse of `halved_rows`."""
    order = halved_rows(np.arange(rows.shape[0]), head_dim)
    return rows[np.argsort(order)]


def test_an_adapter_made_on_metas_order_of_queries_and_keys_is_read_when_asked(shared, tmp_path):
    model, params = hub.load(shared / "golden" / "llama_gqa")
    source = shared / "golden" / "llama_gqa" / "adapters" / "lora_all_linear"
    right, _ = load_peft(source, model, params)
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copyfile(source / "adapter_config.json", folder / "adapter_config.json")
    size = model.config.size_of_head
    tensors = {
        name: interleaved(tensor, size)
        if name.endswith(("q_proj.lora_B.weight", "k_proj.lora_B.weight"))
        else tensor
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")

    wrong, _ = load_peft(folder, model, params)
    found, _ = load_peft(folder, model, params, interleaved_rotary=True)

    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(right)))
    assert not all(map(np.array_equal, jax.tree.leaves(wrong), jax.tree.leaves(right)))
    bert, _ = base("bert")
    with pytest.raises(ValueError, match="interleaved_rotary is for models with rotary"):
        load_peft(folder, bert, {}, interleaved_rotary=True)


def test_a_prefix_made_on_metas_order_has_its_keys_reordered_and_not_its_values(tmp_path):
    model, params = base("llama")
    layers, size = model.config.num_hidden_layers, model.config.size_of_head
    pieces = np.random.default_rng(0).standard_normal((layers, 2, 3, 32), np.float32)
    mixed = pieces.copy()
    mixed[:, 0] = np.moveaxis(interleaved(np.moveaxis(pieces[:, 0], -1, 0), size), 0, -1)
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    flat = np.ascontiguousarray(mixed.transpose(2, 0, 1, 3).reshape(3, -1))
    save_file({"prompt_embeddings": flat}, tmp_path / "adapter_model.safetensors")

    found, _ = load_peft(tmp_path, model, params, config=config, interleaved_rotary=True)

    np.testing.assert_array_equal(found["prefix"]["key"], pieces[:, 0])
    np.testing.assert_array_equal(found["prefix"]["value"], pieces[:, 1])


def test_weights_in_metas_order_are_read_when_asked(shared, tmp_path):
    """stories260K once more: Meta's order in its own file, Hugging Face's in the directory."""
    folder = shared / "models" / "stories260K"
    model, params = hub.load(folder / "hf")
    config, size = model.config, model.config.size_of_head
    numbers = np.fromfile(folder / "stories260K.bin", np.float32)[7:]
    d, layers = config.hidden_size, config.num_hidden_layers
    start = config.vocab_size * d + layers * d  # word vectors and the norms before attention
    query = numbers[start : start + layers * d * d].reshape(layers, d, d)
    for layer in range(layers):
        kernel = params["layers"]["attention"]["query"]["kernel"][layer]
        np.testing.assert_array_equal(halved_rows(query[layer], size).T, kernel)

    shutil.copytree(folder / "hf", tmp_path / "meta", copy_function=shutil.copyfile)
    path = tmp_path / "meta" / "model.safetensors"
    tensors = {
        name: interleaved(tensor, size)
        if name.endswith(("q_proj.weight", "k_proj.weight"))
        else tensor
        for name, tensor in load_file(path).items()
    }
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    _, found = hub.load(tmp_path / "meta", interleaved_rotary=True)
    assert hub.fingerprint(found) == hub.fingerprint(params)
