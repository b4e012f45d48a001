"""Splits: rows held out, by files of their own or as a fraction of the training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lorax_ft.data import readers
from lorax_ft.data.readers import SourceConfig
from lorax_ft.data.table import Table, first_of_equals

PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which fractions of the training rows are held out where a split has no file of its own.

    Rows of equal text fall on the same side; with `group`, rows that share a value in that column
    do. A source of one document (a language model's text file) is cut instead: its last part is
    held out.
    """

    validation: float = 0.0
    test: float = 0.0
    seed: int = 0
    group: str | None = None
    deduplicate: bool = False  # keep the first of equal rows in each file, before it is split

    def __post_init__(self):
        for field in ("validation", "test"):
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise ValueError(
                    f"SplitConfig.{field} = {value!r}: expected a fraction from 0 up to 1."
                )
        if self.validation + self.test >= 1:
            raise ValueError(
                f"SplitConfig: validation {self.validation} and test {self.test} leave no rows to "
                "train on; together they must be below 1."
            )


def read_splits(
    source: SourceConfig, split: SplitConfig, texts: Sequence[str], columns: Mapping[str, str]
) -> tuple[dict[str, Table], list[str]]:
    """Reads every split: `{"train": …, "validation": …, "test": …}`, those that there are.

    `texts` are the columns that the model reads; `columns` are all that the task needs, each by the
    config field that names it, and duplicates are rows equal in these. The second result is what
    the user should know: duplicates, and held-out texts that are also trained on. Raises ValueError
    for a column that is not there and for a split that is given twice or comes out empty, and what
    `readers.read` raises.
    """
    _check_given_once(source, split)
    given = {name: path for name in PARTS if (path := getattr(source, name)) is not None}
    tables: dict[str, Table] = {}
    notes: list[str] = []
    for name, path in given.items():
        table = readers.read(path, source)
        for field, column in columns.items():
            table.column(column, field=field)
        tables[name], note = _deduplicate(table, list(columns.values()), split.deduplicate)
        notes += note
    tables = hold_out(tables.pop("train"), split, texts) | tables
    return {name: tables[name] for name in PARTS if name in tables}, notes + _leaks(tables, texts)


def hold_out(table: Table, config: SplitConfig, texts: Sequence[str]) -> dict[str, Table]:
    """Splits one table into "train" and the fractions that are above zero, in the table's order.

    Raises ValueError where a part comes out empty.
    """
    fractions = {"validation": config.validation, "test": config.test}
    fractions = {name: fraction for name, fraction in fractions.items() if fraction}
    if not fractions:
        return {"train": table}
    if len(table) == 1 and len(texts) == 1:
        parts = _cut_document(table, fractions, texts[0])
    else:
        rows = _split_rows(table, fractions, config, texts)
        parts = {name: table.take(sorted(rows[name])) for name in rows}
    for name, part in parts.items():
        if not len(part):
            raise ValueError(
                f"The {name} split of {table.source} is empty: SplitConfig takes "
                f"{fractions.get(name, 'the rest')} of {len(table)} rows. Give more rows, another "
                f"fraction, or a file in SourceConfig.{name}."
            )
    return parts


def _split_rows(
    table: Table, fractions: dict[str, float], config: SplitConfig, texts: Sequence[str]
) -> dict[str, list[int]]:
    """Deals groups of rows, in an order that the seed decides, until each part has its share."""
    if config.group is not None:
        table.column(config.group, field="SplitConfig.group")
    names = texts if config.group is None else [config.group]
    members: dict[object, list[int]] = {}
    for row in range(len(table)):
        members.setdefault(table.key(row, names), []).append(row)
    groups = list(members.values())
    shuffled = [groups[g] for g in np.random.default_rng(config.seed).permutation(len(groups))]
    rows: dict[str, list[int]] = {}
    for name, fraction in fractions.items():
        rows[name] = []
        while shuffled and len(rows[name]) < round(fraction * len(table)):
            rows[name] += shuffled.pop()
    return {"train": [row for group in shuffled for row in group], **rows}


def _cut_document(table: Table, fractions: dict[str, float], column: str) -> dict[str, Table]:
    """Cuts the only row's text at line ends: first what is trained on, then what is held out."""
    text = table.texts(column, field="task.text")[0]
    shares = {"train": 1 - sum(fractions.values()), **fractions}
    parts, start, share = {}, 0, 0.0
    for name in shares:
        share += shares[name]
        newline = text.find("\n", round(share * len(text)) - 1)
        end = len(text) if newline < 0 or name == list(shares)[-1] else newline + 1
        piece = text[start:end]
        rows = [0] if piece.strip() else []
        columns = {column: [piece] * len(rows)}
        parts[name] = dataclasses.replace(table, columns=columns, places=[1] * len(rows))
        start = end
    return parts


def _deduplicate(table: Table, identity: Sequence[str], drop: bool) -> tuple[Table, list[str]]:
    first = first_of_equals(table, identity)
    repeated = len(table) - len(first)
    if not repeated:
        return table, []
    if drop:
        return table.take(first), [f"{table.source}: {repeated:,} duplicate rows were left out."]
    return table, [
        f"{table.source}: {repeated:,} of {len(table):,} rows are duplicates; "
        "SplitConfig.deduplicate leaves them out."
    ]


def _leaks(tables: dict[str, Table], texts: Sequence[str]) -> list[str]:
    """A note for each held-out table some of whose texts are trained on."""
    train = tables["train"]
    seen = {train.key(row, texts) for row in range(len(train))}
    notes = []
    for name, table in tables.items():
        count = sum(table.key(row, texts) in seen for row in range(len(table)))
        if name != "train" and count:
            notes.append(f"{count:,} of {len(table):,} {name} rows have a text that is trained on.")
    return notes


def _check_given_once(source: SourceConfig, split: SplitConfig) -> None:
    for name in ("validation", "test"):
        path, fraction = getattr(source, name), getattr(split, name)
        if path is not None and fraction:
            raise ValueError(
                f"The {name} split is given twice: SourceConfig.{name} = {path!r} and "
                f"SplitConfig.{name} = {fraction!r}. Leave one out."
            )
