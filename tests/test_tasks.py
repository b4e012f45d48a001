"""Tasks: tokens and labels of every row, nothing lost in silence, bad rows named."""

import dataclasses
import re

import numpy as np
import pytest

from lorax_ft.data.table import Table
from lorax_ft.data.tasks import (
    LanguageModelling,
    PromptCompletion,
    SequenceToSequence,
    TextClassification,
    make_examples,
)
from lorax_ft.data.tokenization import Encoded


@dataclasses.dataclass
class Letters:
    """A tokenizer with a token for each character; 1 stands in front of a text, 2 ends one."""

    vocabulary_size: int = 300
    pad_id: int = 0
    eos_id: int | None = 2

    def encode(self, texts, pairs=None, *, max_length=None, special_tokens=True):
        front = [1] if special_tokens else []
        rows = [front + [ord(c) for c in text] for text in texts]
        types = None
        if pairs is not None:
            types = [np.array([0] * len(r) + [1] * len(p), np.int32) for r, p in zip(rows, pairs)]
            rows = [row + [ord(c) for c in pair] for row, pair in zip(rows, pairs)]
        return Encoded(
            input_ids=[np.array(row[:max_length], np.int32) for row in rows],
            token_type_ids=types,
            truncated=sum(max_length is not None and len(row) > max_length for row in rows),
        )

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 2)


def table(source="rows.csv", **columns):
    rows = len(next(iter(columns.values())))
    return Table(source=source, columns=columns, places=range(1, rows + 1))


def examples(task, train, **others):
    return make_examples({"train": train, **others}, task, Letters())


def ids(text):
    return [1] + [ord(c) for c in text]


def test_a_classified_text_is_its_tokens_and_the_place_of_its_label():
    made = examples(TextClassification(), table(text=["ab", "c"], label=["yes", "no"]))

    first, second = made.parts["train"]
    assert made.label_names == ("no", "yes")
    assert first["input_ids"].tolist() == ids("ab")
    assert (first["labels"], second["labels"]) == (1, 0)
    assert first["labels"].shape == ()
    assert set(first) == {"input_ids", "labels"}


def test_a_pair_brings_its_token_types():
    task = TextClassification(text="question", text_pair="answer")

    made = examples(task, table(question=["ab", "c"], answer=["d", "e"], label=[0, 1]))

    assert made.parts["train"][0]["token_type_ids"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 10], ("9", "10")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["b", "a", "b"], ("a", "b")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_label_names_are_sorted_numbers_as_numbers(labels, names):
    assert examples(TextClassification(), table(text=["x"] * 3, label=labels)).label_names == names


def test_given_label_names_keep_their_order():
    task = TextClassification(label_names=("yes", "no", "maybe"))

    made = examples(task, table(text=["x", "y"], label=["no", "yes"]))

    assert made.label_names == ("yes", "no", "maybe")
    assert [int(e["labels"]) for e in made.parts["train"]] == [1, 0]


def test_a_label_that_training_has_not_names_file_row_and_nearest():
    train = table(text=["x", "y"], label=["ham", "spam"])
    test = table("test.csv", text=["x", "y"], label=["ham", "spma"])

    with pytest.raises(
        ValueError, match=r"test.csv, row 2: the label 'spma' is not in the training rows.*'spam'"
    ):
        examples(TextClassification(), train, test=test)


def test_a_training_label_that_is_not_in_the_given_names_is_an_error():
    with pytest.raises(ValueError, match=r"row 1: the label 'x' is not in task.label_names: a, b"):
        examples(TextClassification(label_names=("a", "b")), table(text=["t"], label=["x"]))


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="the one label 'x'"):
        examples(TextClassification(), table(text=["s", "t"], label=["x", "x"]))


@pytest.mark.parametrize("label", [None, 0.5, ["a"]])
def test_a_label_that_is_neither_string_nor_int_is_named(label):
    with pytest.raises(TypeError, match=r"rows.csv, row 2: column 'label' holds"):
        examples(TextClassification(), table(text=["s", "t"], label=["x", label]))


@pytest.mark.parametrize("text", [None, 3, float("nan"), {"a": 1}])
def test_a_text_that_is_no_string_is_named(text):
    with pytest.raises(TypeError, match=r"rows.csv, row 2: column 'text' holds .* not text"):
        examples(TextClassification(), table(text=["s", text], label=["x", "y"]))


def test_a_missing_text_column_names_those_that_are_there():
    with pytest.raises(ValueError, match=r"task.text = 'text'.*columns are 'sentence', 'label'"):
        examples(TextClassification(), table(sentence=["s", "t"], label=["x", "y"]))


def test_texts_that_are_cut_are_reported():
    task = TextClassification(max_length=3)

    made = examples(task, table(text=["abcdef", "a"], label=["x", "y"]))

    assert made.parts["train"][0]["input_ids"].tolist() == ids("ab")
    assert made.notes == ("1 of 2 train texts were cut to 3 tokens (task.max_length).",)


def test_windows_hold_every_token_once_in_order_and_score_all():
    made = examples(LanguageModelling(length=4), table(text=["abcdefgh", "ijk"]))

    windows = made.parts["train"]
    whole = [*ids("abcdefgh"), 2, *ids("ijk")]  # the texts, with an end between them
    assert np.concatenate([w["input_ids"] for w in windows]).tolist() == whole
    assert [len(w["input_ids"]) for w in windows] == [4, 4, 4, 2]
    assert all(np.array_equal(w["input_ids"], w["labels"]) for w in windows)


def test_a_last_window_of_one_token_is_left_out_since_it_predicts_nothing():
    made = examples(LanguageModelling(length=4), table(text=["abcd"]))

    assert [w["input_ids"].tolist() for w in made.parts["train"]] == [ids("abc")]


def test_a_text_without_two_tokens_is_an_empty_split():
    with pytest.raises(ValueError, match="the train split has fewer than 2 tokens"):
        examples(LanguageModelling(), table(text=[""]))


def test_a_completion_is_scored_and_its_prompt_is_not():
    task = PromptCompletion(prompt="{question}? {{{hint}}} ", completion="answer")

    made = examples(task, table(question=["ab"], hint=["h"], answer=["no"]))

    (example,) = made.parts["train"]
    prompt = ids("ab? {h} ")
    assert example["input_ids"].tolist() == [*prompt, ord("n"), ord("o"), 2]
    assert example["labels"].tolist() == [-100] * len(prompt) + [ord("n"), ord("o"), 2]


def test_a_prompt_that_leaves_no_room_is_left_out_and_reported():
    rows = table(prompt=["abc", "abcdefgh"], completion=["xyz", "xyz"])

    made = examples(PromptCompletion(max_length=6), rows)

    (example,) = made.parts["train"]
    assert example["labels"].tolist() == [-100] * 4 + [ord("x"), ord("y")]
    assert made.notes == (
        "2 of 2 train texts were cut to 6 tokens (task.max_length).",
        "1 train rows were left out: no room after the prompt.",
    )
    with pytest.raises(ValueError, match=r"Raise task\.max_length"):
        examples(PromptCompletion(max_length=4), rows)


def test_a_source_has_a_target_that_the_decoder_reads_one_place_later():
    task = SequenceToSequence(source="say: {words}", target="answer", decoder_start_id=7)

    made = examples(task, table(words=["ab", "c"], answer=["no", "yes"]))

    first, second = made.parts["train"]
    assert first["input_ids"].tolist() == [*ids("say: ab"), 2]
    assert first["labels"].tolist() == [ord("n"), ord("o"), 2]
    assert first["decoder_input_ids"].tolist() == [7, ord("n"), ord("o")]
    assert {array.dtype for array in second.values()} == {np.dtype(np.int32)}


def test_sources_and_targets_that_are_cut_are_reported_apart():
    task = SequenceToSequence(source="{words}", max_length=3, max_target_length=4)

    made = examples(task, table(words=["abcdef", "a"], target=["xyzw", "x"]))

    first, second = made.parts["train"]
    assert [e["input_ids"].tolist() for e in (first, second)] == [[*ids("a"), 2]] * 2
    assert first["labels"].tolist() == [ord(c) for c in "xyzw"]
    assert first["decoder_input_ids"].tolist() == [0, *(ord(c) for c in "xyz")]
    assert made.notes == (
        "1 of 2 train texts were cut to 3 tokens (task.max_length).",
        "1 of 2 train targets were cut to 4 tokens (task.max_target_length).",
    )


def test_a_target_without_a_token_is_left_out_and_reported():
    rows = {"train": table(words=["a", "b"], target=["", "x"])}
    made = make_examples(rows, SequenceToSequence(source="{words}"), Letters(eos_id=None))
    assert [e["labels"].tolist() for e in made.parts["train"]] == [[ord("x")]]
    assert made.notes == ("1 train rows were left out: their targets have no token.",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceToSequence(source="none"), "SequenceToSequence.source = 'none'"),
        (lambda: SequenceToSequence(source="{a"), "SequenceToSequence.source.*brace"),
        (lambda: SequenceToSequence(max_target_length=1), "max_target_length = 1"),
        (lambda: TextClassification(max_length=1), "TextClassification.max_length = 1"),
        (lambda: TextClassification(label_names=("a", "a")), "label_names.*twice"),
        (lambda: LanguageModelling(length=1), "LanguageModelling.length = 1"),
        (lambda: PromptCompletion(prompt="none"), "PromptCompletion.prompt = 'none'"),
        (lambda: PromptCompletion(prompt="{}"), re.escape("PromptCompletion.prompt = '{}'")),
        (lambda: PromptCompletion(prompt="{a"), "PromptCompletion.prompt.*brace"),
    ],
)
def test_a_task_config_checks_itself(make, message):
    with pytest.raises(ValueError, match=message):
        make()
