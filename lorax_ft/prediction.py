"""A model over data: the metrics of a split, the labels of texts, and what it writes after them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lorax_ft import evaluation, generation
from lorax_ft.data import (
    LoaderConfig,
    TextClassification,
    Tokenizer,
    encode_sources,
    evaluation_batches,
)
from lorax_ft.generation import GenerationConfig
from lorax_ft.models import Model
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
    totals = Totals(task, label_names)
    for _, host_batch in batches:
        batch = host_batch if mesh is None else shard_batch(host_batch, mesh)
        totals.add(batch, *step(batch))
    return totals.evaluation()


class Totals:
    """What the batches of a split add up to, for one model."""

    def __init__(self, task: str, label_names: Sequence[str] = ()):
        self.task, self.label_names = task, tuple(label_names)
        self.loss = self.weight = self.correct = 0.0
        self.counts = np.zeros((len(label_names), len(label_names)))

    def add(
        self, batch: Mapping[str, Any], loss: Any, weight: Any, extras: Mapping[str, Any]
    ) -> None:
        """Takes in what an objective said of a batch: sums, and extras of its rows."""
        self.loss, self.weight = self.loss + float(loss), self.weight + float(weight)
        self.correct += float(extras["correct"])
        if self.label_names:
            found = (_on_host(x) for x in (batch["labels"], extras["predictions"]))
            self.counts += evaluation.count_outcomes(
                *found, classes=len(self.label_names), weights=_on_host(batch["weights"])
            )

    def evaluation(self) -> Evaluation:
        """The metrics of all that was added, and the warning where they were of one class."""
        metrics = evaluation.METRICS[self.task]
        if not self.label_names:
            return Evaluation(metrics=metrics(self.correct, self.loss, self.weight), warning=None)
        predicted = self.counts.sum(axis=0).astype(int)
        return Evaluation(
            metrics=metrics(self.counts, self.loss, self.weight),
            warning=evaluation.collapsed(
                np.repeat(np.arange(len(predicted)), predicted), self.label_names
            ),
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


def continue_texts(
    model: Model,
    params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: GenerationConfig = GenerationConfig(),
    key: jax.Array | None = None,
) -> list[str]:
    """What a language model writes after each text, or an encoder-decoder for it, without the text.

    The texts are one batch, padded to a power of two: few lengths, few compilations.
    Raises ValueError for a text of no tokens, and as `generation.generate` does.
    """
    if not texts:
        return []
    config = _with_ends(config, model, tokenizer)
    prompts = _prompts(model, tokenizer, texts)
    inputs = _padded(model, prompts, tokenizer.pad_id, _room(model, config))
    tokens, lengths = generation.generate(model, params, inputs, config, key)
    return [
        _continuation(model, tokenizer, prompt, row[:length])
        for prompt, row, length in zip(prompts, np.asarray(tokens), np.asarray(lengths))
    ]


def stream_text(
    model: Model,
    params: PyTree,
    tokenizer: Tokenizer,
    text: str,
    config: GenerationConfig = GenerationConfig(),
    key: jax.Array | None = None,
) -> Iterator[str]:
    """What `continue_texts` answers for one text, in pieces as they come."""
    config = _with_ends(config, model, tokenizer)
    (prompt,) = _prompts(model, tokenizer, [text])
    inputs = _padded(model, [prompt], tokenizer.pad_id, _room(model, config))
    written, shown = [], ""
    for token in generation.stream(model, params, inputs, config, key):
        written.append(int(token[0]))
        whole = _continuation(model, tokenizer, prompt, written)
        if not whole.endswith("\ufffd"):  # or else a character's last bytes are still to come
            yield whole[len(shown) :]
            shown = whole
    yield _continuation(model, tokenizer, prompt, written)[len(shown) :]


def _continuation(
    model: Model, tokenizer: Tokenizer, prompt: np.ndarray, tokens: Sequence[int]
) -> str:
    """The text of tokens behind others: with the space that parts them, if one does."""
    before = [] if model.task == "seq2seq_lm" else prompt.tolist()
    return tokenizer.decode([*before, *map(int, tokens)])[len(tokenizer.decode(before)) :]


def _prompts(model: Model, tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids: of texts to be continued without an end, of sources with it."""
    if model.task == "seq2seq_lm":
        return encode_sources(tokenizer, texts).input_ids
    prompts = []
    for text, ids in zip(texts, tokenizer.encode(texts).input_ids):
        ids = ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_id else ids
        if not len(ids):
            raise ValueError(f"The text {text!r} has no tokens: give at least one to start from.")
        prompts.append(ids)
    return prompts


def _with_ends(config: GenerationConfig, model: Model, tokenizer: Tokenizer) -> GenerationConfig:
    """The config with the tokens that end a text: by default the model's and the tokenizer's."""
    if config.eos_token_id is not None:
        return config
    ends = generation.ends_of(model)
    if tokenizer.eos_id is not None:
        ends = (*ends, tokenizer.eos_id)
    return dataclasses.replace(config, eos_token_id=tuple(dict.fromkeys(ends)))


def _room(model: Model, config: GenerationConfig) -> int | None:
    """How long padded texts may be; None where relative positions end nowhere."""
    longest = model.config.max_length
    return None if longest is None else longest - config.max_new_tokens


def _padded(
    model: Model, rows: Sequence[np.ndarray], pad_id: int, room: int | None
) -> dict[str, np.ndarray]:
    """One batch: texts to be continued behind padding, sources before it as in training."""
    longest = max(map(len, rows))
    length = 2 ** max(3, (longest - 1).bit_length())
    length = length if room is None else max(longest, min(length, room))
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        first = 0 if model.task == "seq2seq_lm" else length - len(row)
        ids[i, first : first + len(row)] = row
        mask[i, first : first + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


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
