"""Adapters written by Hugging Face PEFT give PEFT's numbers here, train as they do there, and go
back whole."""

import json
import shutil

import jax
import numpy as np
import pytest

from lorax_ft.interop import load_peft, save_peft
from lorax_ft.methods import select, stack_adapters
from lorax_ft.models import hub
from tests.golden import check

CASES = [
    ("bert_seqcls", name)
    for name in (
        "lora",
        "lora_all_linear",
        "rslora",
        "dora",
        "lora_patterns",
        "lora_layer1",
        "lora_bias_only",
        "lora_embedding",
        "ia3",
        "prompt",
        "prefix",
        "ptuning",
        "prefix_projection",
    )
] + [
    (name, adapter)
    for name in ("llama_gqa", "gpt2", "t5")
    for adapter in ("lora", "lora_all_linear")
]


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden"


def load(golden, name, scan_layers=True):
    return hub.load(golden / name, scan_layers=scan_layers)


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_an_adapter_comes_back_from_our_export_as_it_went(golden, name, adapter, tmp_path):
    model, base = load(golden, name)
    source = golden / name / "adapters" / adapter
    params, trained = load_peft(source, model, base)
    config = json.loads((source / "adapter_config.json").read_text())
    options = {}
    if config["peft_type"] == "LORA":
        options = {"rslora": config["use_rslora"], "dropout": config["lora_dropout"]}
    save_peft(tmp_path / "adapter", model, params, trained, **options)
    assert tensors_of(tmp_path / "adapter") == tensors_of(source)
    again, _ = load_peft(tmp_path / "adapter", model, base)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(params)):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def tensors_of(directory):
    """Every tensor's bytes by name; PEFT may save a head of ours that it does not train."""
    from safetensors.numpy import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


TRAININGS = [
    f"bert_seqcls/train/{case}"
    for case in (
        "full",
        "full_clip_schedule",
        "bitfit",
        "lora",
        "lora_all_linear",
        "rslora",
        "dora",
        "lora_bias_only",
        "ia3",
        "prompt",
        "prefix",
    )
] + ["llama_gqa/train/lora", "gpt2/train/lora", "t5/train/lora"]


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("case", [f"{name}/{adapter}" for name, adapter in CASES])
def test_an_adapter_of_peft_gives_its_logits_and_its_merged_logits(golden, case, scan_layers):
    found = check.check(golden, check.cases_of(golden)[case], scan_layers)
    assert found
    assert [entry for entry in found if not entry[1] <= 1] == []


@pytest.mark.parametrize("case", TRAININGS)
def test_a_few_steps_of_adamw_equal_torchs(golden, case):
    """Losses, the gradients' norms, and where they were recorded gradients and final parameters."""
    found = check.check(golden, check.cases_of(golden)[case], scan_layers=True)
    assert {"losses", "norms"} <= {name for name, _ in found}
    assert [entry for entry in found if not entry[1] <= 1] == []


@pytest.fixture
def broken(golden, tmp_path):
    """A copy of a good adapter to spoil, its base model and the base's parameters."""
    shutil.copytree(
        golden / "bert_seqcls" / "adapters" / "lora",
        tmp_path / "adapter",
        copy_function=shutil.copyfile,
    )
    (tmp_path / "adapter").chmod(0o755)
    return (tmp_path / "adapter", *load(golden, "bert_seqcls"))


def spoil(directory, change):
    from safetensors.numpy import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY + "lora_B.weight"), r"layer 0: found \['A'\], not \['A', 'B'\]"),
        (
            lambda t: t.update({QUERY + "lora_C.weight": np.ones(2)}),
            r"lora_C.weight' belongs to no parameter",
        ),
        (
            lambda t: t.update({QUERY.replace("query", "quarry") + "lora_A.weight": np.ones(2)}),
            r"belongs to no parameter .* Nearest modules: bert.*query",
        ),
        (
            lambda t: t.update({QUERY + "lora_A.weight": np.ones((4, 32), np.float32)}),
            r"lora_A \[4, 32\] .* do not fit rank 4 .* \[64, 64\]",
        ),
        (
            lambda t: t.update(
                {"base_model.model.classifier.weight": np.ones((2, 64), np.float32)}
            ),
            r"classifier/kernel is \[64, 3\], the file has \[64, 2\]",
        ),
    ],
)
def test_a_tensor_too_few_too_many_or_misshapen_raises_and_names_it(broken, change, message):
    directory, model, base = broken
    spoil(directory, change)
    with pytest.raises(ValueError, match=message):
        load_peft(directory, model, base)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "LOHA", "peft_type is 'LOHA'"),
        ("lora_bias", True, "lora_bias = True may change the maths"),
        ("layer_replication", [[0, 1]], "layer_replication"),
        ("init_lora_weights", "pissa", "changed the base weights"),
    ],
)
def test_a_config_field_that_is_not_handled_raises_and_names_it(broken, field, value, message):
    directory, model, base = broken
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_peft(directory, model, base)


def test_a_missing_or_truncated_file_raises_and_names_it(broken):
    directory, model, base = broken
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        load_peft(directory, model, base)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is not there"):
        load_peft(directory, model, base)


def test_an_export_overwrites_nothing(golden, tmp_path):
    model, base = load(golden, "bert_seqcls")
    params, trained = load_peft(golden / "bert_seqcls" / "adapters" / "lora", model, base)
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="not empty: nothing is overwritten"):
        save_peft(tmp_path, model, params, trained)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_leaf_that_a_peft_directory_cannot_hold_is_refused_and_its_parts_go_out(golden, tmp_path):
    model, base = load(golden, "bert_seqcls")
    source = golden / "bert_seqcls" / "adapters" / "lora"
    params, trained = load_peft(source, model, base)
    adapters = stack_adapters({"one": params})
    with pytest.raises(ValueError, match=r"is a MixedLoRA leaf.*select\(adapters, name\)"):
        save_peft(tmp_path / "mixed", model, adapters.params, trained)
    save_peft(tmp_path / "one", model, select(adapters, "one"), trained)
    assert tensors_of(tmp_path / "one") == tensors_of(source)
