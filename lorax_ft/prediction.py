"""A model over data: the metrics of a split, the labels of texts, and what comes after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import evaluation
from lorax_ft.data import LoaderConfig, TextClassification, Tokenizer, evaluation_batches
from lorax_ft.training import shard_batch

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a split's examples say of a model."""

    metrics: dict[str, float]
    warning: str | None  # what must not go unnoticed: the model predicts one class only


def evaluate(
    step: Callable[[Mapping[str, Any]], tuple[jax.Array, jax.Array, dict[str, jax.Array]]],
    batches: Iterator[tuple[np.ndarray, dict[str, np.ndarray]]],
    *,
    task: str,
    label_names: Sequence[str] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Evaluation:
    """Metrics over all batches.

    `step(batch)` gives (loss sum, weight sum, extras) as an objective does; `batches` are from
    `evaluation_batches`.
    """
    classes = len(label_names)
    loss, weight, correct, counts = 0.0, 0.0, 0.0, np.zeros((classes, classes))
    for _, host_batch in batches:
        batch = host_batch if mesh is None else shard_batch(host_batch, mesh)
        batch_loss, batch_weight, extras = step(batch)
        loss, weight = loss + float(batch_loss), weight + float(batch_weight)
        correct += float(extras["correct"])
        if classes:
            found = (_on_host(x) for x in (batch["labels"], extras["predictions"]))
            counts += evaluation.count_outcomes(
                *found, classes=classes, weights=_on_host(batch["weights"])
            )
    if not classes:
        metrics = evaluation.METRICS[task](correct, loss, weight)
        return Evaluation(metrics=metrics, warning=None)
    predictions = np.repeat(np.arange(classes), counts.sum(axis=0).astype(int))
    return Evaluation(
        metrics=evaluation.METRICS[task](counts, loss, weight),
        warning=evaluation.collapsed(predictions, label_names),
    )


def classify(
    apply: Callable[..., jax.Array],
    params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    task: TextClassification,
    label_names: Sequence[str],
    loader: LoaderConfig = LoaderConfig(),
) -> list[tuple[str, float]]:
    """The likeliest label of each text and its probability.

    Where the task has two texts, a tab stands between them. Raises ValueError where it does not.
    """
    if not texts:
        return []
    first, second = list(texts), None
    if task.text_pair is not None:
        first, second = _split_pairs(texts)
    encoded = tokenizer.encode(first, second, max_length=task.max_length)
    columns = {"input_ids": encoded.input_ids}
    if encoded.token_type_ids is not None:
        columns["token_type_ids"] = encoded.token_type_ids
    examples = [dict(zip(columns, values)) for values in zip(*columns.values())]

    @jax.jit
    def probabilities(params: PyTree, batch: dict[str, jax.Array]) -> jax.Array:
        return jax.nn.softmax(apply(params, batch), axis=-1)

    results: list[tuple[str, float]] = [("", 0.0)] * len(texts)
    for indices, batch in evaluation_batches(examples, loader, pad_id=tokenizer.pad_id):
        batch.pop("weights")
        rows = np.asarray(probabilities(params, batch))
        for index, row in zip(indices, rows):
            results[index] = (label_names[int(row.argmax())], float(row.max()))
    return results


def continue_text(
    apply: Callable[..., jax.Array],
    params: PyTree,
    tokenizer: Tokenizer,
    text: str,
    *,
    new_tokens: int = 64,
    max_length: int | None = None,
) -> str:
    """The text and what the model finds likeliest to follow, token by token (greedy decoding).

    Each token costs a whole pass over the sequence. It ends at the end-of-sequence token, after
    `new_tokens`, or at `max_length` tokens in all. Raises ValueError for a text of no tokens or of
    more than that.
    """
    prompt = tokenizer.encode([text]).input_ids[0]
    if not len(prompt) or (max_length is not None and len(prompt) >= max_length):
        raise ValueError(
            f"{text[:40]!r} has {len(prompt)} tokens: expected at least 1, and fewer than the "
            f"model's {max_length}."
        )
    total = len(prompt) + new_tokens if max_length is None else max_length
    total = min(total, len(prompt) + new_tokens)
    ids = np.zeros((1, total), np.int32)
    ids[0, : len(prompt)] = prompt

    @jax.jit
    def next_token(params: PyTree, ids: jax.Array, length: jax.Array) -> jax.Array:
        seen = (jnp.arange(total) < length).astype(jnp.int32)[None]
        logits = apply(params, {"input_ids": ids, "attention_mask": seen})
        return jnp.argmax(jnp.take(logits[0], length - 1, axis=0))

    length = len(prompt)
    while length < total:
        token = int(next_token(params, ids, np.int32(length)))
        if token == tokenizer.eos_id:
            break
        ids[0, length] = token
        length += 1
    return tokenizer.decode(ids[0, :length].tolist())


def _split_pairs(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    pairs = [text.split("\t") for text in texts]
    for text, pair in zip(texts, pairs):
        if len(pair) != 2:
            raise ValueError(
                f"{text[:40]!r}: this model reads two texts, with one tab between them; found "
                f"{len(pair)} texts."
            )
    return [first for first, _ in pairs], [second for _, second in pairs]


def _on_host(array: Any) -> np.ndarray:
    """The whole array, also where other processes hold parts of it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
