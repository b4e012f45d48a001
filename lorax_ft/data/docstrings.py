"""A corpus that every machine has: sentences of the standard library's docstrings, by package."""

from __future__ import annotations

import ast
import pathlib
import re
import sysconfig
from collections.abc import Iterator

# Those with the most plain sentences of the packages that all Python versions have, and where in
# the library each is written.
PACKAGES = {
    "asyncio": "asyncio",
    "decimal": "_pydecimal.py",
    "difflib": "difflib.py",
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "ipaddress": "ipaddress.py",
    "logging": "logging",
    "typing": "typing.py",
    "unittest": "unittest",
    "urllib": "urllib",
    "xml": "xml",
}
MIN_WORDS, MAX_WORDS = 5, 40

EXAMPLE = re.compile(r"^\s*(>>>|\.\.\.).*$", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;()'\"-]*[.!?]")  # no code, no mark-up, no abbreviations
MIXED_CASE = re.compile(r"[a-z][A-Z]")  # a name such as LogRecord


def sentences(library: str | pathlib.Path | None = None) -> Iterator[dict[str, str]]:
    """Rows `{"text", "label", "origin"}`: a sentence, its package, its top-level class or function.

    The task is to name the package. Sentences that say its name, or hold identifiers or code, are
    left out, as are repetitions. For a fair test split by `origin`: sentences on one class resemble
    each other. The source files are parsed, never imported; `library` is the running Python's
    unless given. Raises ValueError where it has no source files.

    >>> sorted(next(sentences()))
    ['label', 'origin', 'text']
    """
    root = pathlib.Path(library or sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for label, location in PACKAGES.items():
        path = root / location
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(
                f"{path}: this Python has no source files of {label!r}, which the built-in corpus "
                "is made of. Name a file of your own in SourceConfig.train."
            )
        for file in files:
            for origin, docstring in _docstrings(file, file.relative_to(root).as_posix()):
                for text in plain_sentences(docstring, label):
                    if text.lower() not in seen:
                        seen.add(text.lower())
                        yield {"text": text, "label": label, "origin": origin}


def plain_sentences(docstring: str, label: str) -> Iterator[str]:
    """The sentences of a docstring that are plain words, of a fit length, and do not say `label`.

    >>> text = "Send a message.  It goes to the given host at once.  See `smtplib`.\\n\\n>>> 1 + 1"
    >>> list(plain_sentences(text, "email"))
    ['It goes to the given host at once.']
    """
    for paragraph in re.split(r"\n\s*\n", EXAMPLE.sub("\n", docstring)):
        for text in SENTENCE_END.split(" ".join(paragraph.split())):
            fits = MIN_WORDS <= len(text.split()) <= MAX_WORDS and label not in text.lower()
            if fits and PLAIN.fullmatch(text) and not MIXED_CASE.search(text):
                yield text


def _docstrings(file: pathlib.Path, name: str) -> Iterator[tuple[str, str]]:
    """Every docstring of a file with the top-level class or function that it stands in."""
    module = ast.parse(file.read_bytes())
    if text := ast.get_docstring(module):
        yield name, text
    for statement in module.body:
        for node in ast.walk(statement):
            documented = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if documented and (text := ast.get_docstring(node)):
                yield f"{name}:{getattr(statement, 'name', statement.lineno)}", text
