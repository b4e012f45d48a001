"""T5 (Raffel et al. 2020), and the gated T5 1.1 and Flan-T5: text to text, and the encoder alone.

Relative positions are a bias on attention's products, one table for all layers of a half; products
are not scaled, which the kernels' initial values make up for.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lorax_ft.logits import Logits
from lorax_ft.models.attention import Attention, CrossAttention
from lorax_ft.models.bert import Encoded
from lorax_ft.models.heads import Head, tied
from lorax_ft.models.layers import (
    Array,
    ComputeConfig,
    Dense,
    Embedding,
    RMSNorm,
    activate,
    dropout,
    gated,
    layer_input,
    run_layers,
)
from lorax_ft.models.relative_positions import PositionBias
from lorax_ft.models.t5_config import T5Config
from lorax_ft.models.virtual import Virtual, before, key_mask, length_of

IGNORED = -100  # a label that is not scored, as in Hugging Face's data
Past = tuple[Array, Array] | None


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
    """The whole model; it returns its task's: `Logits`, or `Encoded`."""

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
            self.lm_head = Head(config.vocab_size, compute, factor)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        virtual: Virtual = Virtual(),
    ) -> Logits | Encoded:
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
    ) -> Logits:
        """Logits `[batch, target length, vocabulary]` by what `encode` made.

        Where the collection "cache" is mutable, the first call keeps keys and values in as many
        slots as `decoder_attention_mask` has, those of `memory` too; further ones read on with
        `memory` and `virtual` left out but `attention_mask` as it was, with the prompt's and the
        prefix's places in it.
        """
        x = self.embeddings(decoder_input_ids, None)
        past, cross_past = virtual.decoder_prefix, virtual.cross_prefix
        mask = key_mask(decoder_attention_mask, length_of(past))
        memory_mask = key_mask(attention_mask, virtual.prompt_length + length_of(cross_past))
        x = self.decoder(x, mask, memory, memory_mask, past, cross_past)
        if self.config.scale_decoder_outputs:
            x = x * jnp.asarray(self.config.hidden_size**-0.5, x.dtype)
        if self.config.tie_word_embeddings:
            return tied(self.embeddings.word, x)
        return self.lm_head(x)


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
        bias = _position_bias(config, compute)
        length = x.shape[1]
        y = bias(length, length_of(past) + length, length_of(past), is_causal=False)
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
        first, keys = length_of(past), length_of(past) + length
        if self.is_mutable_collection("cache") and not self.is_initializing():
            assert mask is not None  # it says how many slots there are
            first, keys = first + self.get_variable("cache", "index", 0), mask.shape[-1]
            self.put_variable("cache", "index", jnp.asarray(first + length, jnp.int32))
        bias = _position_bias(config, compute)
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


class T5EncoderLayer(nn.Module):
    """Attention and a feed-forward net, each normalised before and added to its input."""

    config: T5Config
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array, past: Past, mask: Array | None, bias: Array) -> tuple[Array, None]:
        config, compute, x = self.config, self.compute, layer_input(x)
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
        x = layer_input(x)
        y = _norm(config, compute, "attention_norm")(x)
        y = _attention(config, compute, is_causal=True)(y, mask, past=past, bias=bias)
        x = x + dropout(self, y, config.dropout_rate)
        cross = CrossAttention(**_sizes(config), compute=compute, name="cross_attention")
        y = _norm(config, compute, "cross_attention_norm")(x)
        y = cross(y, memory, memory_mask, cross_past)
        x = x + dropout(self, y, config.dropout_rate)
        y = T5MLP(config, compute, name="mlp")(_norm(config, compute, "mlp_norm")(x))
        return x + dropout(self, y, config.dropout_rate), None


def _position_bias(config: T5Config, compute: ComputeConfig) -> PositionBias:
    return PositionBias(
        config.num_attention_heads,
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        compute,
        stddev=config.initializer_factor * config.hidden_size**-0.5,
        name="position_bias",
    )


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
            y = gated(dense(inner, "gate", x), dense(inner, "up", x), config.hidden_act)
        else:
            y = activate(dense(inner, "up", x), config.hidden_act)
        return dense(config.hidden_size, "down", dropout(self, y, config.dropout_rate))
