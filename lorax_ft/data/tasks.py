"""Tasks: rows of text become examples: token ids with labels, ready for an objective."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lorax_ft.data.table import Table
from lorax_ft.data.tokenization import Encoded, Tokenizer
from lorax_ft.trees import nearest

Example = dict[str, np.ndarray]
"""`input_ids` [length] and `labels` ([] or [length]), int32; `token_type_ids` [length] of pairs; of
a source and its target `decoder_input_ids` and `labels` [target length]."""

Segment = tuple[str, str | None]
IGNORED = -100  # a label that is not scored, as in Hugging Face's data


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextClassification:
    """One class for a text, or for a pair of texts."""

    kind: Literal["text_classification"] = "text_classification"
    text: str = "text"  # name of the column
    text_pair: str | None = None  # column of a second text, such as a question's answer
    label: str = "label"  # column of strings or ints
    label_names: tuple[str, ...] = ()  # the classes in order; (): the sorted training labels
    max_length: int = 128  # in tokens; longer texts are cut, counted and reported

    def __post_init__(self):
        _check_positive(self, "max_length")
        if len(set(self.label_names)) < len(self.label_names):
            raise ValueError(
                f"TextClassification.label_names = {self.label_names!r}: a name stands twice."
            )

    @property
    def texts(self) -> dict[str, str]:
        """The columns that the model reads, by the field that names them."""
        pair = {"task.text_pair": self.text_pair} if self.text_pair is not None else {}
        return {"task.text": self.text} | pair

    @property
    def columns(self) -> dict[str, str]:
        """All columns of the task, by the field that names them."""
        return self.texts | {"task.label": self.label}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """The next token, over windows of the concatenated texts."""

    kind: Literal["language_modelling"] = "language_modelling"
    text: str = "text"
    length: int = 128  # of a window, in tokens; the last window of a split is what is left

    def __post_init__(self):
        if self.length < 2:
            raise ValueError(
                f"LanguageModelling.length = {self.length!r}: a window holds at least 2 tokens, "
                "one to read and one to predict."
            )

    @property
    def max_length(self) -> int:
        """The longest example, in tokens."""
        return self.length

    @property
    def texts(self) -> dict[str, str]:
        """The columns that the model reads, by the field that names them."""
        return {"task.text": self.text}

    @property
    def columns(self) -> dict[str, str]:
        """All columns of the task, by the field that names them."""
        return self.texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCompletion:
    """The next token, scored in the completion of a prompt and not in the prompt.

    `prompt` is text with the names of columns in braces, such as `"{question}\\nAnswer: "`; the
    completion ends with the tokenizer's end-of-sequence token.
    """

    kind: Literal["prompt_completion"] = "prompt_completion"
    prompt: str = "{prompt}"
    completion: str = "completion"  # name of the column
    max_length: int = 128  # in tokens, of both together; longer ones are cut at the end

    def __post_init__(self):
        _check_positive(self, "max_length")
        if not self.texts or "" in self.texts.values():
            raise ValueError(
                f"PromptCompletion.prompt = {self.prompt!r}: expected text with the name of a "
                "column in each pair of braces, and of at least one."
            )

    @property
    def segments(self) -> list[Segment]:
        """The prompt in order: text, and the column that comes after it."""
        return _segments(self, "prompt")

    @property
    def texts(self) -> dict[str, str]:
        """The columns that the prompt is made of, by where they are named."""
        return _template_columns(self, "prompt")

    @property
    def columns(self) -> dict[str, str]:
        """All columns of the task, by the field that names them."""
        return self.texts | {"task.completion": self.completion}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceToSequence:
    """A target text for a source text, by an encoder-decoder.

    `source` is text with the names of columns in braces, such as `"summarize: {article}"`; source
    and target end with the tokenizer's end-of-sequence token.
    """

    kind: Literal["sequence_to_sequence"] = "sequence_to_sequence"
    source: str = "{source}"
    target: str = "target"  # name of the column
    max_length: int = 128  # in tokens, of a source; longer texts are cut, counted and reported
    max_target_length: int = 128  # likewise, of a target
    decoder_start_id: int | None = None  # the first that the decoder reads; None: padding, as in T5

    def __post_init__(self):
        _check_positive(self, "max_length")
        _check_positive(self, "max_target_length")
        if not self.texts or "" in self.texts.values():
            raise ValueError(
                f"SequenceToSequence.source = {self.source!r}: expected text with the name of a "
                "column in each pair of braces, and of at least one."
            )

    @property
    def segments(self) -> list[Segment]:
        """The source in order: text, and the column that comes after it."""
        return _segments(self, "source")

    @property
    def texts(self) -> dict[str, str]:
        """The columns that the source is made of, by where they are named."""
        return _template_columns(self, "source")

    @property
    def columns(self) -> dict[str, str]:
        """All columns of the task, by the field that names them."""
        return self.texts | {"task.target": self.target}


TaskConfig = TextClassification | LanguageModelling | PromptCompletion | SequenceToSequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of each split, the names of the classes, and what the user should know."""

    parts: dict[str, list[Example]]
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_examples(tables: Mapping[str, Table], task: TaskConfig, tokenizer: Tokenizer) -> Examples:
    """Tokenises every split's rows for the task.

    Raises ValueError for a column that is not there, a label that the training rows do not have and
    a split without examples; TypeError for a text that is no string. All name file and row.
    """
    return MAKERS[type(task)](tables, task, tokenizer)


def label_texts(table: Table, task: TextClassification) -> list[str]:
    """Each row's label as a string. Raises TypeError for one that is neither string nor int."""
    values = table.column(task.label, field="task.label")
    for row, value in enumerate(values):
        if not isinstance(value, str | int):
            raise TypeError(
                f"{table.place(row)}: column {task.label!r} holds {value!r} "
                f"({type(value).__name__}); a label is a string or an int."
            )
    return [str(value) for value in values]


def sort_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The different labels, sorted: as numbers where all are ints.

    >>> sort_labels(["10", "9", "10"]), sort_labels(["b", "10", "a"])
    (('9', '10'), ('10', 'a', 'b'))
    """
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _classification(
    tables: Mapping[str, Table], task: TextClassification, tokenizer: Tokenizer
) -> Examples:
    names = task.label_names or sort_labels(label_texts(tables["train"], task))
    if len(names) < 2:
        raise ValueError(
            f"task.label = {task.label!r}: the training rows of {tables['train'].source} have the "
            f"one label {', '.join(names)!r}; a classification needs two or more."
        )
    parts, notes = {}, []
    for part, table in tables.items():
        labels = _label_ids(table, task, names)
        pairs = task.text_pair and table.texts(task.text_pair, field="task.text_pair")
        encoded = tokenizer.encode(
            table.texts(task.text, field="task.text"), pairs or None, max_length=task.max_length
        )
        columns = {"input_ids": encoded.input_ids, "labels": labels}
        if encoded.token_type_ids is not None:
            columns["token_type_ids"] = encoded.token_type_ids
        parts[part] = [dict(zip(columns, values)) for values in zip(*columns.values())]
        notes += _truncation_note(part, encoded.truncated, len(table), task.max_length)
    return Examples(parts=parts, label_names=names, notes=tuple(notes))


def _label_ids(table: Table, task: TextClassification, names: tuple[str, ...]) -> list[np.ndarray]:
    ids = {name: np.array(i, np.int32) for i, name in enumerate(names)}
    labels = label_texts(table, task)
    for row, label in enumerate(labels):
        if label not in ids:
            given = "task.label_names" if task.label_names else "the training rows"
            near = nearest(label, names, limit=1)
            raise ValueError(
                f"{table.place(row)}: the label {label!r} is not in {given}: {', '.join(names)}."
                + (f" Nearest: {near[0]!r}." if near else "")
                + " Correct the row, or name every label in task.label_names."
            )
    return [ids[label] for label in labels]


def _language_modelling(
    tables: Mapping[str, Table], task: LanguageModelling, tokenizer: Tokenizer
) -> Examples:
    parts = {}
    for part, table in tables.items():
        documents = tokenizer.encode(table.texts(task.text, field="task.text")).input_ids
        ids = np.concatenate(_with_separators(documents, tokenizer.eos_id))
        windows = [ids[start : start + task.length] for start in range(0, len(ids), task.length)]
        windows = [window for window in windows if len(window) > 1]  # one token predicts nothing
        if not windows:
            raise ValueError(f"{table.source}: the {part} split has fewer than 2 tokens.")
        parts[part] = [{"input_ids": window, "labels": window} for window in windows]
    return Examples(parts=parts)


def _with_separators(documents: list[np.ndarray], eos_id: int | None) -> list[np.ndarray]:
    """The documents with an end-of-sequence token between them, where there is one."""
    if eos_id is None:
        return documents
    end = np.array([eos_id], np.int32)
    return [part for document in documents for part in (end, document)][1:]


def _prompt_completion(
    tables: Mapping[str, Table], task: PromptCompletion, tokenizer: Tokenizer
) -> Examples:
    parts, notes = {}, []
    for part, table in tables.items():
        prompts = tokenizer.encode(fill_template(table, task)).input_ids
        completions = tokenizer.encode(
            table.texts(task.completion, field="task.completion"), special_tokens=False
        ).input_ids
        end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
        whole = [np.concatenate([p, c, end]) for p, c in zip(prompts, completions)]
        parts[part] = [
            _scored_after(len(prompt), ids[: task.max_length])
            for ids, prompt in zip(whole, prompts)
            if len(prompt) < min(len(ids), task.max_length)
        ]
        notes += _truncation_note(
            part, sum(len(ids) > task.max_length for ids in whole), len(whole), task.max_length
        )
        if left_out := len(whole) - len(parts[part]):
            notes.append(f"{left_out:,} {part} rows were left out: no room after the prompt.")
        if not parts[part]:
            raise ValueError(
                f"{table.source}: no prompt of the {part} split leaves room for a completion "
                f"within {task.max_length} tokens. Raise task.max_length."
            )
    return Examples(parts=parts, notes=tuple(notes))


def fill_template(table: Table, task: PromptCompletion | SequenceToSequence) -> list[str]:
    """The text of each row that a task with a template reads."""
    columns: dict[str | None, list[str]] = {
        name: table.texts(name, field=field) for field, name in task.texts.items()
    }
    columns[None] = [""] * len(table)  # after the last text there may be no column
    return [
        "".join(text + columns[name][row] for text, name in task.segments)
        for row in range(len(table))
    ]


def _scored_after(prompt_length: int, ids: np.ndarray) -> Example:
    labels = np.where(np.arange(len(ids)) < prompt_length, IGNORED, ids).astype(np.int32)
    return {"input_ids": ids, "labels": labels}


def _sequence_to_sequence(
    tables: Mapping[str, Table], task: SequenceToSequence, tokenizer: Tokenizer
) -> Examples:
    start = tokenizer.pad_id if task.decoder_start_id is None else task.decoder_start_id
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    parts, notes, longest = {}, [], task.max_target_length
    for part, table in tables.items():
        sources = encode_sources(tokenizer, fill_template(table, task), max_length=task.max_length)
        targets = tokenizer.encode(
            table.texts(task.target, field="task.target"), special_tokens=False
        ).input_ids
        whole = [np.concatenate([target, end]).astype(np.int32) for target in targets]
        pairs = [(s, t[:longest]) for s, t in zip(sources.input_ids, whole) if len(t)]
        parts[part] = [
            {"input_ids": s, "decoder_input_ids": _shifted(t, start), "labels": t} for s, t in pairs
        ]
        notes += _truncation_note(part, sources.truncated, len(table), task.max_length)
        if cut := sum(len(target) > longest for target in whole):
            notes.append(
                f"{cut:,} of {len(table):,} {part} targets were cut to {longest} tokens "
                "(task.max_target_length)."
            )
        if left_out := len(table) - len(pairs):
            notes.append(f"{left_out:,} {part} rows were left out: their targets have no token.")
        if not pairs:
            raise ValueError(f"{table.source}: no target of the {part} split has a token.")
    return Examples(parts=parts, notes=tuple(notes))


def encode_sources(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int | None = None
) -> Encoded:
    """Token ids of sources, with the end that an encoder-decoder's texts have.

    T5's own tokenizers put it there; a SentencePiece model by itself does not.
    """
    encoded, end = tokenizer.encode(texts, max_length=max_length), tokenizer.eos_id
    room = None if max_length is None else max_length - 1
    ids = [
        row
        if end is None or (len(row) and row[-1] == end)
        else np.append(row[:room], np.int32(end))
        for row in encoded.input_ids
    ]
    return dataclasses.replace(encoded, input_ids=ids)


def _shifted(target: np.ndarray, start: int) -> np.ndarray:
    return np.concatenate([[start], target[:-1]]).astype(np.int32)


MAKERS: dict[type, Callable[..., Examples]] = {
    TextClassification: _classification,
    LanguageModelling: _language_modelling,
    PromptCompletion: _prompt_completion,
    SequenceToSequence: _sequence_to_sequence,
}


# --- Templates ------------------------------------------------------------------------------------


def source_of(task: SequenceToSequence, text: str) -> str:
    """The source that has `text` in the place of its column. Raises ValueError for several."""
    if len(task.texts) > 1:
        raise ValueError(
            f"SequenceToSequence.source = {task.source!r} is made of {len(task.texts)} columns: "
            "one text does not fill it."
        )
    return "".join(before + (text if name else "") for before, name in task.segments)


def _segments(task: Any, field: str) -> list[Segment]:
    """A template in order: text, and the column that comes after it."""
    template = getattr(task, field)
    try:
        return [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(
            f"{type(task).__name__}.{field} = {template!r}: {error}. A brace that is meant as "
            "such is written twice."
        ) from None


def _template_columns(task: Any, field: str) -> dict[str, str]:
    names = [name for _, name in task.segments if name is not None]
    return {f"task.{field} {{{name}}}": name for name in names}


def _truncation_note(part: str, count: int, of: int, max_length: int) -> list[str]:
    if not count:
        return []
    return [f"{count:,} of {of:,} {part} texts were cut to {max_length} tokens (task.max_length)."]


def _check_positive(config: Any, field: str) -> None:
    if getattr(config, field) < 2:
        raise ValueError(
            f"{type(config).__name__}.{field} = {getattr(config, field)!r}: expected 2 or more."
        )
