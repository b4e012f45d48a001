"""Generation: transformers' tokens, the logits of whole sequences, one compilation, bad input."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import methods, models, prediction, trees
from lorax_ft.generation import GenerationConfig, generate, restrict, stream
from lorax_ft.generation.choosing import choose
from lorax_ft.generation.writing import _generate, _numbers
from lorax_ft.inspection import inspect
from lorax_ft.lift import lift
from lorax_ft.models import Gpt2Config, LlamaConfig
from lorax_ft.quantization import QuantizationConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDED = json.loads((GOLDEN / "generation.json").read_text())
ENDS = tuple(RECORDED["eos_token_id"])
# Every family writes greedily; beams have the same code for all of them.
CASES = [
    case
    for case in RECORDED["cases"]
    if "num_beams" not in case["settings"]
    or case["model"] == "llama_llama3"
    or (case["model"] == "t5_seq2seq_lm" and case["settings"]["num_beams"] == 4)
]
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "initializer_range": 0.5,
}
CONFIGS = {
    "gpt2": Gpt2Config(**TINY, max_position_embeddings=32),
    "llama": LlamaConfig(**TINY, num_key_value_heads=2, intermediate_size=24),
}
IDS = jnp.array([[3, 9, 12, 20], [0, 0, 7, 31]])
MASK = jnp.array([[1, 1, 1, 1], [0, 0, 1, 1]])


def tiny(family="llama", **overrides):
    model = models.build(CONFIGS[family], task="causal_lm", **overrides)
    return model, model.init(jax.random.key(0))


# --- The same as others, and as without a cache ---------------------------------------------------


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join(map(str, (c["model"], *c["settings"].values())))
)
def test_tokens_are_those_of_transformers(case):
    model, params = models.load(GOLDEN / "models" / case["model"])
    ids = np.array(RECORDED["input_ids"])
    inputs = {"input_ids": ids, "attention_mask": (ids != RECORDED["pad_token_id"]).astype(int)}
    config = GenerationConfig(**case["settings"], eos_token_id=ENDS)

    tokens, lengths = generate(model, params, inputs, config)

    expected = np.array(case["tokens"])
    for row, length, other in zip(np.asarray(tokens), np.asarray(lengths), expected):
        assert row[:length].tolist() == other[:length].tolist()
        assert length == config.max_new_tokens or row[length - 1] in ENDS


def with_methods(model, params, names):
    sections = {
        "lora": methods.LoraConfig(rank=2, targets="all-linear"),
        "prefix": methods.PrefixConfig(length=3, stddev=1.0),
        "prefix-net": methods.PrefixConfig(length=3, projection=8, stddev=1.0),
        "prompt": methods.PromptConfig(length=2, stddev=1.0),
    }
    uses = inspect(model.apply, params, {"input_ids": jax.ShapeDtypeStruct((1, 8), jnp.int32)})
    quantization = QuantizationConfig(kind="nf4", block_size=32) if "nf4" in names else None
    chosen = [sections[name] for name in names if name in sections]
    return methods.add_methods(params, chosen, jax.random.key(1), uses, quantization)[0]


@pytest.mark.parametrize(
    ("family", "names", "compute"),
    [
        ("llama", ("nf4", "lora", "prefix", "prompt"), {}),
        ("gpt2", ("prefix-net", "prompt"), {"scan_layers": False}),
        ("gpt2", ("prefix",), {"remat": "full"}),
        ("llama", ("prompt",), {"dtype": "bfloat16"}),
    ],
)
def test_a_cache_gives_the_logits_of_the_whole_sequence(family, names, compute):
    model, params = tiny(family, **compute)
    params = with_methods(model, params, names)
    new = jnp.array([[5, 6, 30], [17, 2, 11]])
    positions = jnp.maximum(jnp.cumsum(MASK, axis=1) - 1, 0)
    inputs = {
        "input_ids": jnp.concatenate([IDS, new], axis=1),
        "attention_mask": jnp.pad(MASK, ((0, 0), (0, 3)), constant_values=1),
        "position_ids": jnp.concatenate(
            [positions, positions[:, -1:] + jnp.arange(1, 4)[None]], axis=1
        ),
    }
    whole = jax.jit(lift(model.apply))(params, inputs)

    @jax.jit
    def step_by_step(params):
        read = lift(lambda params, inputs: model.prefill(params, inputs, 3))
        logits, cache = read(params, {"input_ids": IDS, "attention_mask": MASK})
        found = [logits]
        for i in range(3):
            logits, cache = lift(model.decode)(params, new[:, i], cache)
            found.append(logits)
        return jnp.stack(found, axis=1)

    tolerance = 1e-4 if model.compute.dtype == "float32" else 0.1
    np.testing.assert_allclose(step_by_step(params), whole[:, 3:], atol=tolerance, rtol=tolerance)


def test_a_t5_with_a_cache_gives_the_logits_of_the_whole_target():
    """With prompt and prefixes in all places, which are read once."""
    model, params = models.load(GOLDEN / "models" / "t5_gated_seq2seq_lm")
    shapes = model.input_shapes()
    sections = [methods.PromptConfig(length=2), methods.PrefixConfig(length=3, stddev=1.0)]
    uses = inspect(model.apply, params, shapes)
    params, _ = methods.add_methods(params, sections, key(1), uses)
    source = {"input_ids": IDS, "attention_mask": MASK}
    target = jnp.array([[0, 5, 6, 30], [0, 17, 2, 11]])
    whole = jax.jit(lift(model.apply))(params, {**source, "decoder_input_ids": target})

    @jax.jit
    def step_by_step(params):
        logits, cache = lift(lambda *args: model.prefill(*args, 3))(params, source)
        found = [logits]
        for i in range(1, 4):
            logits, cache = lift(model.decode)(params, target[:, i], cache)
            found.append(logits)
        return jnp.stack(found, axis=1)

    np.testing.assert_allclose(step_by_step(params), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_texts_with_adapters_of_their_own_are_gone_on_with_as_by_each_alone(num_beams):
    model, base = tiny()
    uses = inspect(model.apply, base, {"input_ids": IDS})
    config, names = methods.LoraConfig(rank=2), ("one", "two")

    def adapter(seed):
        key = jax.random.key(seed)
        train, frozen = trees.partition(methods.add_lora(base, config, key, uses))
        train = jax.tree.map(lambda x: jax.random.normal(key, x.shape), train)
        return trees.combine(train, frozen)

    adapters = methods.stack_adapters({name: adapter(i) for i, name in enumerate(names)})
    index = methods.adapter_index(adapters, ["two", "one"])
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    settings = GenerationConfig(max_new_tokens=6, num_beams=num_beams)

    mixed, _ = generate(model, methods.mix(adapters, index), inputs, settings)
    alone = [generate(model, methods.select(adapters, n), inputs, settings)[0] for n in names]

    assert not np.array_equal(*alone)
    np.testing.assert_array_equal(mixed, [alone[1][0], alone[0][1]])


def test_stories260k_writes_the_oracles_text(shared):
    directory = shared / "models" / "stories260K" / "hf"
    model, params = models.load(directory)
    text = np.load(directory / "greedy_reference.npz")["ids"]
    config = GenerationConfig(max_new_tokens=len(text) - 1, eos_token_id=())

    tokens, _ = generate(model, params, {"input_ids": text[None, :1]}, config)

    assert np.array_equal(tokens[0], text[1:])


def test_a_stream_is_what_is_generated_whole():
    model, params = tiny()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    free, _ = generate(model, params, inputs, GenerationConfig(max_new_tokens=6, eos_token_id=()))
    end = int(free[1, 1])  # ends the second text early, and the first one too if it is there
    config = GenerationConfig(max_new_tokens=6, eos_token_id=(end,))

    tokens, lengths = generate(model, params, inputs, config)
    pieces = np.stack(list(stream(model, params, inputs, config)), axis=1)

    assert lengths[1] < 6
    for row, length, piece in zip(np.asarray(tokens), np.asarray(lengths), pieces):
        assert piece[:length].tolist() == row[:length].tolist()
        assert (piece[length:] == -1).all()


# --- Drawing --------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_the_restricted_probabilities_say():
    logits = jnp.log(jnp.array([0.05, 0.3, 0.15, 0.4, 0.1]))[None]
    model, _ = tiny()
    config = GenerationConfig(do_sample=True, temperature=2.0, top_k=4, top_p=0.8)
    numbers = _numbers(model, config)

    drawn = choose(jnp.broadcast_to(logits, (20000, 5)), jax.random.key(0), numbers)

    # by hand: square roots, the four largest, of which the first three have .84 together
    weights = np.sqrt([0.0, 0.3, 0.15, 0.4, 0.0])
    shares = np.bincount(drawn, minlength=5) / 20000
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.015)
    assert shares[[0, 4]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 9, "top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 1, "top_p": 1.0}, [1]),
        ({"top_k": 9, "top_p": 0.5}, [1]),
        ({"top_k": 9, "top_p": 0.51}, [1, 3]),
        ({"top_k": 2, "top_p": 0.63}, [1, 3]),  # of the two, the first has .625
        ({"top_k": 2, "top_p": 0.62}, [1]),
        ({"top_k": 9, "top_p": 1e-6}, [1]),
    ],
)
def test_what_may_be_drawn(settings, kept):
    logits = jnp.log(jnp.array([[0.05, 0.5, 0.15, 0.3]]))

    found = restrict(logits, **settings)[0]

    assert np.flatnonzero(np.isfinite(found)).tolist() == kept
    np.testing.assert_array_equal(found[jnp.array(kept)], logits[0][jnp.array(kept)])


def test_other_numbers_need_no_other_program():
    model, params = tiny()
    inputs = {"input_ids": IDS}
    generate(model, params, inputs, GenerationConfig(max_new_tokens=3, do_sample=True), key(0))
    compiled = _generate._cache_size()

    for i in range(3):
        config = GenerationConfig(
            max_new_tokens=3, do_sample=True, temperature=0.5 + i, top_k=i + 1, top_p=0.9 - i / 10
        )
        generate(model, params, inputs, config, key(i))

    assert _generate._cache_size() == compiled


def key(seed):
    return jax.random.key(seed)


# --- Texts ----------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of the letters a, b, c ... as 1, 2, 3 ...; z ends a text and is put behind it."""

    vocabulary_size, pad_id, eos_id = 27, 0, 26

    def encode(self, texts, pairs=None, *, max_length=None, special_tokens=True):
        from lorax_ft.data.tokenization import Encoded

        ids = [[ord(c) - 96 for c in text] + [26] * bool(text) for text in texts]
        return Encoded(input_ids=[np.array(row, np.int32) for row in ids])

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids if i != 26)


def alphabet():
    """A model that finds the alphabet's next letter likeliest, whatever stood before."""
    model = models.build(
        Gpt2Config(
            vocab_size=28,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=24,
            tie_word_embeddings=False,
            eos_token_id=None,
        ),
        task="causal_lm",
    )
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    params["embeddings"]["word"]["embedding"] = jnp.eye(28, 32)
    params["norm"]["scale"] = jnp.ones(32)
    params["lm_head"]["kernel"] = jnp.roll(jnp.eye(32, 28), 1, axis=1)
    return model, params


def test_texts_are_continued_to_their_ends():
    model, params = alphabet()
    config = GenerationConfig(max_new_tokens=5)

    written = prediction.continue_texts(model, params, Letters(), ["abc", "w", "klmnopq"], config)

    assert written == ["defgh", "xy", "rstuv"]
    pieces = list(prediction.stream_text(model, params, Letters(), "vw", config))
    assert "".join(pieces) == "xy"
    assert pieces[0] == "x"


def test_sources_stand_before_their_padding_and_have_an_end_as_in_training(monkeypatch):
    model, params = models.load(GOLDEN / "models" / "t5_seq2seq_lm")
    seen = {}

    def spy(model, params, inputs, config, key):
        seen.update(inputs)
        return np.full((2, 1), 1), np.array([1, 1])

    monkeypatch.setattr(prediction.generation, "generate", spy)
    written = prediction.continue_texts(model, params, Letters(), ["ab", "c"], GenerationConfig())

    assert written == ["a", "a"]
    assert [row[:4].tolist() for row in seen["input_ids"]] == [[1, 2, 26, 0], [3, 26, 0, 0]]
    assert seen["attention_mask"].sum(axis=1).tolist() == [3, 2]


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected above 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"do_sample": True, "num_beams": 2}, "exclude each other"),
    ],
)
def test_a_setting_that_makes_no_sense_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**fields)


def test_texts_that_cannot_be_continued_raise():
    model, params = tiny("gpt2")
    inputs = {"input_ids": IDS}

    with pytest.raises(ValueError, match=r"attention_mask\[1\] ends in padding: pad on the left"):
        generate(model, params, {**inputs, "attention_mask": MASK[:, ::-1]})
    with pytest.raises(ValueError, match="4 tokens and 29 new ones are more than the 32 positions"):
        generate(model, params, inputs, GenerationConfig(max_new_tokens=29))
    with pytest.raises(ValueError, match="do_sample is True, and a key is not given"):
        generate(model, params, inputs, GenerationConfig(do_sample=True))
    with pytest.raises(ValueError, match="num_beams must be 1 to stream"):
        next(stream(model, params, inputs, GenerationConfig(num_beams=2)))
    classifier = models.build(CONFIGS["gpt2"], task="sequence_classification")
    with pytest.raises(ValueError, match="'sequence_classification' writes no text"):
        generate(classifier, params, inputs)
    with pytest.raises(ValueError, match="The text '' has no tokens"):
        prediction.continue_texts(model, params, Letters(), ["a", ""])
