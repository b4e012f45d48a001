"""Readers: JSON, CSV, TSV, Parquet, text files, Hugging Face data sets, the built-in corpus."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorax_ft.data import docstrings
from lorax_ft.data.table import Table
from lorax_ft.trees import nearest

BUILT_IN = "builtin:docstrings"
SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tsv": "tsv",
    ".txt": "text",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the rows of each split stand, and how to read them.

    `train`, `validation` and `test` are files; or names of splits where `hub` is given; `train` may
    be `"builtin:docstrings"`, sentences from the documentation of Python's standard library.

    Formats are `jsonl` (an object a line), `json` (a list of objects), `csv` (quoted fields), `tsv`
    (tabs, a quotation mark being an ordinary character), `parquet`, `lines` (a row a line, its
    columns the named groups of `pattern`) and `text` (the whole file as one row's `text`). `auto`
    goes by the file's suffix, or is `lines` where there is a pattern.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    format: str = "auto"
    encoding: str = "utf-8"
    columns: tuple[str, ...] = ()  # names for the columns of a csv or tsv without a header line
    delimiter: str | None = None  # between the fields of a csv or tsv, where not "," or a tab
    pattern: str | None = None  # regex over each whole line: r"(?P<label>\w+)\t(?P<text>.*)"
    hub: str | None = None  # name of a Hugging Face data set, such as "nyu-mll/glue" ...
    subset: str | None = None  # ... and of its configuration, such as "cola"

    def __post_init__(self):
        if self.format not in ("auto", *READERS):
            near = nearest(self.format, READERS, limit=1)
            raise ValueError(
                f"SourceConfig.format = {self.format!r}: expected 'auto' or one of "
                f"{', '.join(READERS)}." + (f" Nearest: {near[0]!r}." if near else "")
            )
        _check_encoding(self.encoding)
        _check_pattern(self.pattern, self.format)
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise ValueError(
                f"SourceConfig.delimiter = {self.delimiter!r}: expected one character; for more, "
                "split the line with SourceConfig.pattern."
            )
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"SourceConfig.columns = {self.columns!r}: a name stands twice.")
        if self.subset is not None and self.hub is None:
            raise ValueError(f"SourceConfig.subset = {self.subset!r} needs SourceConfig.hub.")


def read(path: str, source: SourceConfig) -> Table:
    """Reads one file, or one split of `source.hub`, whole into memory.

    Raises FileNotFoundError for a missing file and ValueError for one that cannot be read as its
    format, naming file and line; also for one without rows.
    """
    if source.hub is not None:
        table = _read_hub(source.hub, source.subset, path)
    elif path == BUILT_IN:
        table = _table(BUILT_IN, list(enumerate(docstrings.sentences(), start=1)))
    else:
        table = _read_file(pathlib.Path(path).expanduser(), source)
    if not len(table):
        raise ValueError(f"{table.source} holds no rows.")
    return table


def format_of(path: pathlib.Path, source: SourceConfig) -> str:
    """The format a file is read as. Raises ValueError where neither config nor suffix tells."""
    if source.format != "auto":
        return source.format
    if source.pattern is not None:
        return "lines"
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: the suffix {path.suffix!r} is none of {', '.join(SUFFIXES)}. Set "
            f"SourceConfig.format to one of {', '.join(READERS)}, or SourceConfig.pattern."
        )
    return SUFFIXES[path.suffix.lower()]


Placed = tuple[int, dict[str, Any]]  # a row's line or number, and its values by column


def _read_file(path: pathlib.Path, source: SourceConfig) -> Table:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = nearest(path.name, siblings, limit=1)
        raise FileNotFoundError(
            f"{path}: there is no such file."
            + (f" Nearest there: {near[0]!r}." if near else "")
            + " For a Hugging Face data set set SourceConfig.hub, and name its split here."
        )
    return READERS[format_of(path, source)](path, source)


def _read_jsonl(path: pathlib.Path, source: SourceConfig) -> Table:
    rows: list[Placed] = []
    for number, line in _lines(path, source):
        if not line.strip():
            continue
        try:
            rows.append((number, _object(json.loads(line), f"{path}, line {number}")))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}: "
                f"{_excerpt(line)}. Each line must be one whole object."
            ) from None
    return _table(str(path), rows, unit="line")


def _read_json(path: pathlib.Path, source: SourceConfig) -> Table:
    try:
        values = json.loads(_decode(path, source.encoding))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}. "
            "For a file with an object on each line set SourceConfig.format to 'jsonl'."
        ) from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a list of objects, found a {type(values).__name__}.")
    return _table(
        str(path), [(n, _object(v, f"{path}, row {n}")) for n, v in enumerate(values, start=1)]
    )


def _read_csv(path: pathlib.Path, source: SourceConfig) -> Table:
    return _read_delimited(path, source, source.delimiter or ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: pathlib.Path, source: SourceConfig) -> Table:
    return _read_delimited(path, source, source.delimiter or "\t", csv.QUOTE_NONE)


def _read_delimited(
    path: pathlib.Path, source: SourceConfig, delimiter: str, quoting: Any
) -> Table:
    text = io.StringIO(_decode(path, source.encoding), newline="")
    reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
    names, rows = list(source.columns), []
    while True:
        number = reader.line_num + 1  # a quoted field may go over several lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {number}: {error}. Are the quotation marks ordinary characters? "
                "Then set SourceConfig.format to 'tsv', and SourceConfig.delimiter."
            ) from None
        if fields is None:
            return _table(str(path), rows, unit="line", names=names)
        if not fields:  # an empty line
            continue
        if not names:
            names = _header(fields, f"{path}, line {number}")
        elif len(fields) != len(names):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields where there are {len(names)} columns "
                f"({', '.join(names)}): {_excerpt(delimiter.join(fields))}. See "
                "SourceConfig.columns, delimiter and format."
            )
        else:
            rows.append((number, dict(zip(names, fields))))


def _read_lines(path: pathlib.Path, source: SourceConfig) -> Table:
    pattern = re.compile(source.pattern or "(?P<text>.*)")
    rows: list[Placed] = []
    for number, line in _lines(path, source):
        if not line.strip():
            continue
        match = pattern.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: SourceConfig.pattern = {source.pattern!r} does not match "
                f"the whole line {_excerpt(line)}."
            )
        rows.append((number, match.groupdict()))
    return _table(str(path), rows, unit="line")


def _read_text(path: pathlib.Path, source: SourceConfig) -> Table:
    text = _decode(path, source.encoding).replace("\r\n", "\n")
    return _table(str(path), [(1, {"text": text})] if text.strip() else [], unit="line")


def _read_parquet(path: pathlib.Path, source: SourceConfig) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no whole Parquet file: {error}") from None
    rows = len(next(iter(columns.values()), ()))
    return Table(source=str(path), columns=columns, places=range(1, rows + 1))


def _read_hub(name: str, subset: str | None, split: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name}: a Hugging Face data set needs: pip install datasets") from error
    try:
        data = datasets.load_dataset(name, subset, split=split)
    except (ConnectionError, OSError) as error:
        raise OSError(
            f"The Hugging Face data set {name!r} could not be loaded: {error}. Without a network "
            "it must be in the cache already; or download its files, and name them in SourceConfig."
        ) from error
    columns = {column: list(data[column]) for column in data.column_names}
    for column, feature in data.features.items():
        if isinstance(feature, datasets.ClassLabel):  # numbers; -1 stands for none
            columns[column] = [None if v == -1 else feature.int2str(v) for v in columns[column]]
    source = f"{name}/{subset}:{split}" if subset else f"{name}:{split}"
    return Table(source=source, columns=columns, places=range(1, len(data) + 1))


READERS: dict[str, Callable[[pathlib.Path, SourceConfig], Table]] = {
    "csv": _read_csv,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "lines": _read_lines,
    "parquet": _read_parquet,
    "text": _read_text,
    "tsv": _read_tsv,
}


def _table(
    source: str, rows: Sequence[Placed], *, unit: str = "row", names: Sequence[str] = ()
) -> Table:
    """A table of rows as dicts; a value that a row lacks is None."""
    names = list(names) or list(dict.fromkeys(name for _, row in rows for name in row))
    columns = {name: [row.get(name) for _, row in rows] for name in names}
    return Table(source=source, columns=columns, places=[place for place, _ in rows], unit=unit)


def _lines(path: pathlib.Path, source: SourceConfig) -> Iterator[tuple[int, str]]:
    """Lines by number, ended by newlines alone: in Latin-1 text `str.splitlines` would cut more."""
    text = io.StringIO(_decode(path, source.encoding), newline=None)
    return enumerate((line.rstrip("\n") for line in text), start=1)


def _decode(path: pathlib.Path, encoding: str) -> str:
    """A file's text. Raises ValueError naming the first byte that is not in the encoding."""
    content = path.read_bytes()
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    try:
        return content.decode("utf-8-sig" if is_utf8 else encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        remedy = "'latin-1' or 'cp1252'" if is_utf8 else "'utf-8'"
        raise ValueError(
            f"{path}, line {line}: byte {content[error.start]:#04x} at offset {error.start} is not "
            f"{encoding}. Set SourceConfig.encoding to the file's own, such as {remedy}."
        ) from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{place}: expected an object with a value for each column, found {_excerpt(value)}."
        )
    return value


def _header(names: list[str], place: str) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(
            f"{place}: the header {names!r} has a name twice. If that line is no header, name the "
            "columns in SourceConfig.columns."
        )
    return names


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_encoding(encoding: str) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(
            f"SourceConfig.encoding = {encoding!r}: Python knows no such encoding; usual ones are "
            "'utf-8', 'latin-1' and 'cp1252'."
        ) from None


def _check_pattern(pattern: str | None, file_format: str) -> None:
    if pattern is None:
        return
    if file_format not in ("auto", "lines"):
        raise ValueError(
            f"SourceConfig.pattern reads the lines of a text file, and format is {file_format!r}. "
            "Leave one of the two out."
        )
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(
            f"SourceConfig.pattern = {pattern!r} is no regular expression ({error})."
        ) from None
    if not groups:
        raise ValueError(
            f"SourceConfig.pattern = {pattern!r} names no columns: write the part of a column as "
            "(?P<name>...)."
        )
