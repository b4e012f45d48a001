"""Prompt tuning, P-tuning and prefix tuning: trained vectors that stand before the real tokens.

They add a small subtree to the parameters, `prompt` or `prefix`, which the models here look for.
Prompts (Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning") are vectors
before the word vectors; P-tuning (Liu et al. 2021, "GPT Understands, Too") makes them by a small
net; prefixes (Li and Liang 2021, "Prefix-Tuning") are keys and values before those of every layer.
Unlike other methods they change the output from the first step.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft import trees
from lorax_ft.leaves import is_leaf
from lorax_ft.methods.targets import Uses, key_of

Array = jax.Array
STARTS = ("random", "vocabulary", "ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Vectors before the word vectors."""

    length: int = 20  # how many
    initialization: str = "random"  # random, vocabulary (words drawn at random), ids
    ids: tuple[int, ...] = ()  # the words that "ids" starts from, repeated to the length
    text: str | None = None  # a text to take `ids` from, by the run's tokenizer
    stddev: float = 0.02  # of a random start
    word_scale: float | None = None  # what the model multiplies word vectors by; None: it is known
    modules_to_save: tuple[str, ...] = ()  # modules trained whole, such as a new classifier

    def __post_init__(self):
        _check_length(self)
        if self.initialization not in STARTS:
            raise ValueError(
                f"PromptConfig.initialization is {self.initialization!r}, expected one of "
                f"{', '.join(STARTS)}."
            )
        if (self.initialization == "ids") != bool(self.ids or self.text):
            raise ValueError("PromptConfig: ids or text, and initialization='ids', go together.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuningConfig:
    """Vectors before the word vectors, made by a net of two hidden layers (ReLU)."""

    length: int = 20
    hidden: int | None = None  # width of the net; None: that of the model
    stddev: float = 0.02
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self):
        _check_length(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Keys and values before those of every layer.

    PEFT has a prefix for a T5 too, which its layers share in pairs and half of which nothing reads;
    here each layer has its own, in both halves and where the decoder attends to the encoder.
    """

    length: int = 20
    projection: int | None = None  # width of the net (tanh) that makes them; None: trained as such
    stddev: float = 0.02
    places: tuple[str, ...] = ()  # of an encoder-decoder: encoder, decoder, cross; (): all of them
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self):
        _check_length(self)


def add_prompt(
    params: Any, config: PromptConfig, key: Array, uses: Uses = None, quantization: Any = None
) -> Any:
    """Adds `prompt/embedding` [length, d]."""
    del quantization
    table = trees.flatten(params)[_word_table(params, uses)]
    if config.initialization == "random":
        rows = jax.random.normal(key, (config.length, table.shape[-1])) * config.stddev
    else:
        if config.text is not None and not config.ids:
            raise ValueError("PromptConfig.text has to be made ids of first, by a tokenizer.")
        ids = jnp.resize(jnp.asarray(config.ids or 0, jnp.int32), (config.length,))
        if config.initialization == "vocabulary":
            ids = jax.random.randint(key, (config.length,), 0, table.shape[0])
        rows = (table.take(ids) if is_leaf(table) else table[ids]).astype(jnp.float32)
        rows = rows * (1.0 if config.word_scale is None else config.word_scale)
    return _with_subtree(params, "prompt", {"embedding": rows.astype(jnp.float32)})


def add_p_tuning(
    params: Any, config: PTuningConfig, key: Array, uses: Uses = None, quantization: Any = None
) -> Any:
    """Adds `prompt/embedding` [length, d] and the net `prompt/net_0`, `net_1`, `net_2`."""
    del quantization
    d = trees.flatten(params)[_word_table(params, uses)].shape[-1]
    hidden = config.hidden or d
    keys = jax.random.split(key, 4)
    rows = jax.random.normal(keys[0], (config.length, d)) * config.stddev
    subtree: dict[str, Any] = {"embedding": rows}
    for i, shape in enumerate([(d, hidden), (hidden, hidden), (hidden, d)]):
        subtree[f"net_{i}"] = _layer(keys[i + 1], *shape)
    return _with_subtree(params, "prompt", subtree)


def add_prefix(
    params: Any, config: PrefixConfig, key: Array, uses: Uses = None, quantization: Any = None
) -> Any:
    """Adds `prefix/key` and `prefix/value` [layers, length, kv_heads * head_dim], or a net for
    them.

    An encoder-decoder has three of these, at `prefix/encoder`, `prefix/decoder` and, before what
    the decoder sees of the encoder, `prefix/cross`. Raises ValueError for a place that the model
    does not have.
    """
    del quantization
    sizes = _keys_of(params)
    if unknown := sorted(set(config.places) - set(sizes)):
        known = ", ".join(filter(None, sizes)) or "one place alone, which has no name"
        raise ValueError(f"PrefixConfig.places: {unknown} are not there; the model has {known}.")
    if "" in sizes:
        return _with_subtree(params, "prefix", _prefix(config, key, *sizes[""]))
    subtree = {
        place: _prefix(config, key_of(key, place), *size)
        for place, size in sizes.items()
        if place in config.places or not config.places
    }
    return _with_subtree(params, "prefix", subtree)


def _prefix(config: PrefixConfig, key: Array, layers: int, width: int) -> dict[str, Any]:
    keys = jax.random.split(key, 3)
    if config.projection is None:
        shape = (layers, config.length, width)
        return {
            name: jax.random.normal(k, shape) * config.stddev
            for name, k in zip(("key", "value"), keys)
        }
    return {
        "embedding": jax.random.normal(keys[0], (config.length, width)) * config.stddev,
        "net_0": _layer(keys[1], width, config.projection),
        "net_1": _layer(keys[2], config.projection, 2 * layers * width),
    }


def prompt_arrays(params: Any, config: Any, uses: Uses = None) -> list[str]:
    """Paths of what makes the prompt."""
    return [path for path in trees.flatten(params) if path.startswith("prompt/")]


def prefix_arrays(params: Any, config: PrefixConfig, uses: Uses = None) -> list[str]:
    """Paths of what makes the prefix."""
    return [path for path in trees.flatten(params) if path.startswith("prefix/")]


# --- Sizes ----------------------------------------------------------------------------------------


def _word_table(params: Any, uses: Uses) -> str:
    """The path of the word vectors: the table of that name, or else the largest one."""
    parameters = trees.flatten(params)
    tables = [
        path
        for path in parameters
        if (path in uses and uses[path].kind == "embedding" if uses else path.endswith("embedding"))
    ]
    if not tables:
        raise ValueError("a prompt stands before word vectors, but the model looks up none.")
    words = [path for path in tables if path.split("/")[-2:-1] == ["word"]]
    return max(words or tables, key=lambda path: parameters[path].shape[0])


def _keys_of(params: Any) -> dict[str, tuple[int, int]]:
    """(layers, kv_heads * head_dim) by place, read off the kernels that make keys.

    A place is the stack that the layers are in, "" where there is one stack alone, or "cross".
    """
    sizes: dict[str, tuple[int, int]] = {}
    for path, kernel in trees.flatten(params).items():
        if not (match := _KEYS.fullmatch(path)):
            continue
        place = "cross" if match["cross"] else (match["stack"] or "").rstrip("/")
        width = kernel.shape[-1] // (3 if match["kind"] == "qkv" else 1)
        layers, _ = sizes.get(place, (0, width))
        sizes[place] = (layers + 1 if match["layer"] else kernel.shape[0], width)
    if not sizes:
        raise ValueError("a prefix stands before a layer's keys, but the model names none of them.")
    return sizes


_KEYS = re.compile(
    r"(?P<stack>.*/)?layers(?P<layer>_\d+)?/(?P<cross>cross_)?attention/(?P<kind>key|qkv)/kernel"
)


def _layer(key: Array, d_in: int, d_out: int) -> dict[str, Array]:
    """A dense layer as torch starts one: uniform in +-1/sqrt(d_in)."""
    bound = d_in**-0.5
    key_kernel, key_bias = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(key_kernel, (d_in, d_out), jnp.float32, -bound, bound),
        "bias": jax.random.uniform(key_bias, (d_out,), jnp.float32, -bound, bound),
    }


def _with_subtree(params: Any, name: str, subtree: dict[str, Any]) -> Any:
    if name in params:
        raise ValueError(f"the parameters have a {name!r} already.")
    return {**params, name: subtree}


def _check_length(config: Any) -> None:
    if config.length < 1:
        raise ValueError(f"{type(config).__name__}.length must be at least 1, got {config.length}.")
