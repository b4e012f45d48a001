"""Tokenizers: known ids, the same through every kind of file, cut to length and counted."""

import numpy as np
import pytest

from lorax_ft.data.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def bert(minilm):
    return load_tokenizer(minilm)


@pytest.fixture(scope="module")
def stories(shared):
    return load_tokenizer(shared / "models" / "stories260K" / "tok512.model")


def lists(arrays):
    return [array.tolist() for array in arrays]


def test_minilm_gives_its_known_ids(bert):
    encoded = bert.encode(["Hello world, what is this?", ""])

    assert lists(encoded.input_ids) == [
        [101, 7592, 2088, 1010, 2054, 2003, 2023, 1029, 102],
        [101, 102],
    ]
    assert encoded.token_type_ids is None
    assert all(ids.dtype == np.int32 for ids in encoded.input_ids)
    assert (bert.vocabulary_size, bert.pad_id) == (30522, 0)


def test_a_pair_tells_its_texts_apart(bert):
    encoded = bert.encode(["a"], ["b c"])

    assert lists(encoded.input_ids) == [[101, 1037, 102, 1038, 1039, 102]]
    assert lists(encoded.token_type_ids) == [[0, 0, 0, 1, 1, 1]]


def test_a_tokenizer_file_gives_the_ids_of_its_directory(bert, minilm):
    alone = load_tokenizer(minilm / "tokenizer.json")
    texts, pairs = ["A sentence.", "Ünïcode ‘quotes’"], ["Another one.", "x"]

    for arguments in ((texts,), (texts, pairs)):
        ours, theirs = alone.encode(*arguments), bert.encode(*arguments)
        assert lists(ours.input_ids) == lists(theirs.input_ids)
    assert lists(ours.token_type_ids) == lists(theirs.token_type_ids)
    assert alone.pad_id == bert.pad_id


def test_texts_that_are_cut_keep_their_special_tokens_and_are_counted(bert):
    encoded = bert.encode(["one", "one two three four five"], max_length=4)

    assert lists(encoded.input_ids) == [[101, 2028, 102], [101, 2028, 2048, 102]]
    assert encoded.truncated == 1


def test_the_longer_text_of_a_pair_is_cut_first(bert):
    encoded = bert.encode(["one"], ["one two three four five"], max_length=6)

    assert lists(encoded.input_ids) == [[101, 2028, 102, 2028, 2048, 102]]
    assert lists(encoded.token_type_ids) == [[0, 0, 0, 1, 1, 1]]


def test_decoding_gives_the_text_back(bert, stories):
    for tokenizer, text in ((bert, "once upon a time"), (stories, "Once upon a time.\nThe end.")):
        assert tokenizer.decode(tokenizer.encode([text]).input_ids[0].tolist()) == text


def test_a_sentencepiece_model_puts_its_first_token_in_front(stories):
    text = "Once upon a time, there was a Lily."

    assert lists(stories.encode([text]).input_ids) == [
        [1, 403, 407, 261, 378, 432, 383, 286, 261, 317, 426]
    ]
    assert stories.encode([text], special_tokens=False).input_ids[0][0] == 403
    assert (stories.vocabulary_size, stories.eos_id) == (512, 2)


def test_a_directory_with_a_sentencepiece_model_alone_is_read_as_that(shared, stories):
    directory = load_tokenizer(shared / "models" / "stories260K" / "hf")

    assert lists(directory.encode(["A day."]).input_ids) == lists(
        stories.encode(["A day."]).input_ids
    )


def test_gpt2_pads_with_its_end_of_text(shared):
    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")

    assert lists(gpt2.encode(["Hello world"]).input_ids) == [[15496, 995]]
    assert gpt2.pad_id == gpt2.eos_id == 50256


def test_a_sentencepiece_model_refuses_pairs(stories):
    with pytest.raises(ValueError, match="no token that parts two texts"):
        stories.encode(["a"], ["b"])


def test_a_path_without_a_tokenizer_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer: expected.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_hub_id_without_a_network_is_named():
    with pytest.raises(OSError, match="No tokenizer at 'nobody/no-such-model'"):
        load_tokenizer("nobody/no-such-model")
