"""Data sets: from a config's files to examples, with the real tokenizers and the real data."""

import numpy as np
import pytest

from lorax_ft.config import parse
from lorax_ft.data import (
    DataConfig,
    LanguageModelling,
    LoaderConfig,
    PromptCompletion,
    SequenceToSequence,
    SourceConfig,
    SplitConfig,
    TextClassification,
    check_fits,
    evaluation_batches,
    load_dataset,
    load_tokenizer,
    source_of,
)


@pytest.fixture(scope="module")
def bert(minilm):
    return load_tokenizer(minilm)


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared / "models" / "stories260K" / "tok512.model")


def test_trec_becomes_batches(shared, bert):
    folder = shared / "data" / "trec"
    config = parse(
        {
            "source": {
                "train": str(folder / "train_5500.label"),
                "test": str(folder / "TREC_10.label"),
                "encoding": "latin-1",
                "pattern": r"(?P<label>\w+):(?P<fine>\S+) (?P<text>.*)",
            },
            "task": {"max_length": 32},
            "loader": {"batch_size": 64, "buckets": [16, 32]},
        },
        DataConfig,
    )

    data = load_dataset(config, bert)

    assert (data.task, len(data.train), len(data.test)) == ("sequence_classification", 5452, 500)
    assert data.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert any("train texts were cut to 32 tokens" in note for note in data.notes)
    batches = list(
        evaluation_batches(
            data.test, config.loader, pad_id=data.pad_id, process_index=0, process_count=1
        )
    )
    assert {batch["input_ids"].shape for _, batch in batches} == {(64, 16), (64, 32)}
    assert sum(len(indices) for indices, _ in batches) == 500
    check_fits(data, vocabulary_size=bert.vocabulary_size, positions=32)


def test_cola_has_its_labels_in_the_order_of_glue(shared, bert):
    folder = shared / "data" / "cola"
    config = DataConfig(
        source=SourceConfig(
            train=str(folder / "train.tsv"),
            validation=str(folder / "dev.tsv"),
            columns=("source", "label", "mark", "sentence"),
        ),
        task=TextClassification(text="sentence"),
    )

    data = load_dataset(config, bert)

    assert (len(data.train), len(data.validation), data.test) == (8551, 1043, [])
    assert data.label_names == ("0", "1")
    assert int(sum(example["labels"] for example in data.train)) == 6023  # 70.4 % acceptable


def test_shakespeare_becomes_windows_whose_held_out_part_is_the_end(shared, stories):
    path = shared / "data" / "shakespeare" / "input.txt"
    config = DataConfig(
        source=SourceConfig(train=str(path)),
        split=SplitConfig(validation=0.1),
        task=LanguageModelling(length=128),
    )

    data = load_dataset(config, stories)

    assert data.task == "causal_lm"
    assert {len(example["input_ids"]) for example in data.train[:-1]} == {128}
    ids = [np.concatenate([e["input_ids"] for e in part]) for part in (data.train, data.validation)]
    text = "".join(stories.decode(part) for part in ids)
    assert text.split() == path.read_text().split()
    assert len(ids[1]) == pytest.approx(0.1 * (len(ids[0]) + len(ids[1])), rel=0.02)


def test_instructions_are_prompts_and_completions(shared, stories):
    config = DataConfig(
        source=SourceConfig(train=str(shared / "data" / "instruct" / "rasbt_1100.json")),
        split=SplitConfig(test=0.1),
        task=PromptCompletion(
            prompt="{instruction}\n{input}\n\n", completion="output", max_length=256
        ),
        loader=LoaderConfig(buckets=(64, 128, 256)),
    )

    data = load_dataset(config, stories)

    example = data.train[0]
    scored = example["input_ids"][example["labels"] >= 0]
    assert scored[-1] == stories.eos_id
    assert stories.decode(scored[:-1]) == data.tables["train"].columns["output"][0]


def rows(tmp_path, **columns):
    import csv

    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))
    return SourceConfig(train=str(path))


def test_a_split_that_is_not_there_says_how_to_have_it(tmp_path, bert):
    source = rows(tmp_path, text=["one", "two"], label=["x", "y"])
    data = load_dataset(DataConfig(source=source), bert)

    assert len(data.part("train")) == 2
    with pytest.raises(ValueError, match=r"test split has no rows: set SourceConfig\.test"):
        data.part("test")
    with pytest.raises(ValueError, match="no split 'dev'"):
        data.part("dev")


def test_tokens_and_lengths_that_the_model_has_not_are_named(tmp_path, bert):
    source = rows(tmp_path, text=["one", "two three"], label=["x", "y"])
    data = load_dataset(DataConfig(source=source), bert)

    with pytest.raises(ValueError, match=r"train example 0 has the token id 2028.*has 512"):
        check_fits(data, vocabulary_size=512)
    with pytest.raises(ValueError, match=r"train example 1 has 4 tokens.*end at 3"):
        check_fits(data, vocabulary_size=30522, positions=3)


def test_a_bucket_must_hold_the_longest_example():
    with pytest.raises(ValueError, match=r"up to 256 tokens.*longest bucket is 128.*128, 256\)"):
        DataConfig(source=SourceConfig(train="a.csv"), task=TextClassification(max_length=256))


def test_a_bucket_must_hold_the_longest_target():
    task = SequenceToSequence(max_target_length=64)
    with pytest.raises(ValueError, match=r"targets have up to 64 tokens.*target_buckets is 32"):
        DataConfig(
            source=SourceConfig(train="a.csv"),
            task=task,
            loader=LoaderConfig(target_buckets=(8, 32)),
        )


def test_meaning_representations_are_sources_of_the_sentences_that_say_them(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "t5")
    (file,) = (shared / "data" / "e2e").glob("*.csv")
    task = SequenceToSequence(source="describe: {mr}", target="ref", max_target_length=96)
    config = DataConfig(source=SourceConfig(train=str(file)), task=task)

    data = load_dataset(config, tokenizer)

    first, row = data.train[0], data.tables["train"].columns
    assert data.task == "seq2seq_lm"
    assert first["input_ids"][-1] == first["labels"][-1] == tokenizer.eos_id == 1
    assert first["decoder_input_ids"][0] == tokenizer.pad_id == 0
    assert tokenizer.decode(first["input_ids"][:-1]) == f"describe: {row['mr'][0]}"
    assert tokenizer.decode(first["labels"][:-1]) == row["ref"][0]
    check_fits(data, vocabulary_size=32_128, decoder_start_id=0)
    with pytest.raises(ValueError, match=r"start with the token id 0.*with 5.*decoder_start_id"):
        check_fits(data, vocabulary_size=32_128, decoder_start_id=5)


def test_a_text_fills_the_template_of_a_source_with_one_column():
    task = SequenceToSequence(source="describe: {mr}!", target="ref")
    assert source_of(task, "name[Aroma]") == "describe: name[Aroma]!"

    with pytest.raises(ValueError, match="is made of 2 columns"):
        source_of(SequenceToSequence(source="{mr} {ref}", target="ref"), "name[Aroma]")


def test_the_kind_of_a_task_chooses_its_config():
    values = {"source": {"train": "a.txt"}, "task": {"kind": "language_modelling", "length": 64}}

    assert parse(values, DataConfig).task == LanguageModelling(length=64)
