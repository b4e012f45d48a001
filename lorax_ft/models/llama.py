"""LLaMA (Touvron et al. 2023): causal language modelling and sequence classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lorax_ft.methods import Virtual
from lorax_ft.models import hugging_face
from lorax_ft.models.attention import Attention, RotaryConfig, rotary_angles
from lorax_ft.models.layers import (
    ACTIVATIONS,
    Array,
    ComputeConfig,
    Dense,
    Embedding,
    RMSNorm,
    activate,
    before,
    key_mask,
    positions,
    run_layers,
)

PREFIX = "model."

NAMES: hugging_face.Names = {
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

# Modules that a task may leave unread, and those that may start anew where a checkpoint lacks them.
HEADS = ("lm_head", "score")
NEW_HEADS = ("score",)

# What a checkpoint may hold beside these: buffers, and repetitions of a tensor of a tied model.
FOREIGN = ("model.rotary_emb.inv_freq", "model.layers.{layer}.self_attn.rotary_emb.inv_freq")
TIED = {"lm_head.weight": "model.embed_tokens.weight"}

OLD_SUFFIXES: Mapping[str, str] = {}

TASKS = {  # by transformers' class names; the first of a task is the one written
    "LlamaForCausalLM": "causal_lm",
    "LlamaForSequenceClassification": "sequence_classification",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What a LLaMA is; fields as in transformers' config.json."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # num_attention_heads where None
    head_dim: int | None = None  # hidden_size / num_attention_heads where None
    intermediate_size: int = 11008
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rotary: RotaryConfig = dataclasses.field(default_factory=RotaryConfig)
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    label_names: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"LlamaConfig.hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads}) where head_dim is not given."
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"LlamaConfig.num_attention_heads ({self.num_attention_heads}) must be a multiple "
                f"of num_key_value_heads ({self.kv_heads})."
            )
        if self.size_of_head % 2:
            raise ValueError(
                f"LlamaConfig.head_dim must be even for rotary positions, got {self.size_of_head}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"LlamaConfig.hidden_act must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.hidden_act!r}."
            )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """The longest sequence that the positions are made for."""
        factor = self.rotary.factor if self.rotary.rope_type == "linear" else 1
        return int(self.max_position_embeddings * factor)

    @classmethod
    def from_hugging_face(
        cls, raw: Mapping[str, Any], ignore_fields: tuple[str, ...] = ()
    ) -> LlamaConfig:
        """Reads a config.json. Raises ValueError naming a field that is not handled."""
        own = {field.name for field in dataclasses.fields(cls)} - {"label_names", "rotary"}
        fields = hugging_face.take_fields(
            raw,
            fields={*own, *_ROTARY_FIELDS, "id2label", "num_labels"},
            neutral={"partial_rotary_factor": (None, 1.0)},
            harmless=("max_sequence_length",),
            ignore=ignore_fields,
        )
        values = {name: value for name, value in fields.items() if name in own}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        longest = values.get("max_position_embeddings", cls.max_position_embeddings)
        return cls(
            **values,
            rotary=_read_rotary(fields, longest),
            label_names=hugging_face.label_names(fields),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The config.json, without the class name that says the task."""
        fields = dataclasses.asdict(self)
        labels = hugging_face.label_fields(fields.pop("label_names"))
        rotary = _write_rotary(RotaryConfig(**fields.pop("rotary")))
        filled = {"num_key_value_heads": self.kv_heads, "head_dim": self.size_of_head}
        return {"model_type": "llama", **fields, **filled, **rotary, **labels}


_ROTARY_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")


def _read_rotary(fields: Mapping[str, Any], max_position_embeddings: int) -> RotaryConfig:
    """Rotary settings of a config.json, in the form of transformers 5 or of those before it."""
    raw = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    old_type = raw.pop("type", "default")
    values = {"rope_type": old_type, "rope_theta": fields.get("rope_theta", 10000.0)} | {
        name: value for name, value in raw.items() if value is not None
    }
    if values["rope_type"] == "llama3":
        values.setdefault("original_max_position_embeddings", max_position_embeddings)
    known = {field.name for field in dataclasses.fields(RotaryConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"config.json: rope_parameters of type {values['rope_type']!r} has {unknown}, which is "
            f"not handled, only {sorted(known)}."
        )
    return RotaryConfig(**values)


def _write_rotary(rotary: RotaryConfig) -> dict[str, Any]:
    """Entries of a config.json, in the form that every release of transformers reads."""
    used = {"default": (), "llama3": tuple(dataclasses.asdict(rotary))}.get(
        rotary.rope_type, ("rope_type", "factor")
    )
    scaling = {name: getattr(rotary, name) for name in used if name != "rope_theta"}
    return {
        "rope_theta": rotary.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {
            "rope_type": rotary.rope_type,
            "rope_theta": rotary.rope_theta,
            **scaling,
        },
    }


class Llama(nn.Module):
    """The whole model; it returns its task's float32 logits."""

    config: LlamaConfig
    compute: ComputeConfig
    task: str

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        virtual: Virtual = Virtual(),
    ) -> Array:
        """Inputs are integers `[batch, length]`; in the mask 1 is a token and 0 padding."""
        config, compute = self.config, self.compute
        prompt, prefix = virtual.prompt_length, virtual.prefix_length
        stddev = config.initializer_range
        embeddings = LlamaEmbeddings(config, compute, name="embeddings")
        position_ids = positions(input_ids, position_ids, prompt, prefix)
        rotary = rotary_angles(position_ids, config.size_of_head, config.rotary)
        mask = key_mask(attention_mask, prompt + prefix)
        x = before(virtual.prompt, embeddings(input_ids))
        x = run_layers(LlamaLayer, config, compute, x, virtual.prefix, mask, rotary)
        x = x[:, prompt:]
        x = RMSNorm(config.rms_norm_eps, compute, name="norm")(x)
        if self.task == "sequence_classification":
            x = jnp.take_along_axis(x, self._last(input_ids, attention_mask)[:, None, None], axis=1)
            return _head(len(config.label_names), compute, stddev, "score")(x[:, 0])
        if config.tie_word_embeddings:
            return embeddings.word.logits(x)
        return _head(config.vocab_size, compute, stddev, "lm_head")(x)

    def _last(self, input_ids: Array, attention_mask: Array | None) -> Array:
        """Where each sequence's last token is that is not padding: `[batch]`, 0 where all are."""
        is_token = jnp.ones(input_ids.shape, bool)
        if attention_mask is not None:
            is_token &= attention_mask.astype(bool)
        if self.config.pad_token_id is not None:
            is_token &= input_ids != self.config.pad_token_id
        positions = jnp.arange(input_ids.shape[1])[None]
        return jnp.where(is_token, positions, 0).max(axis=1)


def _head(features: int, compute: ComputeConfig, stddev: float, name: str) -> Dense:
    return Dense(features, compute, use_bias=False, stddev=stddev, out_dtype=jnp.float32, name=name)


class LlamaEmbeddings(nn.Module):
    """The table of word vectors."""

    config: LlamaConfig
    compute: ComputeConfig

    def setup(self):
        config = self.config
        self.word = Embedding(
            config.vocab_size, config.hidden_size, self.compute, config.initializer_range
        )

    def __call__(self, input_ids: Array) -> Array:
        return self.word(input_ids)


class LlamaLayer(nn.Module):
    """Attention and a gated feed-forward net, each normalised before and added to its input."""

    config: LlamaConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        past: tuple[Array, Array] | None,
        mask: Array | None,
        rotary: tuple[Array, Array],
    ) -> tuple[Array, None]:
        config, compute = self.config, self.compute
        attention = Attention(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.size_of_head,
            compute=compute,
            use_bias=config.attention_bias,
            is_causal=True,
            dropout_rate=config.attention_dropout,
            stddev=config.initializer_range,
            name="attention",
        )
        norm = RMSNorm(config.rms_norm_eps, compute, name="attention_norm")
        x = x + attention(norm(x), mask, rotary, past)
        norm = RMSNorm(config.rms_norm_eps, compute, name="mlp_norm")
        return x + LlamaMLP(config, compute, name="mlp")(norm(x)), None


class LlamaMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    config: LlamaConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config

        def dense(features: int, name: str) -> Dense:
            stddev = config.initializer_range
            return Dense(features, self.compute, config.mlp_bias, stddev, name=name)

        gate = activate(dense(config.intermediate_size, "gate")(x), config.hidden_act)
        return dense(config.hidden_size, "down")(gate * dense(config.intermediate_size, "up")(x))
