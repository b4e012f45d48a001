"""The built-in corpus: the same on every call, plain sentences that do not say their label."""

import collections

import pytest

from lorax_ft.data.docstrings import PACKAGES, sentences
from lorax_ft.data.readers import BUILT_IN, SourceConfig, read


@pytest.fixture(scope="module")
def rows():
    return list(sentences())


def test_it_has_some_thousand_sentences_of_every_package(rows):
    counts = collections.Counter(row["label"] for row in rows)

    assert 2000 <= len(rows) <= 4000
    assert set(counts) == set(PACKAGES)
    assert min(counts.values()) >= 50
    assert max(counts.values()) < len(rows) / 3


def test_no_sentence_names_its_package_or_stands_twice(rows):
    assert not [row for row in rows if row["label"] in row["text"].lower()]
    assert len({row["text"].lower() for row in rows}) == len(rows)


def test_sentences_are_plain_words(rows):
    for row in rows:
        assert not set(row["text"]) & set("_`=<>[]{}\n:/\\"), row


def test_it_is_the_same_on_every_call(rows):
    assert list(sentences()) == rows


def test_files_are_read_and_never_run(tmp_path):
    for label, location in PACKAGES.items():
        file = tmp_path / location / ("" if location.endswith(".py") else "__init__.py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'"""It is one of the {label[::-1]} files of a test."""\nraise SystemExit')

    found = list(sentences(tmp_path))

    assert [row["label"] for row in found] == list(PACKAGES)
    assert found[0]["origin"] == "asyncio/__init__.py"


def test_a_python_without_source_files_is_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"no source files of 'asyncio'.*SourceConfig\.train"):
        list(sentences(tmp_path))


def test_it_is_read_like_any_source(rows):
    table = read(BUILT_IN, SourceConfig(train=BUILT_IN))

    assert len(table) == len(rows)
    assert set(table.columns) == {"text", "label", "origin"}
