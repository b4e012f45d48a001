"""Prompts and prefixes as PEFT keeps them: one tensor `prompt_embeddings`, behind no net any more.

A prefix is `[n, 2 * layers * kv_heads * head_dim]`: layer by layer, keys before values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.interop import files, seq2seq
from lorax_ft.models.model import Model
from lorax_ft.models.virtual import split_virtual

PREFIX = "base_model."
TENSOR = "prompt_embeddings"
READ = frozenset(
    """
    encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type
    init_weights modules_to_save num_attention_heads num_layers num_transformer_submodules
    num_virtual_tokens prefix_projection prompt_tuning_init prompt_tuning_init_text token_dim
    tokenizer_kwargs tokenizer_name_or_path
    """.split()
)


def to_peft(
    model: Model, params: Any, trainable: trees.Patterns
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the config, tensors) of a prompt or prefix and of the arrays saved whole.

    A net that makes the vectors is left behind: PEFT keeps what it gives.
    """
    own, virtual = split_virtual(params)
    # files.plain_tensors names parameters of the model alone
    chosen = [
        path
        for path in trees.select(trees.flatten(params), trainable, field="trainable")
        if not path.startswith(("prompt/", "prefix/"))
    ]
    patterns = [re.escape(path) for path in chosen]
    saved, biases = files.plain_tensors(model.family.tables, own, patterns)
    is_prefix = "prefix" in params
    if is_prefix and seq2seq.is_seq2seq(model):
        vectors, layers = seq2seq.prefix_rows(params, model.config), model.config.num_hidden_layers
        width = vectors.shape[1] // (2 * layers)
    elif virtual.prefix is not None:
        pieces = np.stack([np.asarray(piece) for piece in virtual.prefix], axis=1)
        layers, _, length, width = pieces.shape  # [layers, keys or values, n, width]
        vectors = pieces.transpose(2, 0, 1, 3).reshape(length, -1)
    else:
        vectors = np.asarray(virtual.prompt)
        layers, width = model.config.num_hidden_layers, vectors.shape[1]
    length = vectors.shape[0]
    if not is_prefix and seq2seq.is_seq2seq(model):
        vectors = seq2seq.prompt_rows(vectors, params["prompt"])
    config = {
        "modules_to_save": files.modules_of(saved, biases, model.family.tables),
        "num_attention_heads": (
            model.config.kv_heads if is_prefix else model.config.num_attention_heads
        ),
        "num_layers": layers,
        "num_transformer_submodules": 2 if seq2seq.is_seq2seq(model) else 1,
        "num_virtual_tokens": length,
        "token_dim": width,
    }
    config |= (
        {"prefix_projection": False, "encoder_hidden_size": width}
        if is_prefix
        else {"prompt_tuning_init": "RANDOM"}
    )
    return config, {TENSOR: vectors, **{PREFIX + name: tensor for name, tensor in saved.items()}}


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    model: Model | None,
    params: Any,
) -> tuple[Any, tuple[str, ...]]:
    """Params with a `prompt` or `prefix` beside, and the patterns of what is trained.

    Raises ValueError where `model` is None, for vectors of another size than the model's, and
    where `files` raises.
    """
    files.check_fields(config, READ, required=("num_virtual_tokens",))
    if model is None:
        raise ValueError(
            f"load_peft: peft_type {config['peft_type']} stands before the tokens of a built-in "
            "model: give the `Model`, not the names of modules."
        )
    if TENSOR not in tensors:
        raise ValueError(f"load_peft: {files.WEIGHTS} holds no {TENSOR!r}.")
    paths = trees.flatten(params)
    plain: files.Pieces = {}
    for key, tensor in tensors.items():
        if key != TENSOR:
            name = key.removeprefix("base_model.model.").removeprefix(PREFIX)
            files.add_plain(plain, key, name, tensor, model.family.tables, paths)
    params, trained = files.fill(params, plain)
    vectors, length = tensors[TENSOR], int(config["num_virtual_tokens"])
    is_prefix = config["peft_type"] == "PREFIX_TUNING"
    halves = 1
    if seq2seq.is_seq2seq(model) and not is_prefix:
        halves = config.get("num_transformer_submodules") or 2
    if vectors.shape[0] != halves * length:
        raise ValueError(
            f"load_peft: {TENSOR} has {vectors.shape[0]} rows, but num_virtual_tokens is {length}"
            + (f", for {halves} halves." if halves > 1 else ".")
        )
    if is_prefix:
        params = _with_prefix(vectors, model, params)
        return params, (*trained, _all_but_unread(params, "prefix"))
    d = model.config.hidden_size
    if vectors.shape[1] != d:
        raise ValueError(
            f"load_peft: {TENSOR} has {vectors.shape[1]} numbers a row, but the model's word "
            f"vectors have {d}. Is this the adapter's base model?"
        )
    prompt = seq2seq.split_prompt(vectors, length)
    params = {**params, "prompt": prompt}
    return params, (*trained, _all_but_unread(params, "prompt"))


def _all_but_unread(params: Mapping[str, Any], name: str) -> str:
    """The pattern of what is trained of a prompt or prefix."""
    if seq2seq.UNREAD in params[name]:
        return rf"{name}/(?!{seq2seq.UNREAD}$).*"
    return f"{name}/.*"


def _with_prefix(vectors: np.ndarray, model: Model, params: Any) -> Any:
    config = model.config
    width = config.kv_heads * config.size_of_head
    layers, length = config.num_hidden_layers, vectors.shape[0]
    if vectors.shape[1] != 2 * layers * width:
        raise ValueError(
            f"load_peft: {TENSOR} has {vectors.shape[1]} numbers a row, but keys and values of "
            f"{layers} layers of {width} have {2 * layers * width}. Is this the adapter's base "
            "model?"
        )
    if seq2seq.is_seq2seq(model):
        return {**params, "prefix": seq2seq.split_prefix(vectors, config)}
    pieces = vectors.reshape(length, layers, 2, width).transpose(1, 2, 0, 3)
    prefix = {"key": jnp.asarray(pieces[:, 0]), "value": jnp.asarray(pieces[:, 1])}
    return {**params, "prefix": prefix}
