"""BERT (Devlin et al. 2019): encoder, classification of sequences and tokens, masked words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lorax_ft.methods import Virtual
from lorax_ft.models import hugging_face
from lorax_ft.models.attention import Attention
from lorax_ft.models.layers import (
    ACTIVATIONS,
    Array,
    ComputeConfig,
    Dense,
    Embedding,
    LayerNorm,
    activate,
    before,
    dropout,
    key_mask,
    positions,
    run_layers,
)

PREFIX = "bert."

NAMES: hugging_face.Names = {
    "embeddings/word": "bert.embeddings.word_embeddings",
    "embeddings/position": "bert.embeddings.position_embeddings",
    "embeddings/token_type": "bert.embeddings.token_type_embeddings",
    "embeddings/norm": "bert.embeddings.LayerNorm",
    "layers/attention/query": "bert.encoder.layer.{layer}.attention.self.query",
    "layers/attention/key": "bert.encoder.layer.{layer}.attention.self.key",
    "layers/attention/value": "bert.encoder.layer.{layer}.attention.self.value",
    "layers/attention/output": "bert.encoder.layer.{layer}.attention.output.dense",
    "layers/attention_norm": "bert.encoder.layer.{layer}.attention.output.LayerNorm",
    "layers/mlp/up": "bert.encoder.layer.{layer}.intermediate.dense",
    "layers/mlp/down": "bert.encoder.layer.{layer}.output.dense",
    "layers/mlp_norm": "bert.encoder.layer.{layer}.output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
    "lm_head/transform": "cls.predictions.transform.dense",
    "lm_head/norm": "cls.predictions.transform.LayerNorm",
    "lm_head": "cls.predictions",
}

# Modules that a task may leave unread, and those that may start anew where a checkpoint lacks them.
HEADS = ("pooler", "classifier", "lm_head")
NEW_HEADS = HEADS

# What a checkpoint may hold beside these: buffers, heads of other tasks, repetitions of a tensor.
FOREIGN = (
    "bert.embeddings.position_ids",
    "bert.embeddings.token_type_ids",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

# How names ended in checkpoints converted from TensorFlow.
OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

TASKS = {  # by transformers' class names; the first of a task is the one written
    "BertModel": "encoder",
    "BertForSequenceClassification": "sequence_classification",
    "BertForTokenClassification": "token_classification",
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "masked_lm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """What a BERT is; fields as in transformers' config.json."""

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
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    label_names: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
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
    def max_length(self) -> int:
        """The longest sequence that has positions."""
        return self.max_position_embeddings

    @classmethod
    def from_hugging_face(
        cls, raw: Mapping[str, Any], ignore_fields: tuple[str, ...] = ()
    ) -> BertConfig:
        """Reads a config.json. Raises ValueError naming a field that is not handled."""
        own = {field.name for field in dataclasses.fields(cls)} - {"label_names"}
        fields = hugging_face.take_fields(
            raw,
            fields=own | {"id2label", "num_labels"},
            neutral={"position_embedding_type": ("absolute",), "tie_word_embeddings": (True,)},
            harmless=("bos_token_id", "eos_token_id", "directionality", *_POOLER_FIELDS),
            ignore=ignore_fields,
        )
        values = {name: value for name, value in fields.items() if name in own}
        return cls(**values, label_names=hugging_face.label_names(fields))

    def to_hugging_face(self) -> dict[str, Any]:
        """The config.json, without the class name that says the task."""
        fields = dataclasses.asdict(self)
        labels = hugging_face.label_fields(fields.pop("label_names"))
        return {"model_type": "bert", **fields, **labels}


# Written by Google's converter of the multilingual checkpoints; nothing reads them.
_POOLER_FIELDS = (
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)


class Encoded(NamedTuple):
    """What the bare encoder returns."""

    hidden_states: Array  # [batch, length, d]
    pooled: Array  # [batch, d]


class Bert(nn.Module):
    """The whole model; what it returns is its task's: `Encoded`, or float32 logits."""

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
    ) -> Array | Encoded:
        """Inputs are integers `[batch, length]`; in the mask 1 is a token and 0 padding.

        A prompt is a part of the text: what pools the first position pools the prompt's. What is
        returned by token is of the real ones.
        """
        config, compute = self.config, self.compute
        prompt, prefix = virtual.prompt_length, virtual.prefix_length
        embeddings = BertEmbeddings(config, compute, name="embeddings")
        position_ids = positions(input_ids, position_ids, prompt, prefix)
        x = embeddings(input_ids, token_type_ids, position_ids, virtual.prompt)
        mask = key_mask(attention_mask, prompt + prefix)
        x = run_layers(BertLayer, config, compute, x, virtual.prefix, mask)
        first, x = x[:, 0], x[:, prompt:]
        if self.task == "masked_lm":
            return BertLMHead(config, compute, name="lm_head")(x, embeddings.word.logits)
        if self.task == "token_classification":
            return self._classify(x)
        pooler = Dense(config.hidden_size, compute, stddev=config.initializer_range, name="pooler")
        pooled = jnp.tanh(pooler(first))
        return Encoded(x, pooled) if self.task == "encoder" else self._classify(pooled)

    def _classify(self, x: Array) -> Array:
        config = self.config
        rate = config.classifier_dropout
        x = dropout(self, x, config.hidden_dropout_prob if rate is None else rate)
        return Dense(
            len(config.label_names),
            self.compute,
            stddev=config.initializer_range,
            out_dtype=jnp.float32,
            name="classifier",
        )(x)


class BertEmbeddings(nn.Module):
    """The sum of word, position and token-type vectors, normalised."""

    config: BertConfig
    compute: ComputeConfig

    def setup(self):
        config = self.config

        def table(size: int) -> Embedding:
            return Embedding(size, config.hidden_size, self.compute, config.initializer_range)

        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings)
        self.token_type = table(config.type_vocab_size)
        self.norm = LayerNorm(config.layer_norm_eps, self.compute)

    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array,
        prompt: Array | None,
    ) -> Array:
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        elif prompt is not None:
            token_type_ids = jnp.pad(token_type_ids, ((0, 0), (prompt.shape[0], 0)))
        words = before(prompt, self.word(input_ids))
        x = words + self.token_type(token_type_ids) + self.position(position_ids)
        return dropout(self, self.norm(x), self.config.hidden_dropout_prob)


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
            num_kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            compute=compute,
            dropout_rate=config.attention_probs_dropout_prob,
            stddev=config.initializer_range,
            name="attention",
        )
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
    """A dense layer, then float32 logits by the table of word vectors and a bias for each word."""

    config: BertConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array, decode: Callable[[Array], Array]) -> Array:
        config, compute = self.config, self.compute
        stddev = config.initializer_range
        x = Dense(config.hidden_size, compute, stddev=stddev, name="transform")(x)
        x = activate(x, config.hidden_act)
        x = LayerNorm(config.layer_norm_eps, compute, name="norm")(x)
        shape, dtype = (config.vocab_size,), jnp.dtype(compute.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype)
        return decode(x) + bias.astype(jnp.float32)[None, None]
