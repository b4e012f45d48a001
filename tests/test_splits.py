"""Splits: nothing is lost, nothing leaks, and the seed alone decides which side a row falls on."""

import pytest

from lorax_ft.data.readers import SourceConfig
from lorax_ft.data.splits import SplitConfig, hold_out, read_splits
from lorax_ft.data.table import Table

COLUMNS = {"task.text": "text", "task.label": "label"}


def table(**columns):
    rows = len(next(iter(columns.values())))
    return Table(source="rows.csv", columns=columns, places=range(1, rows + 1))


def texts(count):
    return table(text=[f"text {i}" for i in range(count)])


def test_every_row_is_in_exactly_one_part_and_in_its_order():
    parts = hold_out(texts(100), SplitConfig(validation=0.2, test=0.3), ["text"])

    assert {name: len(part) for name, part in parts.items()} == {
        "train": 50,
        "validation": 20,
        "test": 30,
    }
    assert sorted(p for part in parts.values() for p in part.places) == list(range(1, 101))
    assert all(list(part.places) == sorted(part.places) for part in parts.values())


def test_the_seed_alone_decides_who_is_held_out():
    def held_out(seed):
        return hold_out(texts(50), SplitConfig(test=0.5, seed=seed), ["text"])["test"].places

    assert held_out(1) == held_out(1)
    assert held_out(1) != held_out(2)


@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_fall_on_the_same_side(seed):
    rows = table(text=[f"text {i % 10}" for i in range(40)])

    parts = hold_out(rows, SplitConfig(test=0.5, seed=seed), ["text"])

    assert not set(parts["train"].columns["text"]) & set(parts["test"].columns["text"])


@pytest.mark.parametrize("seed", range(5))
def test_a_group_falls_on_one_side(seed):
    rows = table(text=[f"text {i}" for i in range(40)], author=[i // 4 for i in range(40)])

    parts = hold_out(rows, SplitConfig(test=0.3, seed=seed, group="author"), ["text"])

    assert not set(parts["train"].columns["author"]) & set(parts["test"].columns["author"])


def test_one_document_is_cut_at_line_ends_and_nothing_of_it_is_lost():
    document = "".join(f"line {i}\n" for i in range(100))

    parts = hold_out(table(text=[document]), SplitConfig(validation=0.1, test=0.1), ["text"])

    pieces = [parts[name].columns["text"][0] for name in ("train", "validation", "test")]
    assert "".join(pieces) == document
    assert all(piece.endswith("\n") for piece in pieces)
    assert len(pieces[0]) == pytest.approx(0.8 * len(document), abs=10)  # a line is 8 long


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        (texts(3), SplitConfig(test=0.1)),
        (table(text=["the same"] * 4), SplitConfig(test=0.5)),
        (table(text=["one", "two"], author=[1, 1]), SplitConfig(test=0.5, group="author")),
        (table(text=["a document of one line"]), SplitConfig(test=0.5)),
    ],
)
def test_a_split_without_rows_is_an_error(rows, config):
    with pytest.raises(ValueError, match=r"The \w+ split of rows.csv is empty"):
        hold_out(rows, config, ["text"])


def test_a_group_column_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"SplitConfig.group = 'autor'.*rows.csv.*'author'"):
        hold_out(
            table(text=["a", "b"], author=[1, 2]), SplitConfig(test=0.5, group="autor"), ["text"]
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"test": 1.0}, "SplitConfig.test = 1.0"),
        ({"validation": -0.1}, "SplitConfig.validation"),
        ({"validation": 0.5, "test": 0.5}, "no rows to train on"),
    ],
)
def test_a_split_config_checks_itself(config, message):
    with pytest.raises(ValueError, match=message):
        SplitConfig(**config)


def write(path, rows):
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(path)


def test_a_split_is_given_by_a_file_or_a_fraction_not_both(tmp_path):
    path = write(tmp_path / "a.csv", [("one", "x"), ("two", "y")])
    source = SourceConfig(train=path, test=path)

    with pytest.raises(ValueError, match="test split is given twice"):
        read_splits(source, SplitConfig(test=0.5), ["text"], COLUMNS)


def test_duplicates_and_texts_on_both_sides_are_reported(tmp_path):
    train = write(tmp_path / "train.csv", [("one", "x"), ("one", "x"), ("one", "y"), ("two", "y")])
    test = write(tmp_path / "test.csv", [("two", "y"), ("three", "x")])
    source = SourceConfig(train=train, test=test)

    kept, notes = read_splits(source, SplitConfig(), ["text"], COLUMNS)
    dropped, _ = read_splits(source, SplitConfig(deduplicate=True), ["text"], COLUMNS)

    assert len(kept["train"]) == 4
    assert "1 of 4 rows are duplicates" in notes[0]
    assert "1 of 2 test rows have a text that is trained on" in notes[1]
    assert dropped["train"].columns["text"] == ["one", "one", "two"]  # two labels are two rows


def test_a_missing_column_names_the_field_the_file_and_the_nearest(tmp_path):
    source = SourceConfig(train=write(tmp_path / "train.csv", [("one", "x")]))

    with pytest.raises(
        ValueError, match=r"task.text = 'txt': .*train.csv has no such column.*Did you mean 'text'"
    ):
        read_splits(source, SplitConfig(), ["txt"], {"task.text": "txt"})


def test_sms_spam_has_403_duplicates_that_a_switch_leaves_out(shared):
    path = shared / "data" / "sms_spam" / "SMSSpamCollection.tsv"
    source = SourceConfig(train=str(path), columns=("label", "text"))

    split = SplitConfig(test=0.2, deduplicate=True)
    tables, notes = read_splits(source, split, ["text"], COLUMNS)

    assert len(tables["train"]) + len(tables["test"]) == 5574 - 403
    assert len(tables["test"]) == round(0.2 * (5574 - 403))
    assert len(notes) == 1
    assert "403 duplicate rows were left out" in notes[0]


def test_ten_test_questions_of_trec_are_reported_as_trained_on(shared):
    folder = shared / "data" / "trec"
    source = SourceConfig(
        train=str(folder / "train_5500.label"),
        test=str(folder / "TREC_10.label"),
        encoding="latin-1",
        pattern=r"(?P<label>\w+):(?P<fine>\S+) (?P<text>.*)",
    )

    _, notes = read_splits(source, SplitConfig(), ["text"], COLUMNS)

    assert any(note.startswith("10 of 500 test rows") for note in notes)
