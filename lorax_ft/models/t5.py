"""T5 (Raffel et al. 2020), and the gated T5 1.1 and Flan-T5: text to text, and the encoder alone.

Relative positions are a bias on attention's products, one table for all layers of a half; products
are not scaled, which the kernels' initial values make up for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax_ft.models import hugging_face
from lorax_ft.models.attention import Attention, CrossAttention
from lorax_ft.models.bert import Encoded
from lorax_ft.models.layers import (
    ACTIVATIONS,
    Array,
    ComputeConfig,
    Dense,
    Embedding,
    RMSNorm,
    activate,
    dropout,
    head,
    run_layers,
)
from lorax_ft.models.virtual import Virtual, before, key_mask

IGNORED = -100  # a label that is not scored, as in Hugging Face's data
Past = tuple[Array, Array] | None

_ENCODER, _DECODER = "encoder.block.{layer}.layer", "decoder.block.{layer}.layer"
NAMES: hugging_face.Names = {
    "embeddings/word": "shared",
    "encoder/position_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder/layers/attention_norm": f"{_ENCODER}.0.layer_norm",
    "encoder/layers/attention/query": f"{_ENCODER}.0.SelfAttention.q",
    "encoder/layers/attention/key": f"{_ENCODER}.0.SelfAttention.k",
    "encoder/layers/attention/value": f"{_ENCODER}.0.SelfAttention.v",
    "encoder/layers/attention/output": f"{_ENCODER}.0.SelfAttention.o",
    "encoder/layers/mlp_norm": f"{_ENCODER}.1.layer_norm",
    "encoder/layers/mlp/up": f"{_ENCODER}.1.DenseReluDense.wi",
    "encoder/layers/mlp/down": f"{_ENCODER}.1.DenseReluDense.wo",
    "encoder/norm": "encoder.final_layer_norm",
    "decoder/position_bias": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder/layers/attention_norm": f"{_DECODER}.0.layer_norm",
    "decoder/layers/attention/query": f"{_DECODER}.0.SelfAttention.q",
    "decoder/layers/attention/key": f"{_DECODER}.0.SelfAttention.k",
    "decoder/layers/attention/value": f"{_DECODER}.0.SelfAttention.v",
    "decoder/layers/attention/output": f"{_DECODER}.0.SelfAttention.o",
    "decoder/layers/cross_attention_norm": f"{_DECODER}.1.layer_norm",
    "decoder/layers/cross_attention/query": f"{_DECODER}.1.EncDecAttention.q",
    "decoder/layers/cross_attention/key": f"{_DECODER}.1.EncDecAttention.k",
    "decoder/layers/cross_attention/value": f"{_DECODER}.1.EncDecAttention.v",
    "decoder/layers/cross_attention/output": f"{_DECODER}.1.EncDecAttention.o",
    "decoder/layers/mlp_norm": f"{_DECODER}.2.layer_norm",
    "decoder/layers/mlp/up": f"{_DECODER}.2.DenseReluDense.wi",
    "decoder/layers/mlp/down": f"{_DECODER}.2.DenseReluDense.wo",
    "decoder/norm": "decoder.final_layer_norm",
    "lm_head": "lm_head",
}
GATED_NAMES: hugging_face.Names = {
    **NAMES,
    "encoder/layers/mlp/gate": f"{_ENCODER}.1.DenseReluDense.wi_0",
    "encoder/layers/mlp/up": f"{_ENCODER}.1.DenseReluDense.wi_1",
    "decoder/layers/mlp/gate": f"{_DECODER}.2.DenseReluDense.wi_0",
    "decoder/layers/mlp/up": f"{_DECODER}.2.DenseReluDense.wi_1",
}

TABLES = hugging_face.Tables(
    prefix="",
    names=NAMES,
    tasks={
        "T5ForConditionalGeneration": "seq2seq_lm",
        "T5WithLMHeadModel": "seq2seq_lm",  # as the first releases called it
        "T5EncoderModel": "encoder",
    },
    heads=("decoder", "lm_head"),
    new_heads=(),
    classifier=(),
    # a table of the first releases, which nothing read
    foreign=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    tied={"lm_head.weight": "shared.weight"},
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
)

# What config.json calls our fields, where it is not the same.
FIELD_NAMES = {
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_act": "dense_act_fn",
    "is_gated": "is_gated_act",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """What a T5 is; fields are named as other families', and in config.json by FIELD_NAMES.

    Defaults are those of T5 1.0. What is called T5 1.1 is gated, with an activation of "gelu_new",
    a head of its own (`tie_word_embeddings`) and outputs that are not scaled before it.
    """

    model_type: ClassVar[str] = "t5"

    vocab_size: int = 32128
    hidden_size: int = 512
    head_dim: int = 64
    intermediate_size: int = 2048
    num_hidden_layers: int = 6  # of the encoder
    num_decoder_layers: int | None = None  # num_hidden_layers where None
    num_attention_heads: int = 8
    hidden_act: str = "relu"
    is_gated: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True  # by the root of hidden_size, before the head
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int = 0  # what the decoder reads first

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"T5Config.hidden_act (of feed_forward_proj) must be one of "
                f"{', '.join(ACTIVATIONS)}, got {self.hidden_act!r}."
            )
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 2:
            raise ValueError(
                "T5Config.relative_attention_num_buckets must be even and at least 4, got "
                f"{buckets}."
            )
        if distance <= buckets // 2:
            raise ValueError(
                f"T5Config.relative_attention_max_distance ({distance}) must be more than half of "
                f"relative_attention_num_buckets ({buckets})."
            )

    @property
    def decoder(self) -> T5Config:
        """The config with as many layers as the decoder has."""
        layers = self.num_decoder_layers or self.num_hidden_layers
        return dataclasses.replace(self, num_hidden_layers=layers)

    @property
    def tables(self) -> hugging_face.Tables:
        names = GATED_NAMES if self.is_gated else NAMES
        return dataclasses.replace(TABLES, names=names)

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads

    @property
    def size_of_head(self) -> int:
        return self.head_dim

    @property
    def max_length(self) -> None:
        """Positions are relative: they end nowhere."""
        return None

    @classmethod
    def from_hugging_face(
        cls, raw: Mapping[str, Any], ignore_fields: tuple[str, ...] = ()
    ) -> T5Config:
        """Reads a config.json. Raises ValueError naming a field that is not handled."""
        own = {field.name for field in dataclasses.fields(cls)}
        fields = hugging_face.take_fields(
            raw,
            fields=own | {"feed_forward_proj"},
            names=FIELD_NAMES,
            neutral={"is_encoder_decoder": (True, False)},  # as the task says
            harmless=_HARMLESS,
            ignore=ignore_fields,
        )
        activation, is_gated = _feed_forward(fields.pop("feed_forward_proj", "relu"))
        values = {"hidden_act": activation, "is_gated": is_gated, **fields}
        tied = bool(values.get("tie_word_embeddings", True))
        values.setdefault("scale_decoder_outputs", tied)  # all that transformers 4 said of it
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return cls(**values)

    def to_hugging_face(self) -> dict[str, Any]:
        """The config.json, without the class name that says the task."""
        fields = dataclasses.asdict(self)
        fields["num_decoder_layers"] = self.decoder.num_hidden_layers
        activation = "gelu" if self.is_gated and self.hidden_act == "gelu_new" else self.hidden_act
        return {
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "feed_forward_proj": f"gated-{activation}" if self.is_gated else activation,
            **hugging_face.renamed(fields, FIELD_NAMES),
        }


_HARMLESS = ("classifier_dropout", "id2label", "n_positions", "num_labels", "output_past")


def _feed_forward(projection: str) -> tuple[str, bool]:
    """The activation and whether it is of a gate: `"gated-gelu"` is `("gelu_new", True)`."""
    gated, _, activation = projection.rpartition("-")
    if gated not in ("", "gated"):
        raise ValueError(
            f"config.json: feed_forward_proj = {projection!r} is not handled, only the name of an "
            "activation, with 'gated-' before it or without."
        )
    return ("gelu_new" if projection == "gated-gelu" else activation), bool(gated)


def shift_right(labels: Array, start: int, padding: int) -> Array:
    """What the decoder reads to predict `labels` `[batch, length]`: they, one place later.

    `start` is the config's `decoder_start_token_id`; for labels that are not scored (-100) the
    decoder reads `padding`.

    >>> shift_right(jnp.array([[7, 8, 1, -100, -100]]), start=0, padding=0).tolist()
    [[0, 7, 8, 1, 0]]
    """
    ids = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return jnp.where(ids == IGNORED, padding, ids)


class T5(nn.Module):
    """The whole model; it returns its task's: float32 logits, or `Encoded`."""

    config: T5Config
    compute: ComputeConfig
    task: str

    def setup(self):
        config, compute = self.config, self.compute
        self.embeddings = T5Embeddings(config, compute)
        self.encoder = T5Encoder(config, compute)
        if self.task == "encoder":
            return
        self.decoder = T5Decoder(config.decoder, compute)
        if not config.tie_word_embeddings:
            factor = config.initializer_factor
            self.lm_head = head(config.vocab_size, compute, factor, "lm_head")

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        virtual: Virtual = Virtual(),
    ) -> Array | Encoded:
        """Logits `[batch, target length, vocabulary]` of each next token of the target.

        Inputs are integers, `[batch, length]` of the source and `[batch, target length]` of the
        decoder; in the masks 1 is a token and 0 padding. The encoder alone returns vectors of the
        real tokens, and their mean.
        """
        memory = self.encode(input_ids, attention_mask, virtual)
        if self.task == "encoder":
            return _encoded(memory[:, virtual.prompt_length :], attention_mask)
        if decoder_input_ids is None:
            raise ValueError(
                "decoder_input_ids is missing: give what the decoder has read so far, such as "
                "shift_right(labels, start, padding)."
            )
        return self.decode(
            decoder_input_ids, memory, attention_mask, decoder_attention_mask, virtual
        )

    def encode(
        self, input_ids: Array, attention_mask: Array | None = None, virtual: Virtual = Virtual()
    ) -> Array:
        """The encoder's output, of the prompt too: `[batch, prompt + length, d]`."""
        x = self.embeddings(input_ids, virtual.prompt)
        mask = key_mask(attention_mask, virtual.prompt_length + virtual.prefix_length)
        return self.encoder(x, mask, virtual.prefix)

    def decode(
        self,
        decoder_input_ids: Array,
        memory: Array | None,
        attention_mask: Array | None = None,
        decoder_attention_mask: Array | None = None,
        virtual: Virtual = Virtual(),
    ) -> Array:
        """Float32 logits `[batch, target length, vocabulary]` by what `encode` made.

        Where the collection "cache" is mutable, the first call keeps keys and values in as many
        slots as `decoder_attention_mask` has, those of `memory` too; further ones read on with
        `memory` and `virtual` left out but `attention_mask` as it was, with the prompt's and the
        prefix's places in it.
        """
        x = self.embeddings(decoder_input_ids, None)
        past, cross_past = virtual.decoder_prefix, virtual.cross_prefix
        mask = key_mask(decoder_attention_mask, _length(past))
        memory_mask = key_mask(attention_mask, virtual.prompt_length + _length(cross_past))
        x = self.decoder(x, mask, memory, memory_mask, past, cross_past)
        if self.config.scale_decoder_outputs:
            x = x * jnp.asarray(self.config.hidden_size**-0.5, x.dtype)
        if self.config.tie_word_embeddings:
            return self.embeddings.word.logits(x)
        return self.lm_head(x)


def _length(past: Past) -> int:
    return 0 if past is None else past[0].shape[1]


def _encoded(x: Array, attention_mask: Array | None) -> Encoded:
    """Vectors of tokens, and their mean in place of what a pooler would give."""
    if attention_mask is None:
        attention_mask = jnp.ones((1, x.shape[1]), jnp.int32)
    weights = attention_mask.astype(jnp.float32)[:, :, None]
    total = jnp.maximum(weights.sum(axis=1), 1.0)
    pooled = (x.astype(jnp.float32) * weights).sum(axis=1) / total
    return Encoded(x, pooled.astype(x.dtype))


class T5Embeddings(nn.Module):
    """The table of word vectors, which both halves read."""

    config: T5Config
    compute: ComputeConfig

    def setup(self):
        config = self.config
        stddev = config.initializer_factor
        self.word = Embedding(config.vocab_size, config.hidden_size, self.compute, stddev)

    def __call__(self, input_ids: Array, prompt: Array | None) -> Array:
        x = before(prompt, self.word(input_ids))
        return dropout(self, x, self.config.dropout_rate)


class T5Encoder(nn.Module):
    """Layers in which every token sees every other, and a norm."""

    config: T5Config
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, past: Past) -> Array:
        """`[batch, length, d]` to the same, keys and values `[layers, n, d]` before its own."""
        config, compute = self.config, self.compute
        past = _of_every_layer(past, config)
        bias = T5PositionBias(config, compute, name="position_bias")
        length = x.shape[1]
        y = bias(length, _length(past) + length, _length(past), is_causal=False)
        x = run_layers(T5EncoderLayer, config, compute, x, past, mask, y)
        return dropout(self, _norm(config, compute, "norm")(x), config.dropout_rate)


class T5Decoder(nn.Module):
    """Layers in which a token sees those before it and the encoder's, and a norm."""

    config: T5Config
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        memory: Array | None,
        memory_mask: Array | None,
        past: Past,
        cross_past: Past,
    ) -> Array:
        """`[batch, length, d]` to the same, by the encoder's `memory` `[batch, keys, d]`."""
        config, compute = self.config, self.compute
        by_layer = _of_every_layer(past, config), _of_every_layer(cross_past, config)
        length = x.shape[1]
        first, keys = _length(past), _length(past) + length
        if self.is_mutable_collection("cache") and not self.is_initializing():
            assert mask is not None  # it says how many slots there are
            first, keys = first + self.get_variable("cache", "index", 0), mask.shape[-1]
            self.put_variable("cache", "index", jnp.asarray(first + length, jnp.int32))
        bias = T5PositionBias(config, compute, name="position_bias")
        y = bias(length, keys, first, is_causal=True)
        x = run_layers(T5DecoderLayer, config, compute, x, by_layer, mask, y, memory, memory_mask)
        return dropout(self, _norm(config, compute, "norm")(x), config.dropout_rate)


def _of_every_layer(past: Past, config: T5Config) -> Past:
    """Keys and values `[layers, n, d]` of fewer, which take turns."""
    if past is None:
        return None
    layers, rows = config.num_hidden_layers, past[0].shape[0]
    if layers % rows:
        raise ValueError(f"A prefix of {rows} layers does not fit a T5 of {layers}.")
    key, value = (jnp.tile(array, (layers // rows, 1, 1)) for array in past)
    return key, value


class T5PositionBias(nn.Module):
    """What is added to attention's products, by how far a key is from the query: by buckets."""

    config: T5Config
    compute: ComputeConfig

    @nn.compact
    def __call__(self, length: int, keys: int, first: int | Array, *, is_causal: bool) -> Array:
        """`[1, heads, length, keys]`, the first query standing at key `first`."""
        config = self.config
        buckets = config.relative_attention_num_buckets
        shape, dtype = (buckets, config.num_attention_heads), jnp.dtype(self.compute.param_dtype)
        start = nn.initializers.normal(config.initializer_factor * config.hidden_size**-0.5)
        table = self.param("embedding", start, shape, dtype)
        distance = jnp.arange(keys)[None] - (first + jnp.arange(length)[:, None])
        longest = config.relative_attention_max_distance
        bucket = position_buckets(distance, buckets, longest, is_causal=is_causal)
        bias = jnp.take(table, bucket, axis=0).astype(self.compute.dtype)
        return bias.transpose(2, 0, 1)[None]


def position_buckets(distance: Array, buckets: int, longest: int, *, is_causal: bool) -> Array:
    """The numbers of the buckets that distances from queries to keys fall in, of the same shape.

    Half of the buckets of a direction are of one distance each, the others are ever wider up to
    `longest`; what is farther is in the last. Where all keys are before their query, all buckets
    are of that direction; else the second half is of keys behind.
    """
    if is_causal:
        return _bucket(jnp.maximum(-distance, 0), buckets, longest)
    half = buckets // 2
    return jnp.where(distance > 0, half, 0) + _bucket(jnp.abs(distance), half, longest)


def _bucket(distance: Array, buckets: int, longest: int) -> Array:
    """The buckets of one direction, looked up: a device's logarithm need not hit their edges."""
    exact, every = buckets // 2, np.arange(longest + 1)
    steps = np.log(np.maximum(every, 1) / exact) / math.log(longest / exact) * (buckets - exact)
    table = np.where(every < exact, every, np.minimum(exact + steps.astype(int), buckets - 1))
    return jnp.take(jnp.asarray(table, jnp.int32), jnp.minimum(distance, longest))


class T5EncoderLayer(nn.Module):
    """Attention and a feed-forward net, each normalised before and added to its input."""

    config: T5Config
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array, past: Past, mask: Array | None, bias: Array) -> tuple[Array, None]:
        config, compute = self.config, self.compute
        y = _norm(config, compute, "attention_norm")(x)
        y = _attention(config, compute, is_causal=False)(y, mask, past=past, bias=bias)
        x = x + dropout(self, y, config.dropout_rate)
        y = T5MLP(config, compute, name="mlp")(_norm(config, compute, "mlp_norm")(x))
        return x + dropout(self, y, config.dropout_rate), None


class T5DecoderLayer(nn.Module):
    """Attention to the target, to the source, and a feed-forward net, each as in the encoder."""

    config: T5Config
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        own: tuple[Past, Past],
        mask: Array | None,
        bias: Array,
        memory: Array | None,
        memory_mask: Array | None,
    ) -> tuple[Array, None]:
        config, compute, (past, cross_past) = self.config, self.compute, own
        y = _norm(config, compute, "attention_norm")(x)
        y = _attention(config, compute, is_causal=True)(y, mask, past=past, bias=bias)
        x = x + dropout(self, y, config.dropout_rate)
        cross = CrossAttention(**_sizes(config), compute=compute, name="cross_attention")
        y = _norm(config, compute, "cross_attention_norm")(x)
        y = cross(y, memory, memory_mask, cross_past)
        x = x + dropout(self, y, config.dropout_rate)
        y = T5MLP(config, compute, name="mlp")(_norm(config, compute, "mlp_norm")(x))
        return x + dropout(self, y, config.dropout_rate), None


def _norm(config: T5Config, compute: ComputeConfig, name: str) -> RMSNorm:
    return RMSNorm(config.layer_norm_epsilon, compute, name=name)


def _attention(config: T5Config, compute: ComputeConfig, *, is_causal: bool) -> Attention:
    return Attention(
        **_sizes(config),
        num_kv_heads=config.num_attention_heads,
        compute=compute,
        use_bias=False,
        is_causal=is_causal,
        name="attention",
    )


def _sizes(config: T5Config) -> dict[str, Any]:
    """What both kinds of attention have in common."""
    stddev = config.initializer_factor * config.hidden_size**-0.5
    return {
        "num_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "scale": 1.0,
        "dropout_rate": config.dropout_rate,
        "stddev": stddev,
        "query_stddev": stddev * config.head_dim**-0.5,
    }


class T5MLP(nn.Module):
    """`down(act(up(x)))` or, gated, `down(act(gate(x)) * up(x))` (Shazeer 2020)."""

    config: T5Config
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, inner = self.config, self.config.intermediate_size

        def dense(features: int, name: str, x: Array) -> Array:
            stddev = config.initializer_factor * x.shape[-1] ** -0.5
            return Dense(features, self.compute, False, stddev, name=name)(x)

        if config.is_gated:
            y = activate(dense(inner, "gate", x), config.hidden_act) * dense(inner, "up", x)
        else:
            y = activate(dense(inner, "up", x), config.hidden_act)
        return dense(config.hidden_size, "down", dropout(self, y, config.dropout_rate))
