"""How tokens are chosen: the settings, and what they do to logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How tokens are chosen, and when a text ends; names as in transformers."""

    max_new_tokens: int = 64
    do_sample: bool = False  # draw each token instead of taking the likeliest
    temperature: float = 1.0  # of what is drawn: logits are divided by it
    top_k: int | None = None  # draw from the k likeliest alone
    top_p: float = 1.0  # draw from the likeliest that together have this probability
    num_beams: int = 1  # texts that are gone on with side by side, to answer the likeliest whole
    length_penalty: float = 1.0  # a beam's score is divided by its length to this power
    early_stopping: bool | str = False  # of beams: True, False or "never", as in transformers
    eos_token_id: tuple[int, ...] | None = None  # tokens that end a text; the model's where None

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0 (do_sample=False takes the likeliest)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "early_stopping": (self.early_stopping in (True, False, "never"), "a bool or 'never'"),
        }
        for field, (holds, expected) in checks.items():
            if not holds:
                raise ValueError(
                    f"GenerationConfig.{field} is {getattr(self, field)!r}, expected {expected}."
                )
        if self.do_sample and self.num_beams > 1:
            raise ValueError("GenerationConfig: do_sample and num_beams > 1 exclude each other.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
    """What of a config may change without another compilation: scalars, but for `eos`."""

    temperature: Array
    top_k: Array
    top_p: Array
    length_penalty: Array
    eos: Array  # [n]: tokens that end a text
    pad: Array  # the token that stands behind a text's end

    def ends(self, tokens: Array) -> Array:
        """Whether each token ends its text."""
        return (tokens[..., None] == self.eos.reshape((1,) * tokens.ndim + (-1,))).any(-1)


def choose(logits: Array, key: Array | None, numbers: Numbers) -> Array:
    """Tokens `[batch]` by logits `[batch, vocabulary]`: drawn; without a key the likeliest."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits / numbers.temperature, numbers.top_k, numbers.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def restrict(logits: Array, top_k: Array | int, top_p: Array | float) -> Array:
    """Logits `[batch, vocabulary]` with -inf for tokens that must not be drawn.

    Those are all but the `top_k` likeliest (Fan et al. 2018), and of these all but the fewest that
    together have at least the probability `top_p` (Holtzman et al. 2020).

    >>> restrict(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), top_k=2, top_p=0.5).tolist()
    [[-inf, -0.5108255743980408, -inf]]
    """
    falling = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])[None]
    falling = jnp.where(rank < top_k, falling, -jnp.inf)
    probability = jax.nn.softmax(falling, axis=-1)
    of_likelier = jnp.cumsum(probability, axis=-1) - probability
    is_kept = (rank < top_k) & (of_likelier < top_p)
    lowest = jnp.min(jnp.where(is_kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
