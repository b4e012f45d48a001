"""A data set as a run uses it: from the config's files to the examples of each split."""

from __future__ import annotations

import dataclasses

from lorax_ft.data.loader import LoaderConfig
from lorax_ft.data.readers import SourceConfig
from lorax_ft.data.splits import PARTS, SplitConfig, read_splits
from lorax_ft.data.table import Table
from lorax_ft.data.tasks import (
    Example,
    LanguageModelling,
    PromptCompletion,
    SequenceToSequence,
    TaskConfig,
    TextClassification,
    make_examples,
)
from lorax_ft.data.tokenization import Tokenizer

# The task of the model and of its objective that each task of the data trains.
MODEL_TASKS: dict[type, str] = {
    TextClassification: "sequence_classification",
    LanguageModelling: "causal_lm",
    PromptCompletion: "causal_lm",
    SequenceToSequence: "seq2seq_lm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run learns from: files, splits, the task, and how batches are made."""

    source: SourceConfig
    split: SplitConfig = SplitConfig()
    task: TaskConfig = TextClassification()
    loader: LoaderConfig = LoaderConfig()

    def __post_init__(self):
        longest, needed = self.loader.buckets[-1], self.task.max_length
        if longest < needed:
            raise ValueError(
                f"DataConfig: examples have up to {needed} tokens, and the longest bucket is "
                f"{longest}. Set loader.buckets to {(*self.loader.buckets, needed)}, or shorten "
                "the task's."
            )
        if not isinstance(self.task, SequenceToSequence) or self.loader.target_buckets is None:
            return
        longest, needed = self.loader.target_buckets[-1], self.task.max_target_length
        if longest < needed:
            raise ValueError(
                f"DataConfig: targets have up to {needed} tokens, and the longest bucket of "
                f"loader.target_buckets is {longest}. Add {needed} to them, or lower "
                "task.max_target_length."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of each split, which may be empty but for `train`."""

    task: str  # of the model and its objective
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    label_names: tuple[str, ...]  # of a classification, in the order of its classes
    pad_id: int
    tables: dict[str, Table]  # the rows as they were read, by split
    notes: tuple[str, ...]  # what the user should know: duplicates, leaks, texts that were cut

    def part(self, name: str) -> list[Example]:
        """The examples of a split. Raises ValueError where the config gives it no rows."""
        if name not in PARTS:
            raise ValueError(f"There is no split {name!r}; the splits are {', '.join(PARTS)}.")
        examples: list[Example] = getattr(self, name)
        if not examples:
            raise ValueError(
                f"The {name} split has no rows: set SourceConfig.{name} to a file, or "
                f"SplitConfig.{name} to a fraction."
            )
        return examples


def load_dataset(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Reads, splits and tokenises the data of a run.

    Raises ValueError, TypeError or OSError, naming file and row, for what cannot be read or used.
    """
    texts, columns = list(config.task.texts.values()), config.task.columns
    tables, notes = read_splits(config.source, config.split, texts, columns)
    examples = make_examples(tables, config.task, tokenizer)
    return Dataset(
        task=MODEL_TASKS[type(config.task)],
        train=examples.parts["train"],
        validation=examples.parts.get("validation", []),
        test=examples.parts.get("test", []),
        label_names=examples.label_names,
        pad_id=tokenizer.pad_id,
        tables=tables,
        notes=(*notes, *examples.notes),
    )


def check_fits(
    dataset: Dataset,
    *,
    vocabulary_size: int,
    positions: int | None = None,
    decoder_start_id: int | None = None,
) -> None:
    """Raises ValueError for an example that a model cannot read, which it would not notice itself.

    JAX reads beyond the end of an embedding table without an error; and a decoder that was trained
    to start with one token goes wrong with another.
    """
    for name in PARTS:
        for index, example in enumerate(getattr(dataset, name)):
            ids = example["input_ids"]
            target = example.get("decoder_input_ids", ids)
            if (largest := max(ids.max(initial=0), target.max(initial=0))) >= vocabulary_size:
                raise ValueError(
                    f"{name} example {index} has the token id {largest}, and the model's "
                    f"vocabulary has {vocabulary_size}: is this tokenizer the model's own?"
                )
            if decoder_start_id is not None and target[0] != decoder_start_id:
                raise ValueError(
                    f"The targets start with the token id {target[0]}, and the model's decoder "
                    f"with {decoder_start_id}: set task.decoder_start_id to that."
                )
            if positions is not None and len(ids) > positions:
                raise ValueError(
                    f"{name} example {index} has {len(ids)} tokens, and the model's positions end "
                    f"at {positions}: lower task.max_length (or length) to that."
                )
