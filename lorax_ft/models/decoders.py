"""The families of decoders: names, defaults, and what each computes otherwise than LLaMA.

Mistral is Jiang et al. 2023, Qwen2 Yang et al. 2024, Qwen3 Yang et al. 2025, Gemma and Gemma 2 the
Gemma Team 2024.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lorax_ft.models.hugging_face import Names, Tables

FULL, SLIDING = "full_attention", "sliding_attention"  # of layers, as transformers calls them

LLAMA_NAMES: Names = {
    "embeddings/word": "model.embed_tokens",
    "layers/attention_norm": "model.layers.{layer}.input_layernorm",
    "layers/attention/query": "model.layers.{layer}.self_attn.q_proj",
    "layers/attention/key": "model.layers.{layer}.self_attn.k_proj",
    "layers/attention/value": "model.layers.{layer}.self_attn.v_proj",
    "layers/attention/output": "model.layers.{layer}.self_attn.o_proj",
    "layers/mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{layer}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{layer}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{layer}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "score": "score",
}

ROTATED = ("layers/attention/query/", "layers/attention/key/")  # by rotary positions

QWEN3_NAMES: Names = {
    **LLAMA_NAMES,
    "layers/attention/query_norm": "model.layers.{layer}.self_attn.q_norm",
    "layers/attention/key_norm": "model.layers.{layer}.self_attn.k_norm",
}

GEMMA2_NAMES: Names = {
    **LLAMA_NAMES,
    "layers/attention_output_norm": "model.layers.{layer}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "layers/mlp_output_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One family: what Hugging Face calls its parts, and how it differs from LLaMA."""

    tables: Tables

    # Fields of `LlamaConfig` that only some families have; the others leave them at their defaults.
    fields: tuple[str, ...] = ()

    # Defaults of config fields, where transformers has others for this family than for LLaMA.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    # What config.json calls our fields, where it is not the same.
    field_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    # Further entries of config.json: with the values at which they change nothing, or harmless.
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()

    # Which layers slide where config.json has no layer_types: (layers, config.json) to their types.
    layer_types: Callable[[int, Mapping[str, Any]], tuple[str, ...]] | None = None

    # Whether config.json also has use_sliding_window, and max_window_layers, the first that slides.
    has_window_switch: bool = False

    # Activations that config.json calls by another's name.
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)

    has_qkv_bias: bool = False  # on query, key and value, and none on the output
    has_qk_norm: bool = False  # of each head's queries and keys
    has_output_norms: bool = False  # of what each sublayer adds, beside those of its inputs
    norm_offset: float = 0.0  # scales of norms are kept less this
    scales_embeddings: bool = False  # word vectors are multiplied by the root of their size


def _tables(family: str, names: Names = LLAMA_NAMES) -> Tables:
    return Tables(
        prefix="model.",
        names=names,
        tasks={
            f"{family}ForCausalLM": "causal_lm",
            f"{family}ForSequenceClassification": "sequence_classification",
        },
        heads=("lm_head", "score"),
        new_heads=("score",),
        classifier=("score",),
        foreign=("model.rotary_emb.inv_freq", "model.layers.{layer}.self_attn.rotary_emb.inv_freq"),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


def _alternating(layers: int, raw: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(FULL if i % 2 else SLIDING for i in range(layers))


def _upper(layers: int, raw: Mapping[str, Any]) -> tuple[str, ...]:
    lowest = raw.get("max_window_layers", 28)
    return tuple(SLIDING if i >= lowest else FULL for i in range(layers))


_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GEMMA = {
    "vocab_size": 256000,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

VARIANTS: Mapping[str, Variant] = {  # by config.json's model_type
    "llama": Variant(
        tables=_tables("Llama"),
        fields=("attention_bias", "mlp_bias"),
        harmless=("max_sequence_length",),
    ),
    "mistral": Variant(
        tables=_tables("Mistral"),
        fields=("sliding_window",),
        defaults={
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Variant(
        tables=_tables("Qwen2"),
        fields=("sliding_window", "layer_types"),
        defaults={**_QWEN, "sliding_window": 4096},
        neutral={"use_mrope": (False,)},
        layer_types=_upper,
        has_window_switch=True,
        has_qkv_bias=True,
    ),
    "qwen3": Variant(
        tables=_tables("Qwen3", QWEN3_NAMES),
        fields=("attention_bias", "sliding_window", "layer_types"),
        defaults={**_QWEN, "sliding_window": 4096, "head_dim": 128},
        layer_types=_upper,
        has_window_switch=True,
        has_qk_norm=True,
    ),
    "gemma": Variant(
        tables=_tables("Gemma"),
        fields=("attention_bias",),
        defaults={
            **_GEMMA,
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 24576,
        },
        neutral={
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": (None, False),
        },
        activations={"gelu": "gelu_pytorch_tanh"},
        norm_offset=1.0,
        scales_embeddings=True,
    ),
    "gemma2": Variant(
        tables=_tables("Gemma2", GEMMA2_NAMES),
        fields=(
            "attention_bias",
            "sliding_window",
            "layer_types",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        defaults={
            **_GEMMA,
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 9216,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        field_names={"hidden_act": "hidden_activation"},
        neutral={
            "hidden_act": ("gelu_pytorch_tanh",),  # which transformers does not read
            "use_bidirectional_attention": (None, False),
        },
        harmless=("cache_implementation", "sliding_window_size"),
        layer_types=_alternating,
        has_output_norms=True,
        norm_offset=1.0,
        scales_embeddings=True,
    ),
}
