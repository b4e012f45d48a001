"""GPT-2 (Radford et al. 2019): causal language modelling and sequence classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import linen as nn

from lorax_ft.logits import Logits
from lorax_ft.models import hugging_face
from lorax_ft.models.attention import Attention
from lorax_ft.models.heads import Head, tied
from lorax_ft.models.layers import (
    ACTIVATIONS,
    Array,
    ComputeConfig,
    Dense,
    Embedding,
    LayerNorm,
    activate,
    dropout,
    head,
    last_token,
    layer_input,
    run_layers,
)
from lorax_ft.models.virtual import Virtual, before, check_segments, key_mask, positions

NAMES: hugging_face.Names = {
    "embeddings/word": "transformer.wte",
    "embeddings/position": "transformer.wpe",
    "layers/attention_norm": "transformer.h.{layer}.ln_1",
    "layers/attention/qkv": "transformer.h.{layer}.attn.c_attn",
    "layers/attention/output": "transformer.h.{layer}.attn.c_proj",
    "layers/mlp_norm": "transformer.h.{layer}.ln_2",
    "layers/mlp/up": "transformer.h.{layer}.mlp.c_fc",
    "layers/mlp/down": "transformer.h.{layer}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "score": "score",
}

TABLES = hugging_face.Tables(
    prefix="transformer.",
    names=NAMES,
    tasks={
        "GPT2LMHeadModel": "causal_lm",
        "GPT2ForSequenceClassification": "sequence_classification",
    },
    heads=("lm_head", "score"),
    new_heads=("score",),
    classifier=("score",),
    foreign=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    tied={"lm_head.weight": "transformer.wte.weight"},
    conv1d=frozenset(
        {"layers/attention/qkv", "layers/attention/output", "layers/mlp/up", "layers/mlp/down"}
    ),
)

# What config.json calls our fields, where it is not the same.
FIELD_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "max_position_embeddings": "n_positions",
    "embedding_dropout": "embd_pdrop",
    "residual_dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "layer_norm_eps": "layer_norm_epsilon",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config:
    """What a GPT-2 is; fields are named as other families', and in config.json by FIELD_NAMES."""

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None  # four times hidden_size where None
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 1024
    embedding_dropout: float = 0.1
    residual_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    label_names: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"Gpt2Config.hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"Gpt2Config.hidden_act (activation_function) must be one of "
                f"{', '.join(ACTIVATIONS)}, got {self.hidden_act!r}."
            )

    @property
    def max_length(self) -> int:
        """The longest sequence that has positions."""
        return self.max_position_embeddings

    @property
    def kv_heads(self) -> int:
        """How many heads keys and values have: as many as queries."""
        return self.num_attention_heads

    @property
    def size_of_head(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hugging_face(
        cls, raw: Mapping[str, Any], ignore_fields: tuple[str, ...] = ()
    ) -> Gpt2Config:
        """Reads a config.json. Raises ValueError naming a field that is not handled."""
        own = {field.name for field in dataclasses.fields(cls)} - {"label_names"}
        fields = hugging_face.take_fields(
            raw,
            fields=own | {"id2label", "num_labels"},
            names=FIELD_NAMES,
            neutral={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
            harmless=_HARMLESS,
            ignore=ignore_fields,
        )
        values = {name: value for name, value in fields.items() if name in own}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return cls(**values, label_names=hugging_face.label_names(fields))

    def to_hugging_face(self) -> dict[str, Any]:
        """The config.json, without the class name that says the task."""
        fields = dataclasses.asdict(self)
        labels = hugging_face.label_fields(fields.pop("label_names"))
        return {
            "model_type": self.model_type,
            **hugging_face.renamed(fields, FIELD_NAMES),
            **labels,
        }


# Of the head for multiple choice, of training in half precision, and of old releases.
_HARMLESS = (
    "_num_labels",
    "n_ctx",
    "reorder_and_upcast_attn",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)


class Gpt2(nn.Module):
    """The whole model; it returns its task's: `Logits`, or float32 ones of classes."""

    config: Gpt2Config
    compute: ComputeConfig
    task: str

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        virtual: Virtual = Virtual(),
    ) -> Array | Logits:
        """Inputs are integers `[batch, length]`; in the mask 1 is a token and 0 padding.

        A token sees those of its own segment alone.
        """
        config, compute = self.config, self.compute
        embeddings = Gpt2Embeddings(config, compute, name="embeddings")
        prompt, prefix = virtual.prompt_length, virtual.prefix_length
        position_ids = positions(input_ids, position_ids, prompt, prefix)
        mask = key_mask(attention_mask, prompt + prefix)
        x = embeddings(input_ids, position_ids, virtual.prompt)
        check_segments(segment_ids, virtual)
        x = run_layers(Gpt2Layer, config, compute, x, virtual.prefix, mask, segment_ids)
        x = LayerNorm(config.layer_norm_eps, compute, name="norm")(x[:, prompt:])
        if self.task == "sequence_classification":
            x = last_token(x, input_ids, attention_mask, config.pad_token_id)
            return head(len(config.label_names), compute, config.initializer_range, "score")(x)
        if config.tie_word_embeddings:
            return tied(embeddings.word, x)
        return Head(config.vocab_size, compute, config.initializer_range, name="lm_head")(x)


class Gpt2Embeddings(nn.Module):
    """The sum of word and position vectors."""

    config: Gpt2Config
    compute: ComputeConfig

    def setup(self):
        config, stddev = self.config, self.config.initializer_range
        size, longest = config.hidden_size, config.max_position_embeddings
        self.word = Embedding(config.vocab_size, size, self.compute, stddev)
        self.position = Embedding(longest, size, self.compute, stddev)

    def __call__(self, input_ids: Array, position_ids: Array, prompt: Array | None) -> Array:
        x = before(prompt, self.word(input_ids)) + self.position(position_ids)
        return dropout(self, x, self.config.embedding_dropout)


class Gpt2Layer(nn.Module):
    """Attention and a feed-forward net, each normalised before and added to its input."""

    config: Gpt2Config
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        past: tuple[Array, Array] | None,
        mask: Array | None,
        segments: Array | None,
    ) -> tuple[Array, None]:
        config, compute = self.config, self.compute
        attention = Attention(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.size_of_head,
            compute=compute,
            is_fused=True,
            is_causal=True,
            dropout_rate=config.attention_dropout,
            stddev=config.initializer_range,
            name="attention",
        )
        x = layer_input(x)
        norm = LayerNorm(config.layer_norm_eps, compute, name="attention_norm")
        y = attention(norm(x), mask, past=past, segments=segments)
        x = x + dropout(self, y, config.residual_dropout)
        norm = LayerNorm(config.layer_norm_eps, compute, name="mlp_norm")
        y = Gpt2MLP(config, compute, name="mlp")(norm(x))
        return x + dropout(self, y, config.residual_dropout), None


class Gpt2MLP(nn.Module):
    """Two dense layers with an activation between."""

    config: Gpt2Config
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, stddev = self.config, self.config.initializer_range
        inner = config.intermediate_size or 4 * config.hidden_size
        x = activate(Dense(inner, self.compute, stddev=stddev, name="up")(x), config.hidden_act)
        return Dense(config.hidden_size, self.compute, stddev=stddev, name="down")(x)
