"""Objectives: what a batch's logits cost, as a float32 sum and the weight it is to be divided by.

Sums, not means: the sums of microbatches, shards and batches add up, and one division at the end
gives the loss of all of them together, whatever their token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft.logits import Logits
from lorax_ft.training.cross_entropy import cross_entropy

Array = jax.Array
Batch = Mapping[str, Array]
Objective = Callable[[Any, Batch], tuple[Array, Array, dict[str, Array]]]

IGNORED = -100  # a label that is not scored, as in Hugging Face's data


def classify_sequence(logits: Array, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
    """Cross-entropy of one class a sequence: logits `[batch, classes]`, labels `[batch]`.

    Returns (loss sum, weight sum, extras). A label of -100 is not scored; `batch["weights"]`
    (`[batch]`, optional) weighs each example. Extras: `predictions` `[batch]` and `correct`, the
    weight of the examples that are predicted right. Raises ValueError where shapes do not fit.

    >>> logits = jnp.array([[4.0, 0.0], [0.0, 4.0]])
    >>> loss_sum, weight_sum, extras = classify_sequence(logits, {"labels": jnp.array([0, -100])})
    >>> f"{loss_sum:.4f} {weight_sum}", extras["predictions"].tolist()
    ('0.0181 1.0', [0, 1])
    """
    return _cross_entropy(logits, batch["labels"], batch)


def classify_tokens(logits: Array | Logits, batch: Batch) -> tuple[Array, Array, dict[str, Array]]:
    """Cross-entropy at each token that has a label, of `[batch, length]` labels.

    Logits are `[batch, length, classes]`. Serves token classification, masked language models, and
    encoder-decoders, whose logits at a place are of the label there.
    Returns as `classify_sequence` does, the predictions being `[batch, length]`.
    """
    return _cross_entropy(logits, batch["labels"], batch)


def predict_next_token(
    logits: Array | Logits, batch: Batch
) -> tuple[Array, Array, dict[str, Array]]:
    """Cross-entropy of each next token: logits `[batch, length, vocabulary]`.

    Labels `[batch, length]` stand at their own tokens and are shifted here, so position i is scored
    against label i + 1 and the last position not at all. The prediction at i is therefore of token
    i + 1.
    """
    return _cross_entropy(logits, shift_labels(batch["labels"]), batch)


def shift_labels(labels: Array) -> Array:
    """Labels `[batch, length]` moved one place to the front; the last place is ignored."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


OBJECTIVES: dict[str, Objective] = {
    "sequence_classification": classify_sequence,
    "token_classification": classify_tokens,
    "masked_lm": classify_tokens,
    "causal_lm": predict_next_token,
    "seq2seq_lm": classify_tokens,
}


def _cross_entropy(
    logits: Array | Logits, labels: Array, batch: Batch
) -> tuple[Array, Array, dict[str, Array]]:
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}: every axis but "
            "the "
            "logits' last, the classes, must agree. Is this the objective of the model's task?"
        )
    weights = _weights(labels, batch.get("weights"))
    targets = jnp.where(labels == IGNORED, 0, labels)
    loss_sum, predictions = cross_entropy(logits, targets, weights)
    correct = jnp.sum(weights * (predictions == targets).astype(jnp.float32))
    return loss_sum, jnp.sum(weights), {"predictions": predictions, "correct": correct}


def _weights(labels: Array, example_weights: Array | None) -> Array:
    """What each label counts: 0 where it is ignored, else its example's weight."""
    scored = (labels != IGNORED).astype(jnp.float32)
    if example_weights is None:
        return scored
    shape = example_weights.shape + (1,) * (labels.ndim - example_weights.ndim)
    return scored * example_weights.astype(jnp.float32).reshape(shape)
