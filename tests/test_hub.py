"""Weights go from and to Hugging Face directories: nothing is lost, guessed or half-written."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lorax_ft import models, trees
from lorax_ft.models import hugging_face

GOLDEN = pathlib.Path(__file__).parent / "golden" / "models"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
INPUTS = {"input_ids": jnp.array([[3, 4, 5], [6, 7, 8]])}


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a small checkpoint to spoil."""
    return pathlib.Path(shutil.copytree(GOLDEN / "llama_linear", tmp_path / "checkpoint"))


def edit_tensors(directory, edit):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


# --- There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_saving_what_was_loaded_gives_every_tensor_back(tmp_path, case, scan_layers):
    model, params = models.load(GOLDEN / case, scan_layers=scan_layers)

    models.save(tmp_path / "saved", model, params)

    original = safetensors.numpy.load_file(GOLDEN / case / "model.safetensors")
    saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(np.array_equal(saved[name], original[name]) for name in original)
    again, _ = models.load(tmp_path / "saved", scan_layers=scan_layers)
    assert (again.task, again.compute) == (model.task, model.compute)
    assert again.config.to_hugging_face() == model.config.to_hugging_face()


def test_a_bare_encoder_is_saved_without_the_prefix_of_a_headed_one(tmp_path):
    model, params = models.load(
        GOLDEN / "bert_token_classification", task="encoder", key=jax.random.key(0)
    )

    models.save(tmp_path / "saved", model, params)

    names = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "embeddings.word_embeddings.weight" in names
    assert not any(name.startswith("bert.") for name in names)
    again, same = models.load(tmp_path / "saved")
    assert again == model
    assert models.fingerprint(same) == models.fingerprint(params)


def test_shards_hold_what_one_file_holds(tmp_path):
    model, params = models.load(GOLDEN / "llama_linear")

    models.save(tmp_path / "saved", model, params, max_shard_bytes=20_000)

    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    _, same = models.load(tmp_path / "saved")
    assert models.fingerprint(same) == models.fingerprint(params)


def test_saved_in_bfloat16_is_read_in_bfloat16(tmp_path):
    model, params = models.load(GOLDEN / "llama_linear", param_dtype="bfloat16")

    models.save(tmp_path / "saved", model, params)

    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    _, same = models.load(tmp_path / "saved", param_dtype="bfloat16")
    assert config["dtype"] == "bfloat16"
    assert models.fingerprint(same) == models.fingerprint(params)


def test_fingerprint_does_not_depend_on_stacking_but_on_every_number():
    _, stacked = models.load(GOLDEN / "llama_linear")
    _, unrolled = models.load(GOLDEN / "llama_linear", scan_layers=False)
    changed = jax.tree.map(lambda x: x, unrolled)
    changed["norm"]["scale"] = changed["norm"]["scale"].at[3].add(1e-3)

    assert models.fingerprint(stacked) == models.fingerprint(unrolled)
    assert models.fingerprint(changed) != models.fingerprint(unrolled)


def test_tokenizer_files_are_copied(tmp_path, minilm):
    model, params = models.load(GOLDEN / "llama_linear")

    models.save(tmp_path / "saved", model, params, tokenizer_files_from=minilm)

    copied = (tmp_path / "saved" / "tokenizer.json").read_bytes()
    assert copied == (minilm / "tokenizer.json").read_bytes()


# --- Reading for another task ---------------------------------------------------------------------


def test_a_head_that_the_checkpoint_lacks_starts_from_the_key_and_is_reported(minilm, caplog):
    model, params = models.load(
        minilm, task="sequence_classification", num_labels=6, key=jax.random.key(0)
    )
    _, encoder = models.load(minilm)

    assert params["classifier"]["kernel"].shape == (384, 6)
    assert jnp.std(params["classifier"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    assert "classifier/bias, classifier/kernel" in caplog.text
    assert len(model.config.label_names) == 6
    assert models.fingerprint({k: v for k, v in params.items() if k != "classifier"}) == (
        models.fingerprint(encoder)
    )


def test_a_missing_head_without_a_key_raises(minilm):
    with pytest.raises(ValueError, match=r"classifier/bias, classifier/kernel.*key="):
        models.load(minilm, task="sequence_classification")


def test_another_number_of_classes_starts_the_head_anew_and_the_same_keeps_it():
    directory = GOLDEN / "bert_token_classification"

    _, same = models.load(directory, num_labels=5)
    _, other = models.load(directory, num_labels=7, key=jax.random.key(0))

    assert other["classifier"]["kernel"].shape == (32, 7)
    assert same["classifier"]["kernel"].shape == (32, 5)
    with pytest.raises(ValueError, match=r"classifier/bias, classifier/kernel.*key="):
        models.load(directory, num_labels=7)


def test_heads_of_other_tasks_are_left_unread():
    model, params = models.load(
        GOLDEN / "llama_linear", task="sequence_classification", num_labels=2, key=jax.random.key(0)
    )

    assert "lm_head" not in params
    assert model.apply(params, INPUTS).shape == (2, 2)


def test_names_of_old_checkpoints_and_their_buffers_are_understood(tmp_path):
    """The form of google-bert/bert-base-uncased: gamma, beta, a second head, and a buffer."""
    directory = pathlib.Path(shutil.copytree(GOLDEN / "bert_masked_lm", tmp_path / "old"))

    def age(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
        tensors["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
        tensors["bert.embeddings.position_ids"] = np.arange(24)[None]
        tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
        words = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.weight"] = words.copy()

    edit_tensors(directory, age)
    edit_config(directory, architectures=["BertForPreTraining"], gradient_checkpointing=False)

    _, params = models.load(directory)

    _, expected = models.load(GOLDEN / "bert_masked_lm")
    assert models.fingerprint(params) == models.fingerprint(expected)


def test_a_tied_head_that_differs_from_its_embedding_raises(tmp_path):
    directory = pathlib.Path(shutil.copytree(GOLDEN / "llama_llama3", tmp_path / "tied"))

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit_tensors(directory, untie)

    with pytest.raises(ValueError, match=r"'lm_head.weight'.*'model.embed_tokens.weight'"):
        models.load(directory)


# --- Tensor by tensor -----------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [True, False])
def test_transform_sees_one_layer_at_a_time_and_its_results_are_stacked(scan_layers):
    seen = []

    def halve(path, array):
        seen.append((path, array.shape))
        return {"half": array / 2}

    _, params = models.load(GOLDEN / "llama_linear", scan_layers=scan_layers, transform=halve)
    _, plain = models.load(GOLDEN / "llama_linear", scan_layers=scan_layers)

    path = "layers/mlp/up/kernel" if scan_layers else "layers_0/mlp/up/kernel"
    assert seen.count((path, (32, 40))) == (2 if scan_layers else 1)
    assert len(seen) == 3 + 2 * 9
    halves = {path.removesuffix("/half"): x for path, x in trees.flatten(params).items()}
    for path, array in trees.flatten(plain).items():
        assert jnp.array_equal(halves[path], array / 2)


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_module_names_are_those_of_transformers_and_can_be_inverted(case, scan_layers):
    model, params = models.load(GOLDEN / case, scan_layers=scan_layers)
    tensors = safetensors.numpy.load_file(GOLDEN / case / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in tensors}

    named = set()
    for path, array in trees.flatten(params).items():
        for layer in range(len(array)) if hugging_face.is_stacked(path) else (None,):
            name = models.hugging_face_name(model, path, layer)
            module, found = models.module_path(model, name)
            named.add(name)
            if not scan_layers and found is not None:
                module = hugging_face.in_layer(module, found)
            assert (module, found if scan_layers else None) == (path.rpartition("/")[0], layer)

    assert named == modules


def test_an_unknown_parameter_has_no_name_and_raises():
    model, _ = models.load(GOLDEN / "llama_linear")

    with pytest.raises(ValueError, match=r"layers/mlp/upp/kernel.*layers/mlp/up"):
        models.hugging_face_name(model, "layers/mlp/upp/kernel", 0)
    assert models.module_path(model, "model.layers.0.mlp.upp") is None


# --- Bad input ------------------------------------------------------------------------------------


def test_a_directory_without_weights_raises(checkpoint):
    (checkpoint / "model.safetensors").unlink()

    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        models.load(checkpoint)


def test_pickles_are_refused_with_the_reason(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")

    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin: pickles.*save_pretrained"):
        models.load(checkpoint)


def test_a_file_cut_short_raises_with_its_name(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    with pytest.raises(ValueError, match=r"model\.safetensors.*cut short"):
        models.load(checkpoint)


def test_an_empty_file_raises_with_its_name(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")

    with pytest.raises(ValueError, match=r"model\.safetensors.*cut short"):
        models.load(checkpoint)


def test_a_flipped_bit_in_the_header_never_passes_unnoticed(checkpoint):
    """Each of these is noticed as damage, as a name, a shape or an offset that does not fit."""
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    metadata = whole.index(b"__metadata__"), whole.index(b"}", 8)
    positions = [p for p in range(0, header, 37) if not metadata[0] - 2 <= p <= metadata[1]]

    for position in positions:
        if whole[position : position + 1] == b" ":
            continue  # padding after the header
        spoilt = bytearray(whole)
        spoilt[position] ^= 1
        file.write_bytes(spoilt)
        with pytest.raises(ValueError, match="checkpoint"):
            models.load(checkpoint)


def test_a_missing_shard_raises_with_its_name(tmp_path):
    model, params = models.load(GOLDEN / "llama_linear")
    models.save(tmp_path / "saved", model, params, max_shard_bytes=20_000)
    shard = next((tmp_path / "saved").glob("model-00002*"))
    shard.unlink()

    with pytest.raises(FileNotFoundError, match=shard.name):
        models.load(tmp_path / "saved")


def test_an_index_that_does_not_fit_its_files_raises(tmp_path):
    model, params = models.load(GOLDEN / "llama_linear")
    models.save(tmp_path / "saved", model, params, max_shard_bytes=20_000)
    index = tmp_path / "saved" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"] = dict.fromkeys(content["weight_map"], files[0]) | {"x": files[1]}

    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json says that .* is in"):
        models.load(tmp_path / "saved")
    content["weight_map"]["x"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"elsewhere\.safetensors"):
        models.load(tmp_path / "saved")


def test_a_tensor_that_nothing_reads_raises_with_its_name(checkpoint):
    edit_tensors(checkpoint, lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)}))

    with pytest.raises(ValueError, match=r"1 tensors that nothing reads.*model\.extra\.weight"):
        models.load(checkpoint)


def test_a_layer_more_than_the_config_says_raises(checkpoint):
    edit_config(checkpoint, num_hidden_layers=1)

    with pytest.raises(ValueError, match=r"of 1 layers.*model\.layers\.1\."):
        models.load(checkpoint)


def test_a_parameter_without_a_tensor_raises_with_its_name(checkpoint):
    edit_tensors(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(ValueError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(checkpoint)


def test_a_config_of_another_size_raises_with_both_shapes(checkpoint):
    edit_config(checkpoint, intermediate_size=48)

    with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.weight.*\[32, 40\].*\[32, 48\]"):
        models.load(checkpoint)


def test_weights_in_integers_raise(checkpoint):
    def quantise(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    edit_tensors(checkpoint, quantise)

    with pytest.raises(ValueError, match=r"model\.norm\.weight' has dtype int8"):
        models.load(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_config_raises_with_its_name(checkpoint, content):
    (checkpoint / "config.json").write_text(content)

    with pytest.raises(ValueError, match=r"config\.json"):
        models.load(checkpoint)


def test_a_model_type_that_is_not_handled_raises(checkpoint):
    edit_config(checkpoint, model_type="mamba")

    with pytest.raises(ValueError, match=r"'mamba' is not handled, only 'bert', .*'llama'"):
        models.load(checkpoint)


def test_an_architecture_that_names_no_task_asks_for_one(checkpoint):
    edit_config(checkpoint, architectures=["LlamaModel"])

    with pytest.raises(ValueError, match=r"LlamaModel.*task="):
        models.load(checkpoint)
    assert models.load(checkpoint, task="causal_lm")[0].task == "causal_lm"


def test_a_directory_that_is_not_there_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no directory"):
        models.load(tmp_path / "nowhere")


def test_a_name_that_the_hub_does_not_give_raises_with_both_places():
    with pytest.raises(FileNotFoundError, match=r"'some/model' is no directory here.*hub"):
        models.load("some/model")


def test_nothing_is_overwritten(tmp_path):
    model, params = models.load(GOLDEN / "llama_linear")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine").write_text("keep")

    with pytest.raises(ValueError, match="not empty"):
        models.save(tmp_path / "saved", model, params)

    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["mine"]


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    model, params = models.load(GOLDEN / "llama_linear")

    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        models.save(tmp_path / "saved", model, params, tokenizer_files_from=tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_raises_and_leaves_nothing_behind(tmp_path, monkeypatch):
    model, params = models.load(GOLDEN / "llama_linear")

    def save_file(arrays, file, metadata):
        file.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
    with pytest.raises(OSError, match=r"model\.safetensors could not be written .*No space"):
        models.save(tmp_path / "saved", model, params)

    assert list(tmp_path.iterdir()) == []


def test_parameters_that_are_not_the_models_raise(tmp_path):
    model, params = models.load(GOLDEN / "llama_linear")

    with pytest.raises(ValueError, match="lm_head/kernel"):
        models.save(tmp_path / "a", model, {k: v for k, v in params.items() if k != "lm_head"})
    with pytest.raises(ValueError, match=r"norm/scale has shape \[31\].*\[32\]"):
        models.save(tmp_path / "b", model, params | {"norm": {"scale": jnp.ones(31)}})
