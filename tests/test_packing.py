"""Packed examples give the loss and the gradients that they give alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import inspect
from lorax_ft.config import ExperimentConfig, parse, to_dict
from lorax_ft.data import DataConfig, SourceConfig, TextClassification
from lorax_ft.data.loader import make_batch, plan_epoch
from lorax_ft.data.packing import fill_rows, pack
from lorax_ft.data.tasks import IGNORED
from lorax_ft.methods import PrefixConfig, PromptConfig, add_methods
from lorax_ft.models import Gpt2Config, LlamaConfig, build
from lorax_ft.training import OBJECTIVES

WORDS, LENGTH = 50, 16
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
MODELS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2),
    "mistral": LlamaConfig(
        **SIZES, model_type="mistral", intermediate_size=48, num_key_value_heads=2, sliding_window=3
    ),
    "gpt2": Gpt2Config(**SIZES),
    "gemma2": LlamaConfig(
        **SIZES,
        model_type="gemma2",
        intermediate_size=48,
        sliding_window=3,
        layer_types=("sliding_attention", "full_attention"),
        final_logit_softcapping=3.0,
    ),
}


def examples(lengths, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = random.integers(0, WORDS, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 3, IGNORED, ids).astype(np.int32)
        made.append({"input_ids": ids, "labels": labels})
    return made


def batch_of(rows, length):
    (plan,) = plan_epoch([len(r["input_ids"]) for r in rows], len(rows), (length,))
    return make_batch(rows, plan, rows=slice(0, len(rows)), pad_id=0)


def loss_and_gradient(model, params, batch):
    def loss(params, batch):
        total, weight, _ = OBJECTIVES["causal_lm"](model.apply(params, batch), batch)
        return total, weight

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", [False, True])
def test_packed_and_unpacked_texts_have_the_same_loss_and_gradient(name, prefix):
    model = build(MODELS[name], task="causal_lm")
    params = model.init(jax.random.key(0))
    if prefix:
        params, _ = add_methods(params, [PrefixConfig(length=2)], jax.random.key(1), uses(model))
    texts = examples((5, 9, 1, 7, 3, 4))
    rows = pack(texts, LENGTH)
    assert len(rows) == 2

    (want, weight), gradient = loss_and_gradient(model, params, batch_of(texts, LENGTH))
    (got, packed_weight), packed = loss_and_gradient(model, params, batch_of(rows, LENGTH))

    assert packed_weight == weight
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # sums in another order


def uses(model):
    return inspect(model.apply, model.shapes(), model.input_shapes())


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_row_and_no_row_is_too_long(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 65, 300).tolist()

    rows = fill_rows(lengths, 64)

    assert sorted(i for row in rows for i in row) == list(range(300))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 64
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 6 / 9
    assert rows == fill_rows(lengths, 64)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="Example 1 has 9 tokens, and packed rows have 8"):
        pack(examples((3, 9)), 8)
    with pytest.raises(ValueError, match="only texts whose next tokens are predicted"):
        pack([{"input_ids": np.arange(3), "labels": np.array(1)}], 8)
    with pytest.raises(ValueError, match=r"of text_classification cannot share a row.*to None"):
        DataConfig(
            source=SourceConfig(train="x"), task=TextClassification(max_length=8), packed_length=16
        )
    with pytest.raises(ValueError, match="packed_length = 64: examples have up to 128 tokens"):
        config_of(packed_length=64)
    with pytest.raises(ValueError, match="packed_length = 256: a prompt stands before each text"):
        config_of("prompt", packed_length=256)
    model = build(MODELS["llama"], task="causal_lm")
    params, _ = add_methods(
        model.init(jax.random.key(0)), [PromptConfig(length=2)], jax.random.key(1), uses(model)
    )
    batch = batch_of(pack(examples((3, 4)), LENGTH), LENGTH)
    with pytest.raises(ValueError, match="a prompt stands before each text"):
        model.apply(params, {name: jnp.asarray(array) for name, array in batch.items()})


def config_of(method="lora", **data):
    data = {"source": {"train": "x"}, "task": {"kind": "language_modelling"}, **data}
    return parse({"model": {"path": "x"}, "data": data, method: {}}, ExperimentConfig)


def test_one_field_packs_and_its_length_is_the_last_bucket():
    config = config_of(packed_length=256)

    assert config.data.loader.buckets == (16, 32, 64, 128, 256)
    assert parse(to_dict(config), ExperimentConfig) == config
