"""Writing: the compiled loop over tokens, and the same token by token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax_ft.generation.beams import search
from lorax_ft.generation.choosing import GenerationConfig, Numbers, choose
from lorax_ft.lift import lift
from lorax_ft.methods import repeat_index, set_dropout_key
from lorax_ft.models import Cache, Model

Array = jax.Array
PyTree = Any


def generate(
    model: Model,
    params: PyTree,
    inputs: Mapping[str, Any],
    config: GenerationConfig = GenerationConfig(),
    key: Array | None = None,
) -> tuple[Array, Array]:
    """What the model writes after each text: one compiled program for all texts of a shape.

    Args:
        model: a model for the task "causal_lm", or for "seq2seq_lm": it reads sources, padded on
            any side, and writes their targets.
        params: its parameters, with the leaves, prompts and prefixes of any method.
        inputs: `input_ids` `[batch, length]` and, for texts of several lengths, an
            `attention_mask` that pads them on the left.
        config: how to choose.
        key: for drawing, where `do_sample`.

    Returns tokens `[batch, max_new_tokens]`, and how many of each row count (the one that ends the
    text among them): padding follows. Raises ValueError for padding on the right, for a key that
    does not go with `do_sample`, and where texts and new tokens have no positions.
    """
    _check(model, inputs, config, key)
    return _generate(params, dict(inputs), _numbers(model, config), key, model, _static(config))


def stream(
    model: Model,
    params: PyTree,
    inputs: Mapping[str, Any],
    config: GenerationConfig = GenerationConfig(),
    key: Array | None = None,
) -> Iterator[np.ndarray]:
    """The tokens that `generate` returns, `[batch]` at a time; -1 for a text that has ended.

    Raises as `generate` does, and ValueError for beams, whose tokens are known at the end alone.
    """
    _check(model, inputs, config, key)
    if config.num_beams > 1:
        raise ValueError("GenerationConfig.num_beams must be 1 to stream: beams end all at once.")
    numbers, static = _numbers(model, config), _static(config)
    state = _begin(params, dict(inputs), numbers, key, model, static)
    while True:
        length, tokens = np.asarray(state.length), np.asarray(state.tokens)
        step = int(state.step)
        yield np.where(length == step, tokens[:, step - 1], -1)
        if step == config.max_new_tokens or np.asarray(state.ended).all():
            return
        state = _go_on(params, state, numbers, model)


def ends_of(model: Model) -> tuple[int, ...]:
    """The tokens that end a text by a model's config."""
    eos = getattr(model.config, "eos_token_id", None)
    return () if eos is None else eos if isinstance(eos, tuple) else (eos,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where texts are between two tokens."""

    step: Array  # how many tokens there are
    tokens: Array  # [batch, max_new_tokens]
    length: Array  # [batch]: how many of them count
    ended: Array  # [batch]
    cache: Cache
    key: Array | None

    def append(self, logits: Array, cache: Cache, numbers: Numbers) -> State:
        """The state with one more token, chosen by logits `[batch, vocabulary]`."""
        key = None if self.key is None else jax.random.fold_in(self.key, self.step)
        token = jnp.where(self.ended, numbers.pad, choose(logits, key, numbers))
        return State(
            step=self.step + 1,
            tokens=lax.dynamic_update_slice_in_dim(self.tokens, token[:, None], self.step, axis=1),
            length=jnp.where(self.ended, self.length, self.step + 1),
            ended=self.ended | numbers.ends(token),
            cache=cache,
            key=self.key,
        )


@dataclasses.dataclass(frozen=True)
class _Static:
    """What of a config another compilation is needed for."""

    max_new_tokens: int
    num_beams: int
    early_stopping: bool | str


def _static(config: GenerationConfig) -> _Static:
    return _Static(config.max_new_tokens, config.num_beams, config.early_stopping)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _generate(
    params: PyTree,
    inputs: dict[str, Array],
    numbers: Numbers,
    key: Array | None,
    model: Model,
    static: _Static,
) -> tuple[Array, Array]:
    if static.num_beams > 1:
        logits, cache = _prefill(params, inputs, model, static)
        params = repeat_index(params, static.num_beams)
        return search(
            lambda tokens, cache: _decode(params, tokens, cache, model),
            logits,
            cache,
            numbers,
            num_beams=static.num_beams,
            max_new_tokens=static.max_new_tokens,
            early_stopping=static.early_stopping,
        )
    state = lax.while_loop(
        lambda state: (state.step < static.max_new_tokens) & ~state.ended.all(),
        lambda state: _go_on(params, state, numbers, model),
        _begin(params, inputs, numbers, key, model, static),
    )
    return state.tokens, state.length


@functools.partial(jax.jit, static_argnums=(4, 5))
def _begin(
    params: PyTree,
    inputs: dict[str, Array],
    numbers: Numbers,
    key: Array | None,
    model: Model,
    static: _Static,
) -> State:
    """Texts with their first token."""
    logits, cache = _prefill(params, inputs, model, static)
    batch = len(logits)
    state = State(
        step=jnp.int32(0),
        tokens=jnp.broadcast_to(numbers.pad, (batch, static.max_new_tokens)),
        length=jnp.zeros(batch, jnp.int32),
        ended=jnp.zeros(batch, bool),
        cache=cache,
        key=key,
    )
    return state.append(logits, cache, numbers)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
def _go_on(params: PyTree, state: State, numbers: Numbers, model: Model) -> State:
    """Texts with one more token."""
    last = lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1, keepdims=False)
    return state.append(*_decode(params, last, state.cache, model), numbers)


def _prefill(
    params: PyTree, inputs: dict[str, Array], model: Model, static: _Static
) -> tuple[Array, Cache]:
    read = lift(functools.partial(model.prefill, new_tokens=static.max_new_tokens))
    return read(set_dropout_key(params, None), inputs)


def _decode(params: PyTree, tokens: Array, cache: Cache, model: Model) -> tuple[Array, Cache]:
    return lift(model.decode)(set_dropout_key(params, None), tokens, cache)


def _numbers(model: Model, config: GenerationConfig) -> Numbers:
    eos = ends_of(model) if config.eos_token_id is None else config.eos_token_id
    pad = model.config.pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    return Numbers(
        temperature=jnp.float32(config.temperature),
        top_k=jnp.int32(config.top_k or model.config.vocab_size),
        top_p=jnp.float32(config.top_p),
        length_penalty=jnp.float32(config.length_penalty),
        eos=jnp.array(eos, jnp.int32),
        pad=jnp.int32(pad),
    )


def _check(
    model: Model, inputs: Mapping[str, Any], config: GenerationConfig, key: Array | None
) -> None:
    if config.do_sample != (key is not None):
        raise ValueError(
            f"GenerationConfig.do_sample is {config.do_sample}, and a key is "
            f"{'not ' if key is None else ''}given: they go together."
        )
    mask = None if model.task == "seq2seq_lm" else inputs.get("attention_mask")
    if mask is not None and not np.asarray(mask)[:, -1].all():
        row = int(np.argmin(np.asarray(mask)[:, -1]))
        raise ValueError(
            f"attention_mask[{row}] ends in padding: pad on the left, so that every text's last "
            "token stands at the end."
        )
