"""PEFT's adapters of a T5 give PEFT's numbers and go back as they came; what PEFT has no word for
is refused before anything is written."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_ft import interop, methods, trees
from lorax_ft.interop import load_peft, save_peft
from lorax_ft.models import hub
from lorax_ft.quantization import QuantizationConfig, quantize
from tests.golden import check

GOLDEN = pathlib.Path(__file__).parent / "golden" / "t5"
CASES = check.cases_of(GOLDEN)
ADAPTERS = [name for name, case in CASES.items() if case["type"] == "adapter"]


@pytest.mark.parametrize("name", CASES)
def test_recorded_logits_gradients_and_trainings_come_out(name):
    scan_layers = not name.startswith("odd")
    found = check.check(GOLDEN, CASES[name], scan_layers)
    assert found
    assert [entry for entry in found if not entry[1] <= 1] == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_comes_back_from_our_export_as_it_went(name, tmp_path):
    """With what nothing reads of it, too."""
    model_name, _, adapter = name.partition("/")
    model, base = hub.load(GOLDEN / model_name)
    source = GOLDEN / model_name / "adapters" / adapter
    params, trained = load_peft(source, model, base)

    save_peft(tmp_path / "adapter", model, params, trained)

    first, second = (
        load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "adapter")
    )
    assert set(first) == set(second)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    train, _ = trees.partition(params, trained)
    assert not [path for path in trees.flatten_arrays(train) if path.endswith("unread")]


@pytest.mark.parametrize(
    ("places", "message"),
    [((), "the prefix has cross, encoder"), (("decoder",), r"each of the decoder's 2 layers")],
)
def test_a_prefix_that_peft_has_no_tensor_for_is_refused(places, message, tmp_path):
    model, base = hub.load(GOLDEN / "even")
    config = methods.PrefixConfig(length=2, places=places)
    params, trainable = methods.add_methods(base, [config], jax.random.key(0))

    assert not interop.can_save(params)
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path / "adapter", model, params, trainable)
    assert not (tmp_path / "adapter").exists()


def test_adapted_word_vectors_which_peft_would_not_adapt_are_refused(tmp_path):
    model, base = hub.load(GOLDEN / "even")
    config = methods.LoraConfig(targets=r"embeddings/.*|.*/query/kernel", rank=2)
    params, trainable = methods.add_methods(base, [config], jax.random.key(0))

    assert not interop.can_save(params)
    with pytest.raises(ValueError, match="embeddings/word/embedding is adapted, which PEFT would"):
        save_peft(tmp_path / "adapter", model, params, trainable)
    assert not (tmp_path / "adapter").exists()


def test_four_bits_are_refused_where_transformers_has_none(tmp_path):
    model, base = hub.load(GOLDEN / "even")
    with pytest.raises(ValueError, match=r"layers/mlp/down/kernel is in four bits, but .*\.wo\."):
        hub.save(tmp_path / "all", model, quantize(base, QuantizationConfig()))
    assert not (tmp_path / "all").exists()

    exclude = (r"embeddings/.*", r".*/mlp/down/kernel")
    hub.save(tmp_path / "some", model, quantize(base, QuantizationConfig(exclude=exclude)))
    mlp = hub.load(tmp_path / "some")[1]["encoder"]["layers"]["mlp"]
    assert [trees.kind(mlp[name]["kernel"]) for name in ("up", "down")] == ["NF4", "array"]


def test_with_an_odd_number_of_layers_each_has_its_own_and_goes_out(tmp_path):
    model, base = hub.load(GOLDEN / "odd")
    config = methods.PrefixConfig(length=2, places=("decoder",), projection=4)
    params, trainable = methods.add_methods(base, [config], jax.random.key(0))

    save_peft(tmp_path / "adapter", model, params, trainable)
    again, _ = load_peft(tmp_path / "adapter", model, base)

    batch = check.batch_of(np.load(GOLDEN / "odd" / "io.npz"), model, "right")
    found, expected = (check.run(model, p, batch) for p in (again, params))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - check.run(model, base, batch)).max() > 1e-3


def test_a_prompt_of_another_size_is_refused():
    model, base = hub.load(GOLDEN / "even")
    source = GOLDEN / "even" / "adapters" / "prompt"
    found = interop.files.read(source)
    config = {**found.config, "num_virtual_tokens": 3}
    with pytest.raises(ValueError, match=r"has 8 rows, but num_virtual_tokens is 3, for 2 halves"):
        interop.prompts.from_peft(config, found.tensors, model, base)
