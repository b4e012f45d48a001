"""Prompts and prefixes of an encoder-decoder as PEFT keeps them, with what it never reads of them.

A prompt's tensor has rows for both halves, of which the encoder's come first and are all that is
read. A prefix's is as long as one stack's, `[n, 2 * layers * width]`; its pieces, twice over, are
dealt out by four, and of each four the decoder's attention takes the first two, keys and values:
with an even number of layers those of layer i and i + layers / 2 are the same, and half of the
pieces are read by none. They are kept as `unread`, so that a file goes out as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.leaves import is_leaf
from lorax_ft.models.model import Model
from lorax_ft.models.t5_config import T5Config
from lorax_ft.models.virtual import split_virtual

UNREAD = "unread"


def is_seq2seq(model: Model) -> bool:
    """Whether PEFT would keep the model's prompts and prefixes in this way."""
    return model.task == "seq2seq_lm"


def split_prompt(vectors: np.ndarray, length: int) -> dict[str, Any]:
    """The subtree of a prompt of `length` vectors from PEFT's rows `[length or more, d]`."""
    subtree = {"embedding": jnp.asarray(vectors[:length])}
    return subtree | ({UNREAD: jnp.asarray(vectors[length:])} if len(vectors) > length else {})


def prompt_rows(vectors: np.ndarray, subtree: Mapping[str, Any]) -> np.ndarray:
    """PEFT's rows `[2 * n, d]` of the vectors `[n, d]` that a prompt's subtree gives."""
    unread = np.asarray(subtree.get(UNREAD, np.zeros_like(vectors)))
    return np.concatenate([vectors, unread])


def split_prefix(vectors: np.ndarray, config: Any) -> dict[str, Any]:
    """The subtree of a prefix from PEFT's rows `[n, 2 * layers * width]`."""
    layers = _layers(config)
    pieces = vectors.reshape(len(vectors), 2 * layers, -1).transpose(1, 0, 2)
    first = _first_pieces(layers)
    subtree: dict[str, Any] = {
        "decoder": {"key": jnp.asarray(pieces[first]), "value": jnp.asarray(pieces[first + 1])}
    }
    if len(first) < layers:
        subtree[UNREAD] = jnp.asarray(np.stack([pieces[first + 2], pieces[first + 3]]))
    return subtree


def prefix_rows(params: Mapping[str, Any], config: Any) -> np.ndarray:
    """PEFT's rows `[n, 2 * layers * width]` of a prefix. Raises ValueError as `check_prefix`."""
    check_prefix(params)
    layers, past = _layers(config), split_virtual(params)[1].decoder_prefix
    assert past is not None
    key, value = map(np.asarray, past)
    pieces = np.zeros((2 * layers, *key.shape[1:]), key.dtype)
    first = _first_pieces(layers)
    pieces[first], pieces[first + 1] = key, value
    if UNREAD in params["prefix"]:
        pieces[first + 2], pieces[first + 3] = np.asarray(params["prefix"][UNREAD])
    return pieces.transpose(1, 0, 2).reshape(key.shape[1], -1)


def check_embedding(params: Any) -> None:
    """Raises ValueError for adapted word vectors that two halves share: PEFT adapts none of theirs,
    which each half looks up in a table of its own."""
    word = trees.flatten(params).get("embeddings/word/embedding")
    if {"encoder", "decoder"} <= set(params) and is_leaf(word):
        raise ValueError(
            "save_peft: embeddings/word/embedding is adapted, which PEFT would leave as it is in "
            "the base. Leave word vectors out of the targets, or save the merged model."
        )


def check_prefix(params: Mapping[str, Any]) -> None:
    """Raises ValueError for a prefix of an encoder-decoder that PEFT has no tensor for."""
    prefix = params.get("prefix", {})
    others = sorted(set(prefix) & {"encoder", "cross"})
    if others:
        raise ValueError(
            f"save_peft: the prefix has {', '.join(others)}, and PEFT knows none there. Train with "
            "PrefixConfig.places=('decoder',), or keep the run's own adapter."
        )
    past = split_virtual(params)[1].decoder_prefix
    if past is not None and UNREAD not in prefix and past[0].shape[0] % 2 == 0:
        raise ValueError(
            f"save_peft: each of the decoder's {past[0].shape[0]} layers has a prefix of its own, "
            "and in PEFT every two layers of an even number share one. Keep the run's own adapter."
        )


def _first_pieces(layers: int) -> np.ndarray:
    """The numbers of the pieces that are keys, by layer, as often as they differ."""
    different = layers if layers % 2 else layers // 2
    return 4 * np.arange(different) % (2 * layers)


def _layers(config: Any) -> int:
    assert isinstance(config, T5Config)
    layers, of_decoder = config.num_hidden_layers, config.decoder.num_hidden_layers
    if layers != of_decoder:
        raise ValueError(
            f"PEFT's prefixes are for as many layers in both halves, not {layers} and {of_decoder} "
            "(num_hidden_layers, num_decoder_layers)."
        )
    return layers
