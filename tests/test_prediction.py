"""A model over data: metrics see every example once, order is kept, decoding stops in time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import prediction, reports
from lorax_ft.data import LoaderConfig, TextClassification, evaluation_batches
from lorax_ft.training import OBJECTIVES

LOADER = LoaderConfig(batch_size=4, buckets=(4,))


class Letters:
    """A tokenizer whose tokens are the letters a, b, c … as 1, 2, 3 …; z ends a sequence."""

    vocabulary_size, pad_id, eos_id = 27, 0, 26

    def encode(self, texts, pairs=None, *, max_length=None, special_tokens=True):
        from lorax_ft.data.tokenization import Encoded

        whole = texts if pairs is None else [a + b for a, b in zip(texts, pairs)]
        return Encoded(input_ids=[np.array([ord(c) - 96 for c in t], np.int32) for t in whole])

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def first_token_as_class(params, inputs):
    """Logits that name the class of a text's first token, of three classes."""
    return params["scale"] * jax.nn.one_hot(inputs["input_ids"][:, 0] - 1, 3)


def evaluate(apply, labels, first_tokens):
    examples = [
        {"input_ids": np.array([t], np.int32), "labels": np.array(label, np.int32)}
        for t, label in zip(first_tokens, labels)
    ]

    def step(batch):
        logits = apply({"scale": jnp.float32(5)}, batch)
        return OBJECTIVES["sequence_classification"](logits, batch)

    return prediction.evaluate(
        step,
        evaluation_batches(examples, LOADER, pad_id=0),
        task="sequence_classification",
        label_names=("x", "y", "z"),
    )


def test_metrics_do_not_see_the_rows_that_fill_the_last_batch():
    found = evaluate(first_token_as_class, labels=[0, 1, 2, 0, 1], first_tokens=[1, 2, 3, 1, 1])

    assert found.metrics["accuracy"] == pytest.approx(4 / 5)
    assert found.warning is None


def test_a_model_that_predicts_one_class_is_told_in_the_report_too():
    found = evaluate(first_token_as_class, labels=[0, 1, 2], first_tokens=[2, 2, 2])

    assert found.warning is not None
    assert "All 3 predictions are of one class, 'y'" in found.warning
    results = {
        "metrics": {"test": found.metrics},
        "warnings": [found.warning],
        "baseline": 0.5,
        "parameters": {"trainable": 1, "total": 2, "bytes": 8},
        "step": 1,
        "seconds": 1.0,
        "peak_memory_bytes": 2**20,
    }
    table = reports.results_table(results)
    assert f"WARNING: {found.warning}" in table
    assert "TF-IDF + LR, test    0.5000" in table


@pytest.mark.parametrize("text_pair", [None, "second"])
def test_texts_are_classified_in_their_order(text_pair):
    texts = ["cab", "a", "b", "abcd", "ca"]
    found = prediction.classify(
        first_token_as_class,
        {"scale": jnp.float32(5)},
        Letters(),
        texts if text_pair is None else [f"{text[0]}\t{text[1:]}" for text in texts],
        task=TextClassification(text_pair=text_pair),
        label_names=("x", "y", "z"),
        loader=LOADER,
    )

    assert [label for label, _ in found] == ["z", "x", "y", "x", "z"]
    assert all(0.9 < probability <= 1.0 for _, probability in found)


def test_a_missing_second_text_is_an_error():
    with pytest.raises(ValueError, match="'only one': this model reads two texts"):
        prediction.classify(
            first_token_as_class,
            {},
            Letters(),
            ["only one"],
            task=TextClassification(text_pair="second"),
            label_names=("x", "y"),
        )
