"""Finished runs: restored, evaluated, asked about or to continue texts, and merged."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft import methods, prediction, runs, training, trees
from lorax_ft.adapted import Adapted, find_path, load_adapted, make_apply, make_outputs
from lorax_ft.data import (
    Dataset,
    SequenceToSequence,
    TextClassification,
    Tokenizer,
    evaluation_batches,
    load_dataset,
    load_tokenizer,
    source_of,
)
from lorax_ft.generation import GenerationConfig
from lorax_ft.models import hub
from lorax_ft.training.step import inputs_of

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A trained model, and what its adapter says of it."""

    adapted: Adapted
    record: runs.AdapterRecord

    def tokenizer(self) -> Tokenizer:
        model = self.record.config.model
        return load_tokenizer(find_path(model.tokenizer or model.path))


def restore(run_dir: str | pathlib.Path) -> tuple[PyTree, Callable[..., Any]]:
    """The trained parameters of a finished run and `apply(params, inputs) -> logits`.

    `inputs` are `input_ids` `[batch, length]` and, for shorter texts, an `attention_mask`. Raises
    ValueError where the base weights are not those that the run was trained on.
    """
    adapted = load_run(run_dir).adapted
    return adapted.params, jax.jit(make_apply(adapted.model))


def load_run(run_dir: str | pathlib.Path) -> Finished:
    """The trained model of a finished run. Raises as `restore` does."""
    directory = pathlib.Path(run_dir) / runs.ADAPTER
    record = runs.read_record(directory)
    adapted = load_adapted(record.config, record.task, record.label_names)
    if adapted.base != record.base:
        raise ValueError(
            f"{directory} was trained on other base weights than {record.config.model.path} holds "
            f"now (fingerprints {record.base[:12]} and {adapted.base[:12]}). Give that path the "
            "weights it had."
        )
    train, frozen = trees.partition(adapted.params, adapted.trainable)
    params = trees.combine(runs.load_adapter(directory, train), frozen)
    return Finished(adapted=dataclasses.replace(adapted, params=params), record=record)


def evaluate(run_dir: str | pathlib.Path, part: str) -> prediction.Evaluation:
    """Metrics of a finished run on a split of its data, "train", "validation" or "test"."""
    finished = load_run(run_dir)
    adapted, task = finished.adapted, finished.record.task
    dataset = _dataset(finished)
    outputs = make_outputs(adapted.model, adapted.mesh, right_padded=True)
    step = training.make_eval_step(outputs, training.OBJECTIVES[task])
    train, frozen = trees.partition(adapted.params, adapted.trainable)
    return prediction.evaluate(
        lambda batch: step(train, frozen, batch),
        _batches(finished, dataset, part),
        task=task,
        label_names=finished.record.label_names,
        mesh=adapted.mesh,
    )


def predict(run_dir: str | pathlib.Path, texts: Sequence[str]) -> list[str]:
    """A line for each text: its label, the label's probability, and the text.

    Raises ValueError for a language model, which `generate` is for.
    """
    finished = load_run(run_dir)
    adapted, record = finished.adapted, finished.record
    if not isinstance(record.config.data.task, TextClassification):
        raise ValueError(
            f"{run_dir} is of a model for {record.task!r}: `generate` continues texts."
        )
    found = prediction.classify(
        make_apply(adapted.model),
        adapted.params,
        finished.tokenizer(),
        texts,
        task=record.config.data.task,
        label_names=record.label_names,
        loader=record.config.data.loader,
    )
    return [f"{label}\t{p:.4f}\t{text}" for (label, p), text in zip(found, texts)]


def generate(
    run_dir: str | pathlib.Path,
    texts: Sequence[str],
    config: GenerationConfig = GenerationConfig(),
    *,
    seed: int = 0,
) -> Iterator[Iterator[str]]:
    """What the trained model writes after each text, in pieces as they come.

    Beams are written one batch for all texts, and each is one piece. Raises ValueError where the
    run is not of a language model, and as `prediction.continue_texts` does.
    """
    finished = load_run(run_dir)
    model, params = finished.adapted.model, finished.adapted.params
    tokenizer, task = finished.tokenizer(), finished.record.config.data.task
    if isinstance(task, SequenceToSequence):
        texts = [source_of(task, text) for text in texts]
    if config.num_beams > 1:
        whole = prediction.continue_texts(model, params, tokenizer, texts, config)
        yield from (iter([text]) for text in whole)
        return
    for i, text in enumerate(texts):
        key = jax.random.fold_in(jax.random.key(seed), i) if config.do_sample else None
        yield prediction.stream_text(model, params, tokenizer, text, config, key)


def merge(
    run_dir: str | pathlib.Path, output: str | pathlib.Path, *, dtype: str = "float32"
) -> methods.Drift:
    """Writes a run's model as a Hugging Face directory, its adapters merged into the weights.

    Quantised weights are dequantised first. Answers how far the merged model's logits, computed
    with weights of `dtype`, are from the unmerged model's on a batch of the run's own data.
    """
    finished = load_run(run_dir)
    adapted = finished.adapted
    merged = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), methods.merge(adapted.params))
    source = finished.record.config.model
    hub.save(
        output,
        adapted.model,
        merged,
        tokenizer_files_from=hub.find_directory(find_path(source.tokenizer or source.path)),
    )
    dataset = _dataset(finished)
    part = next(name for name in ("validation", "test", "train") if getattr(dataset, name))
    _, batch = next(iter(_batches(finished, dataset, part)))
    return methods.drift(adapted.model.apply, adapted.params, merged, inputs_of(batch))


def _dataset(finished: Finished) -> Dataset:
    """The run's data. Raises ValueError where its classes are not those it was trained on."""
    dataset = load_dataset(finished.record.config.data, finished.tokenizer())
    if dataset.label_names != finished.record.label_names:
        raise ValueError(
            f"The data now has the classes {', '.join(dataset.label_names)}; the run was trained "
            f"on {', '.join(finished.record.label_names)}."
        )
    return dataset


def _batches(finished: Finished, dataset: Dataset, part: str) -> Any:
    loader = finished.record.config.data.loader
    return evaluation_batches(dataset.part(part), loader, pad_id=dataset.pad_id)
