"""Packing: several short examples to a row, so that little of a batch is padding.

Each token knows the example that it is of (`segment_ids`, from 1; 0 is padding) and its place there
(`position_ids`), and a model sees no further than its own: what is computed of an example is what
would be alone.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from lorax_ft.data.tasks import IGNORED, Example


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Examples of next tokens as rows of at most `length` tokens, each whole and once.

    The first token of an example is nothing that the one before it predicts, so its label is
    ignored. Raises ValueError for an example that is longer than a row, or has other labels than
    one a token.

    >>> rows = pack([{"input_ids": np.arange(n), "labels": np.arange(n)} for n in (3, 4, 2)], 6)
    >>> [row["segment_ids"].tolist() for row in rows]
    [[1, 1, 1], [1, 1, 1, 1, 2, 2]]
    """
    for index, example in enumerate(examples):
        ids, labels = example["input_ids"], example["labels"]
        if len(ids) > length:
            raise ValueError(
                f"Example {index} has {len(ids)} tokens, and packed rows have {length}: raise "
                "data.packed_length, or lower task.max_length."
            )
        if set(example) != {"input_ids", "labels"} or labels.shape != ids.shape:
            raise ValueError(
                f"Example {index} has {', '.join(sorted(example))}: only texts whose next tokens "
                "are predicted can be packed. Set data.packed_length to None."
            )
    lengths = [len(example["input_ids"]) for example in examples]
    return [_row([examples[i] for i in row]) for row in fill_rows(lengths, length)]


def fill_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items stand in each row: the longest first, each where it leaves the least room.

    That is best fit decreasing, which fills at most 11/9 of the rows that are needed, and 6/9 of
    one more (Johnson 1973). Items keep their order within a row, and rows are in that of their
    first items.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = collections.defaultdict(list)  # numbers of rows
    open_rooms = 0  # bit i: there is a row with room for i
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[item]
        fitting = open_rooms >> need
        if fitting:
            left = need + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            if not by_room[left]:
                open_rooms &= ~(1 << left)
            rows[row].append(item)
        else:
            left, row = room, len(rows)
            rows.append([item])
        by_room[left - need].append(row)
        open_rooms |= 1 << (left - need)
    return sorted(sorted(row) for row in rows)


def _row(examples: Sequence[Example]) -> Example:
    lengths = [len(example["input_ids"]) for example in examples]
    labels = [np.concatenate([[IGNORED], e["labels"][1:]]) for e in examples if len(e["labels"])]
    columns = {
        "input_ids": [example["input_ids"] for example in examples],
        "labels": labels,
        "segment_ids": [np.full(n, i) for i, n in enumerate(lengths, 1)],
        "position_ids": [np.arange(n) for n in lengths],
    }
    return {name: np.concatenate(parts).astype(np.int32) for name, parts in columns.items()}
