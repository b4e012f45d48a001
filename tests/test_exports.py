"""What an exported adapter says of itself, and that it is refused on another base."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from lorax_ft.interop import ModelCard, load_peft, save_peft
from lorax_ft.methods import (
    CombinationConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    add_methods,
    combine_adapters,
)
from lorax_ft.models import BertConfig, build
from lorax_ft.quantization import QuantizationConfig, quantize

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 20}
CONFIG = BertConfig(**SIZES, intermediate_size=64, max_position_embeddings=16)
LORA = LoraConfig(targets=("query", "value"), rank=3, alpha=6)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, task="sequence_classification")


@pytest.fixture(scope="module")
def base(model):
    return model.init(jax.random.key(0))


def export(directory, model, base, config=LORA, **options):
    params, trained = add_methods(base, [config], jax.random.key(1))
    save_peft(directory, model, params, trained, **options)
    return params


def card_of(directory):
    """(front matter, text) of a README.md."""
    empty, matter, text = (directory / "README.md").read_text().split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter), text


# --- Cards ----------------------------------------------------------------------------------------


def test_a_card_says_what_base_method_data_metrics_and_command_an_adapter_has(
    model, base, tmp_path
):
    card = ModelCard(
        data="words.csv: 80 train, 20 test examples",
        metrics={"validation": {"accuracy": 0.75}, "test": {"accuracy": 0.5, "loss": 1.25}},
        command="lorax-ft train --config=words.py",
        notes="More *words*.",
    )
    config = dataclasses.replace(LORA, rslora=True, modules_to_save=("classifier",))
    export(tmp_path / "a", model, base, config, base_name="org/tiny", rslora=True, card=card)

    matter, text = card_of(tmp_path / "a")

    assert matter == {
        "base_model": "org/tiny",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["base_model:adapter:org/tiny", "lorax_ft", "lora"],
        "metrics": ["accuracy", "loss"],
    }
    assert text.startswith("\n# LoRA, scaled as rsLoRA for tiny\n")
    for line in (
        "| base | org/tiny |",
        "| rank, alpha | 3, 6 |",
        "| targets | query, value |",
        "| modules saved whole | classifier |",
        "| data | words.csv: 80 train, 20 test examples |",
        "| validation | 0.7500 |  |",
        "| test | 0.5000 | 1.2500 |",
        "```bash\nlorax-ft train --config=words.py\n```",
        "AutoModelForSequenceClassification",
        "More *words*.",
    ):
        assert line in text


@pytest.mark.parametrize("name", ["", "runs/my model", "package:words/model", "../tiny", "/a/b"])
def test_a_base_that_the_hub_has_no_name_for_is_told_in_the_text_alone(model, base, tmp_path, name):
    export(tmp_path / "a", model, base, base_name=name)

    matter, text = card_of(tmp_path / "a")

    assert "base_model" not in matter
    assert f"| base | {name or 'unnamed'} |" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (IA3Config(), ("| method | IA3 |", "| targets | dense, key, value |")),
        (PromptConfig(length=4), ("| method | prompt tuning |", "| virtual tokens | 4 |")),
        (PrefixConfig(length=5), ("| method | prefix tuning |", "| virtual tokens | 5 |")),
        (dataclasses.replace(LORA, dora=True), ("| method | DoRA |",)),
        (
            dataclasses.replace(LORA, rank_pattern={".*query.*": 2}),
            ("bert.encoder.layer.1.attention.self.value: 3",),
        ),
    ],
)
def test_every_method_has_its_words(model, base, tmp_path, config, words):
    export(tmp_path / "a", model, base, config)

    _, text = card_of(tmp_path / "a")

    assert all(word in text for word in words)


# --- Heads ----------------------------------------------------------------------------------------


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def test_what_classifies_goes_along_though_it_was_not_trained(model, base, tmp_path):
    export(tmp_path / "a", model, base)

    found, trained = load_peft(tmp_path / "a", model, base)

    assert config_of(tmp_path / "a")["modules_to_save"] == ["classifier"]
    assert config_of(tmp_path / "a")["task_type"] == "SEQ_CLS"
    assert trained == ("classifier/bias", "classifier/kernel")
    assert np.array_equal(found["classifier"]["kernel"], base["classifier"]["kernel"])


def test_a_head_of_several_modules_goes_by_its_own_name(tmp_path):
    sizes = {"model_type": "roberta", **SIZES, "intermediate_size": 64}
    model = build(BertConfig.from_hugging_face(sizes), task="sequence_classification")
    base = model.init(jax.random.key(0))
    export(tmp_path / "a", model, base)

    assert config_of(tmp_path / "a")["modules_to_save"] == ["classifier"]
    found, _ = load_peft(tmp_path / "a", model, base)
    assert jax.tree.structure(found["classifier"]) == jax.tree.structure(base["classifier"])


def test_an_adapter_on_what_classifies_is_for_no_task_of_pefts(model, base, tmp_path):
    """PEFT saves the head whole for those, and refuses an adapter on it."""
    params = export(tmp_path / "a", model, base, LoraConfig(targets=("query", "classifier")))

    assert config_of(tmp_path / "a")["task_type"] is None
    assert config_of(tmp_path / "a")["modules_to_save"] is None
    found, _ = load_peft(tmp_path / "a", model, base)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(params)))


def test_nothing_is_no_adapter(model, base, tmp_path):
    with pytest.raises(ValueError, match="hold no adapter and nothing is trainable"):
        save_peft(tmp_path / "a", model, base)


# --- Bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LORA, IA3Config(), PromptConfig(length=4)])
def test_an_adapter_is_refused_on_a_base_that_differs_in_one_number(model, base, tmp_path, config):
    params = export(tmp_path / "a", model, base, config)
    other = jax.tree.map(lambda x: x, base)
    other["layers"]["mlp"]["up"]["bias"] = base["layers"]["mlp"]["up"]["bias"].at[1, 3].add(1e-3)

    found, _ = load_peft(tmp_path / "a", model, base)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(params)))
    with pytest.raises(ValueError, match=r"a was trained on a base of the fingerprint \w{12}, and"):
        load_peft(tmp_path / "a", model, other)
    load_peft(tmp_path / "a", model, other, check_base=False)


def test_the_base_is_the_same_whether_its_layers_are_stacked(model, base, tmp_path):
    export(tmp_path / "a", model, base, dataclasses.replace(LORA, bias="all"))
    unrolled = build(CONFIG, task="sequence_classification", scan_layers=False)

    found, _ = load_peft(tmp_path / "a", unrolled, unstacked(base))

    assert "layers_1" in found


def unstacked(params):
    from lorax_ft.models import unstack_layers

    return unstack_layers(params)


def test_what_an_adapter_brings_along_is_none_of_the_base(model, base, tmp_path):
    """A new head starts from chance in every run, and the adapter has the trained one."""
    config = dataclasses.replace(LORA, bias="all", modules_to_save=("classifier",))
    params = export(tmp_path / "a", model, base, config)
    other = {**base, "classifier": jax.tree.map(lambda x: x + 1, base["classifier"])}

    found, trained = load_peft(tmp_path / "a", model, other)

    assert "classifier/kernel" in trained
    np.testing.assert_array_equal(found["classifier"]["kernel"], params["classifier"]["kernel"])


@pytest.mark.parametrize("change", ["bfloat16", "nf4"])
def test_a_base_in_another_precision_is_taken_with_a_warning(model, base, tmp_path, caplog, change):
    export(tmp_path / "a", model, base)
    if change == "nf4":
        held = quantize(base, QuantizationConfig(targets=".*attention/.*/kernel"))
    else:
        held = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)

    load_peft(tmp_path / "a", model, held)

    assert "held as float32, and this one is held as" in caplog.text


def test_an_adapter_of_a_quantised_base_knows_that_base(model, base, tmp_path):
    config = QuantizationConfig(targets=".*attention/.*/kernel")
    export(tmp_path / "a", model, quantize(base, config))
    changed = jax.tree.map(lambda x: x, base)
    kernel = base["layers"]["attention"]["key"]["kernel"]
    changed["layers"]["attention"]["key"]["kernel"] = kernel * 1.5

    load_peft(tmp_path / "a", model, quantize(base, config))
    with pytest.raises(ValueError, match="trained on a base of the fingerprint"):
        load_peft(tmp_path / "a", model, quantize(changed, config))


def test_adapters_of_two_bases_do_not_combine(model, base, tmp_path):
    other = jax.tree.map(lambda x: x * 1.01, base)
    export(tmp_path / "a", model, base)
    export(tmp_path / "b", model, other)
    adapters = {
        "a": load_peft(tmp_path / "a", model, base)[0],
        "b": load_peft(tmp_path / "b", model, other)[0],
    }
    with pytest.raises(ValueError, match=r"in 'a' and in 'b' has two different bases"):
        combine_adapters(adapters, (0.5, 0.5), CombinationConfig())


def test_another_size_of_vocabulary_is_named(base, tmp_path):
    config = LoraConfig(targets=r"embeddings/word/embedding", rank=2)
    model = build(CONFIG, task="sequence_classification")
    export(tmp_path / "a", model, base, config)
    larger = build(dataclasses.replace(CONFIG, vocab_size=30), task="sequence_classification")
    with pytest.raises(ValueError, match="trained on a base of the fingerprint"):
        load_peft(tmp_path / "a", larger, larger.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"word_embeddings: lora_A \[2, 20\].*\[30, 64\]"):
        load_peft(tmp_path / "a", larger, larger.init(jax.random.key(0)), check_base=False)
