"""BERT (Devlin et al. 2019), and RoBERTa and DistilBERT, which differ from it as `encoders` says.

Encoder, classification of sequences and of tokens, masked words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lorax_ft.logits import Logits
from lorax_ft.models import hugging_face
from lorax_ft.models.attention import Attention
from lorax_ft.models.encoders import VARIANTS, Variant
from lorax_ft.models.heads import tied
from lorax_ft.models.layers import (
    ACTIVATIONS,
    Array,
    ComputeConfig,
    Dense,
    Embedding,
    LayerNorm,
    activate,
    dropout,
    layer_input,
    run_layers,
)
from lorax_ft.models.virtual import Virtual, before, key_mask, positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """What a BERT is; fields as in transformers' config.json of a BERT.

    Defaults are BERT's. Those of another family are in its `encoders.Variant`, and
    `from_hugging_face({"model_type": "roberta"})` starts from them.
    """

    model_type: str = "bert"  # a key of encoders.VARIANTS
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # hidden_dropout_prob where None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2  # DistilBERT has no token types
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    label_names: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
        if self.model_type not in VARIANTS:
            raise ValueError(
                f"BertConfig.model_type must be one of {', '.join(map(repr, VARIANTS))}, "
                f"got {self.model_type!r}."
            )
        for name, theirs in self.variant.field_names.items():
            if theirs is None and getattr(self, name) != getattr(BertConfig, name):
                raise ValueError(f"BertConfig.{name} is no setting of a {self.model_type}.")
        if self.variant.skips_padding and self.pad_token_id is None:
            raise ValueError(
                f"BertConfig.pad_token_id must be given for a {self.model_type}, whose positions "
                "are counted by it."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig.hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"BertConfig.hidden_act must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.hidden_act!r}."
            )

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.model_type]

    @property
    def first_position(self) -> int:
        """The number of the first token's position."""
        return (self.pad_token_id or 0) + 1 if self.variant.skips_padding else 0

    @property
    def sequence_dropout(self) -> float:
        """The rate before a sequence's classifier."""
        rate = self.classifier_dropout
        return self.hidden_dropout_prob if rate is None else rate

    @property
    def token_dropout(self) -> float:
        """The rate before the tokens' classifier."""
        shared = self.variant.classifier_dropout_of_tokens
        return self.sequence_dropout if shared else self.hidden_dropout_prob

    @property
    def max_length(self) -> int:
        """The longest sequence that has positions."""
        return self.max_position_embeddings - self.first_position

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
    ) -> BertConfig:
        """Reads a config.json. Raises ValueError naming a field that is not handled."""
        default = cls(model_type=raw.get("model_type", "bert"))
        variant, names = default.variant, default.variant.field_names
        own = {field.name for field in dataclasses.fields(cls)} - {"label_names", "model_type"}
        fields = hugging_face.take_fields(
            raw,
            fields={f for f in own if names.get(f, f)} | {"id2label", "num_labels"},
            names={field: name for field, name in names.items() if name},
            neutral=variant.neutral,
            harmless=variant.harmless,
            ignore=ignore_fields,
        )
        values = {name: value for name, value in fields.items() if name in own}
        labels = hugging_face.label_names(fields)
        return dataclasses.replace(default, **{**variant.defaults, **values}, label_names=labels)

    def to_hugging_face(self) -> dict[str, Any]:
        """The config.json, without the class name that says the task."""
        names = self.variant.field_names
        fields = dataclasses.asdict(self)
        labels = hugging_face.label_fields(fields.pop("label_names"))
        return {name: fields[f] for f in fields if (name := names.get(f, f))} | labels


class Encoded(NamedTuple):
    """What the bare encoder returns."""

    hidden_states: Array  # [batch, length, d]
    pooled: Array  # [batch, d]; the first token's where the family has no pooler


class Bert(nn.Module):
    """The whole model; it returns its task's: `Logits`, float32 ones of classes, or `Encoded`."""

    config: BertConfig
    compute: ComputeConfig
    task: str

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        virtual: Virtual = Virtual(),
    ) -> Array | Logits | Encoded:
        """Inputs are integers `[batch, length]`; in the mask 1 is a token and 0 padding.

        A prompt is a part of the text: what pools the first position pools the prompt's. What is
        returned by token is of the real ones.
        """
        config, compute = self.config, self.compute
        embeddings = BertEmbeddings(config, compute, name="embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids, virtual)
        mask = key_mask(attention_mask, virtual.prompt_length + virtual.prefix_length)
        x = run_layers(BertLayer, config, compute, x, virtual.prefix, mask)
        first, x = x[:, 0], x[:, virtual.prompt_length :]
        if self.task == "masked_lm":
            return BertLMHead(config, compute, name="lm_head")(x, embeddings.word)
        if self.task == "token_classification":
            return self._classify(x, config.token_dropout)
        if self.task == "sequence_classification" and config.variant.has_dense_classifier:
            return BertDenseClassifier(config, compute, name="classifier")(first)
        if self.task == "encoder" and not config.variant.encoder_has_pooler:
            return Encoded(x, first)
        pooler = Dense(config.hidden_size, compute, stddev=config.initializer_range, name="pooler")
        pooled = ACTIVATIONS[config.variant.pooler_act](pooler(first))
        if self.task == "encoder":
            return Encoded(x, pooled)
        return self._classify(pooled, config.sequence_dropout)

    def _classify(self, x: Array, rate: float) -> Array:
        x = dropout(self, x, rate)
        return _classifier(self.config, self.compute, "classifier")(x)


def _classifier(config: BertConfig, compute: ComputeConfig, name: str) -> Dense:
    count, stddev = len(config.label_names), config.initializer_range
    return Dense(count, compute, stddev=stddev, out_dtype=jnp.float32, name=name)


class BertDenseClassifier(nn.Module):
    """RoBERTa's head for sequences: a dense layer, tanh, and a projection to the classes."""

    config: BertConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, compute = self.config, self.compute
        dense = Dense(config.hidden_size, compute, stddev=config.initializer_range, name="dense")
        x = jnp.tanh(dense(dropout(self, x, config.sequence_dropout)))
        x = dropout(self, x, config.sequence_dropout)
        return _classifier(config, compute, "projection")(x)


class BertEmbeddings(nn.Module):
    """The sum of word, position and token-type vectors, normalised.

    Where the family has no token types, those that a tokenizer gives are left unread.
    """

    config: BertConfig
    compute: ComputeConfig

    def setup(self):
        config = self.config

        def table(size: int) -> Embedding:
            return Embedding(size, config.hidden_size, self.compute, config.initializer_range)

        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings)
        if config.variant.has_token_types:
            self.token_type = table(config.type_vocab_size)
        self.norm = LayerNorm(config.layer_norm_eps, self.compute)

    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array | None,
        virtual: Virtual,
    ) -> Array:
        x = before(virtual.prompt, self.word(input_ids))
        position_ids = self._positions(input_ids, position_ids, virtual)
        if self.config.variant.has_token_types:
            if token_type_ids is None:
                token_type_ids = jnp.zeros((1, 1), jnp.int32)
            elif virtual.prompt_length:
                token_type_ids = jnp.pad(token_type_ids, ((0, 0), (virtual.prompt_length, 0)))
            x = x + self.token_type(token_type_ids)
        x = x + self.position(position_ids)
        return dropout(self, self.norm(x), self.config.hidden_dropout_prob)

    def _positions(self, input_ids: Array, position_ids: Array | None, virtual: Virtual) -> Array:
        config, prompt, prefix = self.config, virtual.prompt_length, virtual.prefix_length
        start = config.first_position
        if not config.variant.skips_padding or prompt or position_ids is not None:
            # where padding is skipped too: transformers looks at no ids behind a prompt
            return positions(input_ids, position_ids, prompt, prefix, start)
        is_token = (input_ids != config.pad_token_id).astype(jnp.int32)
        return (is_token.cumsum(axis=1) + prefix) * is_token + (start - 1)


class BertLayer(nn.Module):
    """Attention and a feed-forward net, each added to its input and normalised after."""

    config: BertConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self, x: Array, past: tuple[Array, Array] | None, mask: Array | None
    ) -> tuple[Array, None]:
        config, compute = self.config, self.compute
        attention = Attention(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.size_of_head,
            compute=compute,
            dropout_rate=config.attention_probs_dropout_prob,
            stddev=config.initializer_range,
            name="attention",
        )
        x = layer_input(x)
        y = dropout(self, attention(x, mask, past=past), config.hidden_dropout_prob)
        x = LayerNorm(config.layer_norm_eps, compute, name="attention_norm")(x + y)
        y = dropout(self, BertMLP(config, compute, name="mlp")(x), config.hidden_dropout_prob)
        return LayerNorm(config.layer_norm_eps, compute, name="mlp_norm")(x + y), None


class BertMLP(nn.Module):
    """Two dense layers with an activation between."""

    config: BertConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, stddev = self.config, self.config.initializer_range
        x = Dense(config.intermediate_size, self.compute, stddev=stddev, name="up")(x)
        x = activate(x, config.hidden_act)
        return Dense(config.hidden_size, self.compute, stddev=stddev, name="down")(x)


class BertLMHead(nn.Module):
    """A dense layer, then logits by the table of word vectors and a bias for each word."""

    config: BertConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array, words: Embedding) -> Logits:
        config, compute = self.config, self.compute
        stddev = config.initializer_range
        x = Dense(config.hidden_size, compute, stddev=stddev, name="transform")(x)
        x = activate(x, config.variant.lm_head_act or config.hidden_act)
        x = LayerNorm(config.layer_norm_eps, compute, name="norm")(x)
        shape, dtype = (config.vocab_size,), jnp.dtype(compute.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        return dataclasses.replace(tied(words, x), bias=bias)
