"""Beam search: several texts are gone on with side by side, and the likeliest whole is answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lorax_ft.generation.choosing import Numbers
from lorax_ft.models import Cache

Array = jax.Array
Decode = Callable[[Array, Cache], tuple[Array, Cache]]

LOWEST = -1e9  # the score of what must not be chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """Texts `[batch, beams, max_new_tokens]` and their scores `[batch, beams]`, best first."""

    tokens: Array
    scores: Array

    def take(self, beams: Array) -> Beams:
        """The beams of those numbers `[batch, n]`."""
        tokens = jnp.take_along_axis(self.tokens, beams[:, :, None], axis=1)
        return Beams(tokens, jnp.take_along_axis(self.scores, beams, axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    step: Array  # how many tokens there are
    live: Beams  # scores are sums of log-probabilities
    done: Beams  # scores are divided by the length penalty
    lengths: Array  # [batch, beams]: of those that are done; 0 where none is yet
    improvable: Array  # [batch]
    is_stuck: Array  # no beam can be gone on with
    logits: Array  # [batch * beams, vocabulary]: of the next token
    cache: Cache


def search(
    decode: Decode,
    logits: Array,
    cache: Cache,
    numbers: Numbers,
    *,
    num_beams: int,
    max_new_tokens: int,
    early_stopping: bool | str,
) -> tuple[Array, Array]:
    """The best text `[batch, max_new_tokens]` and its length, by transformers' rules.

    A score is the sum of the tokens' log-probabilities divided by length to the power
    `length_penalty`. With `early_stopping` a search ends when it has as many whole texts as beams;
    without, when the best beam as it is could not beat the worst of these; with "never", when it
    could not even at full length.

    Args:
        decode: (tokens, cache) to the next token's logits and the cache.
        logits: `[batch, vocabulary]` of the first token, as `Model.prefill` gives them.
        cache: of the texts so far, a row each.
        numbers: length penalty, and the tokens that end a text.
        num_beams: how many.
        max_new_tokens: where every text ends.
        early_stopping: True, False or "never".
    """
    batch = len(logits)
    rows = jnp.repeat(jnp.arange(batch), num_beams)
    texts = jnp.broadcast_to(numbers.pad, (batch, num_beams, max_new_tokens))
    scores = jnp.full((batch, num_beams), LOWEST)
    start = _State(
        step=jnp.int32(0),
        live=Beams(texts, scores.at[:, 0].set(0)),  # all are the same: one is gone on with
        done=Beams(texts, scores),
        lengths=jnp.zeros((batch, num_beams), jnp.int32),
        improvable=jnp.ones(batch, bool),
        is_stuck=jnp.bool_(False),
        logits=logits[rows],
        cache=cache.take(rows),
    )

    def extend(state: _State) -> _State:
        """All beams with one more token."""
        state, rows = _grow(state, numbers, max_new_tokens, early_stopping)
        token = lax.dynamic_index_in_dim(state.live.tokens, state.step - 1, 2, keepdims=False)
        logits, cache = decode(token.reshape(-1), state.cache.take(rows))
        return dataclasses.replace(state, logits=logits, cache=cache)

    def goes_on(state: _State) -> Array:
        has_all = (state.lengths > 0).all() & (early_stopping is True)
        return state.improvable.any() & ~has_all & ~state.is_stuck

    state = lax.while_loop(goes_on, extend, start)
    return state.done.tokens[:, 0], state.lengths[:, 0]


def _grow(
    state: _State, numbers: Numbers, max_new_tokens: int, early_stopping: bool | str
) -> tuple[_State, Array]:
    """The beams one token longer; and the cache's rows that those to go on with come from."""
    batch, beams, _ = state.live.tokens.shape
    candidates, origins = _candidates(state, beams * max(2, 1 + len(numbers.eos)))
    token = lax.dynamic_index_in_dim(candidates.tokens, state.step, 2, keepdims=False)
    length = state.step + 1
    ends = numbers.ends(token) | (length == max_new_tokens)

    live = jnp.where(ends, candidates.scores + LOWEST, candidates.scores)
    live, chosen = lax.top_k(live, beams)
    rows = jnp.take_along_axis(origins, chosen, axis=1)
    rows = rows + jnp.arange(batch)[:, None] * beams
    grown = Beams(candidates.take(chosen).tokens, live)
    done, lengths = _finish(state, candidates, ends, length, numbers, early_stopping)

    # what the best beam would score, were it whole now (or, at best, at full length)
    at_best = max_new_tokens if early_stopping == "never" else length
    at_best = jnp.where(numbers.length_penalty > 0, at_best, length).astype(jnp.float32)
    best = live[:, :1] / at_best**numbers.length_penalty
    worst = jnp.where(lengths > 0, done.scores.min(axis=1, keepdims=True), LOWEST)
    state = dataclasses.replace(
        state,
        step=length,
        live=grown,
        done=done,
        lengths=lengths,
        improvable=state.improvable & (best > worst).any(axis=1),
        is_stuck=ends.all(),
    )
    return state, rows.reshape(-1)


def _candidates(state: _State, count: int) -> tuple[Beams, Array]:
    """The likeliest texts of one token more, and the numbers of the beams they go on with."""
    batch, beams, _ = state.live.tokens.shape
    log_probabilities = jax.nn.log_softmax(state.logits, axis=-1).reshape(batch, beams, -1)
    vocabulary = log_probabilities.shape[-1]
    sums = (log_probabilities + state.live.scores[:, :, None]).reshape(batch, -1)
    scores, numbers = lax.top_k(sums, min(count, sums.shape[-1]))
    origins = numbers // vocabulary
    tokens = state.live.take(origins).tokens
    token = (numbers % vocabulary).astype(tokens.dtype)
    tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, :, None], state.step, axis=2)
    return Beams(tokens, scores), origins


def _finish(
    state: _State,
    candidates: Beams,
    ends: Array,
    length: Array,
    numbers: Numbers,
    early_stopping: bool | str,
) -> tuple[Beams, Array]:
    """The best whole texts so far, and their lengths."""
    beams = state.live.tokens.shape[1]
    is_whole = ends & (jnp.arange(ends.shape[1]) < beams)[None]  # the others stand in reserve
    is_open = state.improvable
    if early_stopping is True:
        is_open &= ~(state.lengths > 0).all(axis=1)
    scores = candidates.scores / length.astype(jnp.float32) ** numbers.length_penalty
    scores = jnp.where(is_whole & is_open[:, None], scores, LOWEST)
    tokens = jnp.concatenate([state.done.tokens, candidates.tokens], axis=1)
    scores = jnp.concatenate([state.done.scores, scores], axis=1)
    lengths = jnp.concatenate([state.lengths, jnp.where(is_whole, length, 0)], axis=1)
    _, chosen = lax.top_k(scores, beams)
    return Beams(tokens, scores).take(chosen), jnp.take_along_axis(lengths, chosen, axis=1)
