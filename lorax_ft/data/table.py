"""Tables: the rows of one source column by column, each row knowing its place in the source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.trees import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of equal length, and where each row was read, so that an error can name it."""

    source: str  # the file or data set
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[int]  # of each row in its source, counted from 1 ...
    unit: str = "row"  # ... in lines or rows

    def __post_init__(self):
        assert all(len(values) == len(self.places) for values in self.columns.values())

    def __len__(self) -> int:
        return len(self.places)

    def place(self, row: int) -> str:
        """Where a row stands: `train.csv, line 17`."""
        return f"{self.source}, {self.unit} {self.places[row]}"

    def column(self, name: str, *, field: str) -> Sequence[Any]:
        """A column's values. Raises ValueError naming the config field where it is not there."""
        if name not in self.columns:
            near = nearest(name, self.columns, limit=1)
            raise ValueError(
                f"{field} = {name!r}: {self.source} has no such column. Its columns are "
                f"{', '.join(map(repr, self.columns))}."
                + (f" Did you mean {near[0]!r}?" if near else f" Set {field} to one of them.")
            )
        return self.columns[name]

    def texts(self, name: str, *, field: str) -> list[str]:
        """A column of nothing but strings. Raises TypeError naming the first other value."""
        values = self.column(name, field=field)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise TypeError(
                    f"{self.place(row)}: column {name!r} holds {value!r} "
                    f"({type(value).__name__}), not text. Correct or remove the row, or name "
                    f"another column in {field}."
                )
        return list(values)

    def take(self, rows: Sequence[int]) -> Table:
        """The table of these rows, in this order."""
        columns = {name: [values[r] for r in rows] for name, values in self.columns.items()}
        return dataclasses.replace(self, columns=columns, places=[self.places[r] for r in rows])

    def key(self, row: int, names: Sequence[str]) -> tuple[Any, ...]:
        """A row's values in some columns, as something that can be compared and hashed."""
        return tuple(_hashable(self.columns[name][row]) for name in names)


def first_of_equals(table: Table, names: Sequence[str]) -> list[int]:
    """The rows whose values in the columns `names` no earlier row has."""
    first: dict[tuple[Any, ...], int] = {}
    for row in range(len(table)):
        first.setdefault(table.key(row, names), row)
    return list(first.values())


def _hashable(value: Any) -> Any:
    return repr(value) if isinstance(value, list | dict) else value
