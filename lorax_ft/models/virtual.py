"""What stands before the real tokens: prompts and prefixes, as a model reads them.

`lorax_ft.methods.prompts` puts them beside a model's own parameters, as `prompt` and `prefix`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_ft.models.layers import Array

# Where an encoder-decoder's layers may have prefixes: each has its own below `prefix`.
PLACES = ("encoder", "decoder", "cross")


@dataclasses.dataclass(frozen=True)
class Virtual:
    """What stands before the real tokens: any of it may be None."""

    prompt: Array | None = None  # [n, d]
    prefix: tuple[Array, Array] | None = None  # keys and values [layers, n, kv_heads * head_dim]

    # Of an encoder-decoder, whose encoder has the two above: before what the decoder's layers
    # attend to, of their own sequence and of the encoder's.
    decoder_prefix: tuple[Array, Array] | None = None
    cross_prefix: tuple[Array, Array] | None = None

    @property
    def prompt_length(self) -> int:
        return 0 if self.prompt is None else self.prompt.shape[0]

    @property
    def prefix_length(self) -> int:
        return length_of(self.prefix)


def length_of(prefix: tuple[Array, Array] | None) -> int:
    """How many keys and values stand in front."""
    return 0 if prefix is None else prefix[0].shape[1]


def split_virtual(params: Mapping[str, Any]) -> tuple[dict[str, Any], Virtual]:
    """(the model's own parameters, what stands before the real tokens)."""
    own = {name: value for name, value in params.items() if name not in ("prompt", "prefix")}
    prompt = _net(params["prompt"], jax.nn.relu) if "prompt" in params else None
    prefix = params.get("prefix")
    if prefix is None or not set(prefix) & set(PLACES):
        return own, Virtual(prompt, _prefix(prefix))
    return own, Virtual(prompt, *(_prefix(prefix.get(place)) for place in PLACES))


def _prefix(subtree: Mapping[str, Any] | None) -> tuple[Array, Array] | None:
    if subtree is None:
        return None
    if "key" in subtree:
        return subtree["key"], subtree["value"]
    flat = _net(subtree, jnp.tanh)  # [n, 2 * layers * width]: layer by layer, keys before values
    length, width = subtree["embedding"].shape
    pieces = flat.reshape(length, -1, 2, width).transpose(1, 2, 0, 3)
    return pieces[:, 0], pieces[:, 1]


def _net(subtree: Mapping[str, Any], activation: Any) -> Array:
    """The vectors, behind the net if there is one."""
    x = subtree["embedding"]
    count = sum(name.startswith("net_") for name in subtree)
    for i in range(count):
        layer = subtree[f"net_{i}"]
        x = x @ layer["kernel"] + layer["bias"][None]
        x = activation(x) if i < count - 1 else x
    return x


def before(prompt: Array | None, x: Array) -> Array:
    """Word vectors `[batch, length, d]` with a prompt `[n, d]` before each row's."""
    if prompt is None:
        return x
    rows = jnp.broadcast_to(prompt.astype(x.dtype)[None], (x.shape[0], *prompt.shape))
    return jnp.concatenate([rows, x], axis=1)


def positions(
    ids: Array, position_ids: Array | None, prompt: int, prefix: int, start: int = 0
) -> Array:
    """Position ids `[batch or 1, prompt + length]`, counted on from the prefix and the prompt.

    `start` is the first position there is.
    """
    if position_ids is None:
        return start + prefix + jnp.arange(prompt + ids.shape[1])[None]
    first = start + jnp.broadcast_to(jnp.arange(prompt)[None], (position_ids.shape[0], prompt))
    return prefix + jnp.concatenate([first, position_ids + prompt], axis=1)


def check_segments(segment_ids: Array | None, virtual: Virtual) -> None:
    """Raises ValueError for texts that share a row behind one prompt."""
    if segment_ids is not None and virtual.prompt is not None:
        raise ValueError(
            "segment_ids: a prompt stands before each text, and packed rows hold several. Train "
            "prompts with data.packed_length = None."
        )


def key_mask(attention_mask: Array | None, virtual: int) -> Array | None:
    """The mask of keys `[batch, 1, 1, virtual + length]`; what stands first is always seen."""
    if attention_mask is None:
        return None
    seen = jnp.pad(attention_mask.astype(bool), ((0, 0), (virtual, 0)), constant_values=True)
    return seen[:, None, None, :]
