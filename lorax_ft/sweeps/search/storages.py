"""Where a search's studies are: opened in Optuna's storage, and told of without its secrets."""

from __future__ import annotations

import contextlib
import json
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from lorax_ft import runs
from lorax_ft.models.tensor_files import read_json
from lorax_ft.sweeps.search.strategies import load_optuna

RECORD = "study.json"  # in a group's folder: which study of a shared storage is its own


def place(url: str) -> str:
    """Which studies a storage has: its kind and database. Who asks, and by what host, may change.

    >>> place("postgresql+psycopg2://me:secret@db.example:5432/studies?sslmode=require")
    'postgresql:///studies'
    """
    parsed = _parse(url)
    return f"{parsed.get_backend_name()}:///{parsed.database or ''}"


def told(url: str) -> str:
    """The URL as messages may have it.

    >>> told("postgresql+psycopg2://me:secret@db.example:5432/studies?password=secret")
    'postgresql+psycopg2://me:***@db.example:5432/studies'
    """
    return _parse(url).set(query={}).render_as_string(hide_password=True)


def open_study(url: str | None, name: str, folder: pathlib.Path, direction: str) -> Any:
    """A group's study, made or gone on with.

    Without a URL it is in SQLite in the group's folder: no two workers write to one file, which not
    every shared storage allows. Else its name gets an ending that no other has, kept in the folder:
    a sweep elsewhere, whose directory has the same name, does not find its trials.
    Raises ImportError without Optuna, OSError where the storage cannot be reached, ValueError for a
    URL that is none and for a storage without the study that was begun.
    """
    optuna = load_optuna()
    folder.mkdir(parents=True, exist_ok=True)
    if url is None:
        url = f"sqlite:///{folder / 'study.db'}"
        with _reaching(url):
            return optuna.create_study(
                study_name=name, storage=url, direction=direction, load_if_exists=True
            )
    path = folder / RECORD
    with _reaching(url):
        if path.exists():
            return optuna.load_study(study_name=read_json(path)["study"], storage=url)
        name = f"{name}-{uuid.uuid4().hex[:12]}"
        study = optuna.create_study(study_name=name, storage=url, direction=direction)
    runs.write_text(path, json.dumps({"study": name, "storage": told(url)}, indent=2) + "\n")
    return study


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Makes errors of a storage ours, without those that they came of: these may have the URL."""
    shown = told(url)
    try:
        yield
    except KeyError:
        raise ValueError(
            f"Search.storage = {shown!r} does not have the study that was begun. Give the storage "
            "that has it, or another --sweep_dir."
        ) from None
    except ValueError as error:
        raise ValueError(f"Search.storage = {shown!r}: {_without_secrets(error, url)}") from None
    except Exception as error:
        raise OSError(
            f"Search.storage: the study at {shown} cannot be reached: "
            f"{_without_secrets(error, url)}"
        ) from None


def _parse(url: str) -> Any:
    """SQLAlchemy's URL. Raises ValueError for what is none; it may be a slip, and is not told."""
    load_optuna()
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(
            "Search.storage is no URL of a database, expected one such as "
            "postgresql://user:password@host/database or sqlite:///studies.db."
        ) from None


def _without_secrets(error: Exception, url: str) -> str:
    parsed, text = _parse(url), str(error).replace(url, told(url))
    for value in (parsed.password, *parsed.query.values()):
        if value:
            text = text.replace(str(value), "***").replace(quote(str(value), safe=""), "***")
    return text
