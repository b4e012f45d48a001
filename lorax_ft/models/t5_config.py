"""T5's config, and what Hugging Face calls its fields and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lorax_ft.models import hugging_face
from lorax_ft.models.layers import ACTIVATIONS

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
    never_quantized=frozenset({"wo"}),
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
