"""LLaMA (Touvron et al. 2023), and the families that differ from it as `decoders` says.

Causal language modelling and sequence classification.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax_ft.logits import Logits
from lorax_ft.models import hugging_face
from lorax_ft.models.attention import Attention, RotaryConfig, rotary_angles
from lorax_ft.models.decoders import FULL, SLIDING, VARIANTS, Variant
from lorax_ft.models.heads import Head, tied
from lorax_ft.models.layers import (
    ACTIVATIONS,
    Array,
    ComputeConfig,
    Dense,
    Embedding,
    RMSNorm,
    gated,
    head,
    last_token,
    layer_input,
    run_layers,
)
from lorax_ft.models.virtual import Virtual, before, check_segments, key_mask, positions

# Fields that only some families have, as their `Variant.fields` say.
SPECIAL = (
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What a LLaMA is; fields as in transformers' config.json.

    Defaults are LLaMA's. Those of another family are in its `decoders.Variant`, and
    `from_hugging_face({"model_type": "qwen3"})` starts from them.
    """

    model_type: str = "llama"  # a key of decoders.VARIANTS
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
    sliding_window: int | None = (
        None  # how many tokens a token sees, itself among them; all if None
    )
    layer_types: tuple[str, ...] | None = None  # each layer's, FULL or SLIDING; all slide if None
    query_pre_attn_scalar: float | None = None  # products are divided by its root; head_dim if None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    label_names: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
        if self.model_type not in VARIANTS:
            raise ValueError(
                f"LlamaConfig.model_type must be one of {', '.join(map(repr, VARIANTS))}, "
                f"got {self.model_type!r}."
            )
        for name in sorted(set(SPECIAL) - set(self.variant.fields)):
            if (value := getattr(self, name)) != getattr(LlamaConfig, name):
                raise ValueError(
                    f"LlamaConfig.{name} is {value!r}, but is no setting of a {self.model_type}."
                )
        self._check_windows()
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

    def _check_windows(self) -> None:
        types = self.layer_types or ()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"LlamaConfig.sliding_window must be at least 1, got {self.sliding_window}."
            )
        if self.layer_types is not None and len(types) != self.num_hidden_layers:
            raise ValueError(
                f"LlamaConfig.layer_types has {len(types)} entries for {self.num_hidden_layers} "
                "layers (num_hidden_layers)."
            )
        if unknown := sorted(set(types) - {FULL, SLIDING}):
            raise ValueError(f"LlamaConfig.layer_types: {unknown} is not handled.")
        if SLIDING in types and self.sliding_window is None:
            raise ValueError(
                f"LlamaConfig.sliding_window must be given where layer_types has {SLIDING!r}."
            )

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.model_type]

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size) if self.variant.scales_embeddings else 1.0

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, where it is as many in all layers; None where all."""
        return self.sliding_window if set(self.layer_types or (SLIDING,)) == {SLIDING} else None

    def windows(self, keys: int) -> np.ndarray | None:
        """The same of each layer, `[layers]`; None where `window` says it, or all see all keys."""
        types = self.layer_types or ()
        if self.sliding_window is None or self.sliding_window >= keys or len(set(types)) < 2:
            return None
        everything = np.iinfo(np.int32).max
        return np.array(
            [self.sliding_window if t == SLIDING else everything for t in types], np.int32
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
        default = cls(model_type=raw.get("model_type", "llama"))
        variant = default.variant
        others = {"label_names", "model_type", "rotary", *SPECIAL} - set(variant.fields)
        own = {field.name for field in dataclasses.fields(cls)} - others
        fields = hugging_face.take_fields(
            raw,
            fields={*own, *_ROTARY_FIELDS, *_SWITCH[variant.has_window_switch], *_LABELS},
            names=variant.field_names,
            neutral={"partial_rotary_factor": (None, 1.0), **variant.neutral},
            harmless=variant.harmless,
            ignore=ignore_fields,
        )
        values = {**variant.defaults, **{k: v for k, v in fields.items() if k in own}}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        act = values.get("hidden_act", cls.hidden_act)
        values["hidden_act"] = variant.activations.get(act, act)
        values |= _read_windows(variant, fields, values.get("num_hidden_layers", 32))
        longest = values.get("max_position_embeddings", cls.max_position_embeddings)
        return dataclasses.replace(
            default,
            **values,
            rotary=_read_rotary(fields, longest),
            label_names=hugging_face.label_names(fields),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The config.json, without the class name that says the task."""
        fields = dataclasses.asdict(self)
        labels = hugging_face.label_fields(fields.pop("label_names"))
        rotary = _write_rotary(RotaryConfig(**fields.pop("rotary")))
        for name in set(SPECIAL) - set(self.variant.fields):
            del fields[name]
        filled = {"num_key_value_heads": self.kv_heads, "head_dim": self.size_of_head}
        filled |= _write_windows(self)
        renamed = hugging_face.renamed({**fields, **filled}, self.variant.field_names)
        return {**renamed, **rotary, **labels}


_LABELS = ("id2label", "num_labels")
_SWITCH = {True: ("use_sliding_window", "max_window_layers"), False: ()}


def _read_windows(variant: Variant, fields: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Which layers slide, by config.json's layer_types or else by the family's rule."""
    if variant.layer_types is None:
        return {}
    types = tuple(fields.get("layer_types") or ())
    if variant.has_window_switch and not fields.get("use_sliding_window", False):
        return {"sliding_window": None, "layer_types": types if SLIDING in types else None}
    return {"layer_types": types or variant.layer_types(layers, fields)}


def _write_windows(config: LlamaConfig) -> dict[str, Any]:
    """The types of layers in full, since what config.json means without them is the family's."""
    if config.variant.layer_types is None:
        return {}
    alike = FULL if config.sliding_window is None else SLIDING
    types = list(config.layer_types or (alike,) * config.num_hidden_layers)
    if not config.variant.has_window_switch:
        return {"layer_types": types}
    return {
        "layer_types": types,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
    }


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
    """The whole model; it returns its task's: `Logits`, or float32 ones of classes."""

    config: LlamaConfig
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
        stddev = config.initializer_range
        embeddings = LlamaEmbeddings(config, compute, name="embeddings")
        prompt, prefix = virtual.prompt_length, virtual.prefix_length
        position_ids = positions(input_ids, position_ids, prompt, prefix)
        rotary = rotary_angles(position_ids, config.size_of_head, config.rotary)
        mask = key_mask(attention_mask, prompt + prefix)
        x = embeddings(input_ids, virtual.prompt)
        keys = prefix + x.shape[1] if mask is None else mask.shape[-1]  # a cache has more
        by_layer = virtual.prefix, config.windows(keys)
        check_segments(segment_ids, virtual)
        x = run_layers(LlamaLayer, config, compute, x, by_layer, mask, rotary, segment_ids)
        x = _norm(config, compute, "norm")(x[:, prompt:])
        if self.task == "sequence_classification":
            x = last_token(x, input_ids, attention_mask, config.pad_token_id)
            return head(len(config.label_names), compute, stddev, "score")(x)
        if config.tie_word_embeddings:
            logits = tied(embeddings.word, x)
        else:
            logits = Head(config.vocab_size, compute, stddev, name="lm_head")(x)
        return dataclasses.replace(logits, softcap=config.final_logit_softcapping)


def _norm(config: LlamaConfig, compute: ComputeConfig, name: str) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, compute, config.variant.norm_offset, name=name)


class LlamaEmbeddings(nn.Module):
    """The table of word vectors."""

    config: LlamaConfig
    compute: ComputeConfig

    def setup(self):
        config = self.config
        self.word = Embedding(
            config.vocab_size, config.hidden_size, self.compute, config.initializer_range
        )

    def __call__(self, input_ids: Array, prompt: Array | None) -> Array:
        x = self.word(input_ids)
        if (scale := self.config.embedding_scale) != 1:  # a prompt is not scaled, as in PEFT
            x = x * jnp.asarray(scale, x.dtype)
        return before(prompt, x)


class LlamaLayer(nn.Module):
    """Attention and a gated feed-forward net, each normalised before and added to its input."""

    config: LlamaConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        own: tuple[tuple[Array, Array] | None, Array | None],
        mask: Array | None,
        rotary: tuple[Array, Array],
        segments: Array | None,
    ) -> tuple[Array, None]:
        x, (past, window) = layer_input(x), own
        window = self.config.window if window is None else window  # a constant reaches any kernel
        y = self._norm("attention_norm", x)
        y = self._attention()(y, mask, rotary, past, window, segments=segments)
        x = x + self._output_norm("attention_output_norm", y)
        mlp = LlamaMLP(self.config, self.compute, name="mlp")
        y = mlp(self._norm("mlp_norm", x))
        return x + self._output_norm("mlp_output_norm", y), None

    def _attention(self) -> Attention:
        config, scalar = self.config, self.config.query_pre_attn_scalar
        return Attention(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.size_of_head,
            compute=self.compute,
            use_bias=config.attention_bias or config.variant.has_qkv_bias,
            use_output_bias=config.attention_bias,
            norm_epsilon=config.rms_norm_eps if config.variant.has_qk_norm else None,
            is_causal=True,
            scale=None if scalar is None else scalar**-0.5,
            softcap=config.attn_logit_softcapping,
            dropout_rate=config.attention_dropout,
            stddev=config.initializer_range,
            name="attention",
        )

    def _norm(self, name: str, x: Array) -> Array:
        return _norm(self.config, self.compute, name)(x)

    def _output_norm(self, name: str, x: Array) -> Array:
        return self._norm(name, x) if self.config.variant.has_output_norms else x


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

        gate, up = (dense(config.intermediate_size, name)(x) for name in ("gate", "up"))
        return dense(config.hidden_size, "down")(gated(gate, up, config.hidden_act))
