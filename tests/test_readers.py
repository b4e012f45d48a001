"""Readers: every format gives the same rows, real files have their known rows, errors name them."""

import json

import pytest

from lorax_ft.data.readers import READERS, SUFFIXES, SourceConfig, read

ROWS = {"text": ['He said "no".', "naïve, not 3\t", "日本"], "label": ["a", "b", "a"]}


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def objects():
    return [dict(zip(ROWS, values)) for values in zip(*ROWS.values())]


def read_as(path, **config):
    return read(path, SourceConfig(train=path, **config))


def test_every_format_gives_the_same_rows(tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    rows = objects()
    jsonl = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    plain_json = write(tmp_path / "a.json", json.dumps(rows))
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS)
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "a.parquet")
    lines = "".join(f"{row['label']}|{row['text']}\n" for row in rows)

    for path in (jsonl, plain_json, str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")):
        assert dict(read_as(path).columns) == ROWS, path
    by_pattern = read_as(write(tmp_path / "a", lines), pattern=r"(?P<label>\w+)\|(?P<text>.*)")
    assert {name: by_pattern.columns[name] for name in ROWS} == ROWS


def test_a_tsv_takes_quotation_marks_as_they_are_and_a_csv_as_quotes(tmp_path):
    tsv = write(tmp_path / "a.tsv", 'text\tlabel\n"so\tx\n')
    semicolons = write(tmp_path / "a.csv", '"so; and\nso";x\n')

    assert read_as(tsv).columns == {"text": ['"so'], "label": ["x"]}
    assert read_as(semicolons, delimiter=";", columns=("text", "label")).columns == {
        "text": ["so; and\nso"],
        "label": ["x"],
    }


def test_a_row_knows_its_line_even_after_blank_lines_and_quoted_newlines(tmp_path):
    path = write(tmp_path / "a.csv", 'text\n"one\ntwo"\n\nthree\n')

    assert [read_as(path).place(row) for row in range(2)] == [f"{path}, line 2", f"{path}, line 5"]


def test_a_byte_order_mark_and_windows_newlines_are_no_content(tmp_path):
    path = write(tmp_path / "a.csv", "\ufefftext,label\r\none,x\r\n")
    text = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\r\n")

    assert read_as(path).columns == {"text": ["one"], "label": ["x"]}
    assert read_as(text).columns == {"text": ["one\ntwo\n"]}


def test_a_control_character_of_latin_1_ends_no_line(tmp_path):
    path = write(tmp_path / "a.txt", "x one\x85more\nx two\n", "latin-1")

    table = read_as(path, encoding="latin-1", pattern=r"(?P<label>\w) (?P<text>.*)")

    assert table.columns["text"] == ["one\x85more", "two"]


def test_a_value_that_a_json_row_lacks_is_none(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"label": 1}\n')

    assert read_as(path).columns == {"text": ["one", None], "label": [None, 1]}


@pytest.mark.parametrize(
    ("name", "content", "config", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1\n', {}, r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', {}, r"line 2: expected an object.*\[1\]"),
        ("a.json", '[{"a": 1},\n 2', {}, r"a\.json, line 2: not JSON"),
        ("a.json", '{"a": [1]}', {}, "expected a list of objects, found a dict"),
        ("a.json", "[1]", {}, "row 1: expected an object"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", {}, r"line 3: 3 fields where there are 2 columns \(a, b\)"),
        ("a.csv", 'a,b\n1,2\n"1,2\n', {}, "line 3: unexpected end of data.*format to 'tsv'"),
        ("a.csv", "a,a\n1,2\n", {}, "a name twice.*SourceConfig.columns"),
        ("a.txt", "x 1\nx\n", {"pattern": r"(?P<a>\w) (?P<b>\d)"}, "line 2.*does not match"),
        ("a.label", "x", {}, r"suffix '\.label'.*SourceConfig.pattern"),
        ("a.csv", "", {}, "holds no rows"),
        ("a.txt", "\n \n", {}, "holds no rows"),
        ("a.parquet", "PAR1 not really", {}, "no whole Parquet file"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, config, message):
    path = write(tmp_path / name, content)

    with pytest.raises(ValueError, match=message) as error:
        read_as(path, **config)
    assert path in str(error.value)


def test_a_wrong_encoding_names_the_byte_and_the_remedy(tmp_path):
    path = write(tmp_path / "a.csv", "text\none\ncafé\n", "latin-1")

    with pytest.raises(ValueError, match=r"line 3: byte 0xe9 at offset 12 is not utf-8.*'latin-1'"):
        read_as(path)
    assert read_as(path, encoding="latin-1").columns["text"] == ["one", "café"]


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.csv", "a\n1\n")

    with pytest.raises(FileNotFoundError, match=r"trian\.csv: there is no such file.*'train\.csv'"):
        read_as(str(tmp_path / "trian.csv"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "jsnl"}, "SourceConfig.format = 'jsnl'.*Nearest: 'jsonl'"),
        ({"encoding": "utf-9"}, "SourceConfig.encoding = 'utf-9'"),
        ({"delimiter": "::"}, "SourceConfig.delimiter = '::'.*pattern"),
        ({"columns": ("a", "a")}, "SourceConfig.columns.*twice"),
        ({"pattern": "("}, "SourceConfig.pattern.*no regular expression"),
        ({"pattern": ".*"}, r"names no columns.*\(\?P<name>"),
        ({"pattern": "(?P<a>.*)", "format": "csv"}, "SourceConfig.pattern.*format is 'csv'"),
        ({"subset": "cola"}, "SourceConfig.subset.*needs SourceConfig.hub"),
    ],
)
def test_a_source_config_checks_itself(config, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(train="a.csv", **config)


def test_every_suffix_has_a_reader():
    assert set(SUFFIXES.values()) < set(READERS)


def test_a_hub_data_set_names_its_classes_and_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "corpus"
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    data.to_parquet(folder / "train.parquet")
    cache = {"cache_dir": str(tmp_path / "cache")}
    load = datasets.load_dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *a, **k: load(*a, **k, **cache))
        table = read("train", SourceConfig(train="train", hub=str(folder)))

    assert dict(table.columns) == {"text": ["a", "b"], "label": ["yes", None]}
    assert table.place(1) == f"{folder}:train, row 2"


def test_a_hub_data_set_without_a_network_says_what_to_do():
    pytest.importorskip("datasets")
    source = SourceConfig(train="train", hub="nobody/no-such-data-set")

    with pytest.raises(OSError, match=r"'nobody/no-such-data-set' could not be loaded.*download"):
        read(source.train, source)


def test_trec_is_read_by_configuration_alone(shared):
    folder = shared / "data" / "trec"
    source = SourceConfig(
        train=str(folder / "train_5500.label"),
        test=str(folder / "TREC_10.label"),
        encoding="latin-1",
        pattern=r"(?P<label>\w+):(?P<fine>\S+) (?P<text>.*)",
    )

    train, test = read(source.train, source), read(source.test, source)

    assert (len(train), len(test)) == (5452, 500)
    assert len(set(train.columns["label"])) == 6
    assert len(set(zip(train.columns["label"], train.columns["fine"]))) == 50
    assert sum(not text.isascii() for text in train.columns["text"]) > 0


def test_trec_in_the_default_encoding_says_so(shared):
    path = str(shared / "data" / "trec" / "train_5500.label")

    with pytest.raises(ValueError, match=r"is not utf-8.*'latin-1'"):
        read_as(path, pattern="(?P<text>.*)")


def test_cola_is_read_without_a_header(shared):
    folder = shared / "data" / "cola"
    columns = ("source", "label", "mark", "sentence")

    train = read_as(str(folder / "train.tsv"), columns=columns)
    dev = read_as(str(folder / "dev.tsv"), columns=columns)

    assert (len(train), len(dev)) == (8551, 1043)
    assert set(train.columns["label"]) == {"0", "1"}


def test_sms_spam_is_read_whole(shared):
    path = shared / "data" / "sms_spam" / "SMSSpamCollection.tsv"

    table = read_as(str(path), columns=("label", "text"))

    assert len(table) == 5574
    assert set(table.columns["label"]) == {"ham", "spam"}


def test_json_and_csv_of_the_wild_are_read(shared):
    folder = shared / "data"

    assert len(read_as(str(folder / "instruct" / "rasbt_1100.json"))) == 1100
    assert len(read_as(str(folder / "instruct" / "self_instruct_seed_tasks.jsonl"))) == 175
    assert len(read_as(str(folder / "e2e" / "devset.csv"))) == 4672
    text = read_as(str(folder / "shakespeare" / "input.txt")).columns["text"]
    assert [len(document) for document in text] == [1_115_394]
