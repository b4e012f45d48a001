"""A data set as a run uses it: from the config's files to the examples of each split."""

from __future__ import annotations

import dataclasses

from lorax_ft.data.loader import LoaderConfig
from lorax_ft.data.packing import pack
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
    packed_length: int | None = None
    """Of rows, in tokens, that several examples share; it is then the last of `loader.buckets`.
    None: each example has a row of its own."""

    def __post_init__(self):
        if self.packed_length is not None:
            self._check_packing(self.packed_length)
            shorter = (bucket for bucket in self.loader.buckets if bucket < self.packed_length)
            loader = dataclasses.replace(self.loader, buckets=(*shorter, self.packed_length))
            object.__setattr__(self, "loader", loader)
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

    def _check_packing(self, length: int) -> None:
        if MODEL_TASKS[type(self.task)] != "causal_lm":
            raise ValueError(
                f"DataConfig.packed_length = {length}: examples of {self.task.kind} cannot share a "
                "row, only texts whose next tokens are predicted. Set data.packed_length to None."
            )
        if length < self.task.max_length:
            raise ValueError(
                f"DataConfig.packed_length = {length}: examples have up to {self.task.max_length} "
                "tokens. Raise data.packed_length to that, or lower task.max_length (or length)."
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
    parts, packing = examples.parts, []
    if config.packed_length is not None:
        parts = {name: pack(rows, config.packed_length) for name, rows in parts.items()}
        packing = [_packing_note(name, examples.parts[name], parts[name]) for name in parts]
    return Dataset(
        task=MODEL_TASKS[type(config.task)],
        train=parts["train"],
        validation=parts.get("validation", []),
        test=parts.get("test", []),
        label_names=examples.label_names,
        pad_id=tokenizer.pad_id,
        tables=tables,
        notes=(*notes, *examples.notes, *packing),
    )


def _packing_note(part: str, examples: list[Example], rows: list[Example]) -> str:
    longest = max(len(row["input_ids"]) for row in rows)
    share = sum(len(row["input_ids"]) for row in rows) / (longest * len(rows))
    return f"{len(examples):,} {part} examples fill {len(rows):,} rows, {share:.0%} of them tokens."


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
                    f"at {positions}: lower task.max_length (or length, or data.packed_length) to "
                    "that."
                )
