"""A model: what it is, for which task, and its pure functions; the table of families."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lorax_ft.logits import Logits
from lorax_ft.models import decoders, encoders, gpt2, hugging_face, t5_config
from lorax_ft.models.bert import Bert, BertConfig
from lorax_ft.models.gpt2 import Gpt2, Gpt2Config
from lorax_ft.models.layers import Array, ComputeConfig, PyTree
from lorax_ft.models.llama import Llama, LlamaConfig
from lorax_ft.models.t5 import T5
from lorax_ft.models.t5_config import T5Config
from lorax_ft.models.virtual import Virtual, length_of, split_virtual
from lorax_ft.trees import nearest

ModelConfig = BertConfig | Gpt2Config | LlamaConfig | T5Config

# What a model reads of a batch, in the order of its module's arguments, and what a batch may hold
# beside it for the loss.
INPUTS: Mapping[type, tuple[str, ...]] = {
    BertConfig: ("input_ids", "attention_mask", "token_type_ids", "position_ids"),
    Gpt2Config: ("input_ids", "attention_mask", "position_ids", "segment_ids"),
    LlamaConfig: ("input_ids", "attention_mask", "position_ids", "segment_ids"),
    T5Config: ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"),
}
TARGETS = ("labels", "weights", "loss_mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a family of models are."""

    config: type[ModelConfig]
    module: type[nn.Module]
    tables: hugging_face.Tables


FAMILIES: Mapping[str, Family] = {  # by config.json's model_type
    **{
        model_type: Family(config=BertConfig, module=Bert, tables=variant.tables)
        for model_type, variant in encoders.VARIANTS.items()
    },
    "gpt2": Family(config=Gpt2Config, module=Gpt2, tables=gpt2.TABLES),
    **{
        model_type: Family(config=LlamaConfig, module=Llama, tables=variant.tables)
        for model_type, variant in decoders.VARIANTS.items()
    },
    "t5": Family(config=T5Config, module=T5, tables=t5_config.TABLES),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model keeps of texts that it goes on with."""

    layers: PyTree  # keys and values [..., batch, slots, kv_heads, head_dim], and how many are set
    slots: Array  # [batch, slots]: False where a slot holds padding
    position: Array  # [batch]: of the next token
    source_slots: Array | None = None  # [batch, slots] of the sources of an encoder-decoder

    def take(self, rows: Array) -> Cache:
        """The cache of other rows `[n]`, one of which may be there more than once."""

        def of_rows(array: Array) -> Array:  # the indices have no batch
            return array if array.ndim < 4 else jnp.take(array, rows, axis=array.ndim - 4)

        others = jax.tree.map(lambda x: x[rows], (self.slots, self.position, self.source_slots))
        return Cache(jax.tree.map(of_rows, self.layers), *others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model's description; its parameters are kept apart and given to `apply`.

    >>> config = BertConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=16)
    >>> model = build(config, task="sequence_classification")
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, {"input_ids": jnp.array([[1, 2, 3]])}).shape
    (1, 2)
    """

    config: ModelConfig
    task: str
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)

    def __post_init__(self):
        tasks = sorted(set(self.family.tables.tasks.values()))
        if self.task not in tasks:
            raise ValueError(
                f"Model.task must be one of {', '.join(map(repr, tasks))} for a "
                f"{type(self.config).__name__}, got {self.task!r}."
            )

    @property
    def family(self) -> Family:
        family = FAMILIES[self.config.model_type]
        if isinstance(self.config, T5Config):  # what its parts are called depends on what it has
            return dataclasses.replace(family, tables=self.config.tables)
        return family

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies its word vectors by before they meet anything else."""
        return getattr(self.config, "embedding_scale", 1.0)

    @property
    def module(self) -> nn.Module:
        return self.family.module(self.config, self.compute, self.task)

    def apply(self, params: PyTree, inputs: Mapping[str, Array], key: Array | None = None) -> Any:
        """The task's output: float32 logits, or `Encoded` for the task "encoder".

        Those of a language model, `[batch, length, vocabulary]`, are what `outputs` gives, dense.

        Args:
            params: as `init` gives them; a prompt or a prefix may be beside.
            inputs: `input_ids` `[batch, length]`, and where wanted `attention_mask` (1 for a
                token), `position_ids`, `token_type_ids`, `segment_ids` (which text of a row a
                token is of, that sees no other); an encoder-decoder also needs `decoder_input_ids`
                `[batch, target length]`, which `decoder_attention_mask` may go with. Entries for
                the loss are left unread.
            key: for dropout; without it there is none.

        Raises ValueError for an entry that is not known and for a sequence longer than the
        positions.
        """
        found = self.outputs(params, inputs, key)
        return found.dense() if isinstance(found, Logits) else found

    def outputs(self, params: PyTree, inputs: Mapping[str, Array], key: Array | None = None) -> Any:
        """As `apply`, but a language model's logits are `Logits`, which are not computed yet."""
        own, virtual = split_virtual(params)
        rngs = {} if key is None else {"dropout": key}
        arguments = self._arguments(inputs, virtual)
        return self.module.apply({"params": own}, *arguments, virtual=virtual, rngs=rngs)

    def prefill(
        self, params: PyTree, inputs: Mapping[str, Array], new_tokens: int
    ) -> tuple[Array, Cache]:
        """Reads texts and keeps what later tokens need of them.

        Args:
            params: as for `apply`.
            inputs: `input_ids` `[batch, length]` and, for texts of several lengths, an
                `attention_mask`, which pads a text that is to be continued on the left.
            new_tokens: how many tokens may follow.

        Returns float32 logits `[batch, vocabulary]` of the next token, and a cache for `decode`.
        An encoder-decoder reads sources, and its next token is the target's first. Raises
        ValueError where texts and new tokens have no positions, or the model writes no text.
        """
        own, virtual = split_virtual(params)
        if self.task == "seq2seq_lm":
            return self._read_source(own, virtual, inputs, new_tokens)
        if self.task != "causal_lm":
            raise ValueError(
                f"A model for {self.task!r} writes no text, only 'causal_lm' and 'seq2seq_lm' do."
            )
        ids, before = inputs["input_ids"], virtual.prompt_length + virtual.prefix_length
        longest = self.config.max_length
        if longest is not None and before + ids.shape[1] + new_tokens > longest:
            raise ValueError(
                f"Texts of {ids.shape[1]} tokens and {new_tokens} new ones"
                f"{f' behind {before} trained vectors' if before else ''} are more than the "
                f"{longest} positions of the model: lower max_new_tokens."
            )
        mask = _mask(inputs)
        position = inputs.get("position_ids", jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0))
        free = jnp.pad(mask, ((0, 0), (0, new_tokens)), constant_values=True)
        inputs = {**inputs, "attention_mask": free, "position_ids": position}
        logits, held = self.module.apply(
            {"params": own}, *self._arguments(inputs, virtual), virtual=virtual, mutable=["cache"]
        )
        slots = jnp.pad(free, ((0, 0), (before, 0)), constant_values=True)
        cache = Cache(held["cache"], slots, before + position[:, -1] + 1)
        return logits.last().dense(), cache

    def _read_source(
        self, own: PyTree, virtual: Virtual, inputs: Mapping[str, Array], new_tokens: int
    ) -> tuple[Array, Cache]:
        """`prefill` of an encoder-decoder."""
        assert isinstance(self.config, T5Config)
        source, mask = inputs["input_ids"], _mask(inputs)
        batch = len(source)
        memory = self.module.apply({"params": own}, source, mask, virtual, method="encode")
        start = jnp.full((batch, 1), self.config.decoder_start_token_id, jnp.int32)
        free = jnp.ones((batch, 1 + new_tokens), bool)
        logits, held = self.module.apply(
            *({"params": own}, start, memory, mask, free, virtual),
            method="decode",
            mutable=["cache"],
        )
        slots = jnp.ones((batch, free.shape[1] + length_of(virtual.decoder_prefix)), bool)
        before = virtual.prompt_length + length_of(virtual.cross_prefix)
        source_slots = jnp.pad(mask, ((0, 0), (before, 0)), constant_values=True)
        cache = Cache(held["cache"], slots, jnp.ones(batch, jnp.int32), source_slots)
        return logits.last().dense(), cache

    def decode(self, params: PyTree, ids: Array, cache: Cache) -> tuple[Array, Cache]:
        """Reads one more token of each text, `[batch]`: as `prefill`, behind what is kept."""
        own, _ = split_virtual(params)  # in the cache since the first call
        variables = {"params": own, "cache": cache.layers}
        if cache.source_slots is not None:
            logits, held = self.module.apply(
                *(variables, ids[:, None], None, cache.source_slots, cache.slots),
                method="decode",
                mutable=["cache"],
            )
        else:
            inputs = {
                "input_ids": ids[:, None],
                "attention_mask": cache.slots,
                "position_ids": cache.position[:, None],
            }
            logits, held = self.module.apply(variables, *self._arguments(inputs), mutable=["cache"])
        cache = dataclasses.replace(cache, layers=held["cache"], position=cache.position + 1)
        return logits.last().dense(), cache

    def _arguments(
        self, inputs: Mapping[str, Array], virtual: Virtual = Virtual()
    ) -> tuple[Array | None, ...]:
        """A module's arguments, once they are known to fit."""
        names = INPUTS[type(self.config)]
        if unknown := sorted(set(inputs) - {*names, *TARGETS}):
            raise ValueError(
                f"A model with a {type(self.config).__name__} does not read {unknown}, only "
                f"{', '.join(names)}."
            )
        before = virtual.prompt_length + virtual.prefix_length
        _check_length(self.config, inputs["input_ids"].shape[1], before)
        return tuple(map(inputs.get, names))

    def input_shapes(self, length: int = 8) -> dict[str, jax.ShapeDtypeStruct]:
        """The inputs that the model cannot do without, for one text of that length."""
        names = ["input_ids", *(["decoder_input_ids"] if self.task == "seq2seq_lm" else [])]
        return dict.fromkeys(names, jax.ShapeDtypeStruct((1, length), jnp.int32))

    def init(self, key: Array) -> PyTree:
        """Random parameters, by the config's `initializer_range`."""
        return _init(self, key)

    def shapes(self) -> PyTree:
        """The tree of parameters as `ShapeDtypeStruct`s; nothing is allocated."""
        return jax.tree.map(lambda shape: shape, _shapes(self))


def build(
    config: ModelConfig | Mapping[str, Any],
    *,
    task: str | None = None,
    num_labels: int | None = None,
    ignore_fields: tuple[str, ...] = (),
    **overrides: Any,
) -> Model:
    """A model from its config, or from the dictionary of a Hugging Face config.json.

    Args:
        config: what the model is.
        task: "encoder", "sequence_classification", "token_classification", "masked_lm",
            "causal_lm" or "seq2seq_lm"; where None, what the config.json says.
        num_labels: how many classes the head tells apart, where not as many as the config says.
        ignore_fields: fields of config.json that are not known here and change nothing.
        **overrides: fields of `ComputeConfig` (dtype, scan_layers, remat, ...) or of the model's
            config.

    Raises ValueError for a model type or a config field that is not handled.
    """
    if isinstance(config, Mapping):
        task = task or _task_of(config)
        own: ModelConfig = _family_of(config).config.from_hugging_face(config, ignore_fields)
    else:
        own = config
    if task is None:
        raise ValueError("build: task must be given, since a config of ours does not name one.")
    computing = {f.name for f in dataclasses.fields(ComputeConfig)} & set(overrides)
    compute = ComputeConfig(**{name: overrides.pop(name) for name in computing})
    fields = {field.name for field in dataclasses.fields(own)}
    for name in set(overrides) - fields:
        known = fields | {f.name for f in dataclasses.fields(ComputeConfig)}
        raise ValueError(
            f"{name!r} is a field neither of ComputeConfig nor of {type(own).__name__}. "
            f"Nearest: {', '.join(nearest(name, known))}."
        )
    if num_labels is not None:
        if isinstance(own, T5Config):
            raise ValueError(f"num_labels = {num_labels}: a T5Config has no classes to tell apart.")
        if num_labels != len(own.label_names):
            overrides["label_names"] = tuple(f"LABEL_{i}" for i in range(num_labels))
    own = dataclasses.replace(own, **overrides)
    return Model(config=own, task=task, compute=compute)


def hugging_face_name(model: Model, path: str, layer: int | None = None) -> str:
    """Hugging Face's name of a parameter's module, as PEFT files have it: `module_name`."""
    return hugging_face.module_name(model.family.tables.names, path, layer)


def module_path(model: Model, name: str) -> tuple[str, int | None] | None:
    """The inverse of `hugging_face_name`: our module and the layer; None for an unknown name."""
    return hugging_face.module_path(model.family.tables.names, name)


def check_inputs(config: ModelConfig, batch: Mapping[str, Any]) -> None:
    """Raises ValueError where a batch is too long or holds a number that has no vector.

    For the host, before the batch goes to the device: a compiled model cannot raise.
    """
    _check_length(config, np.shape(batch["input_ids"])[1])
    limits = {"input_ids": ("vocab_size", config.vocab_size)}
    limits["decoder_input_ids"] = limits["input_ids"]
    if config.max_length is not None:
        limits["position_ids"] = ("max_position_embeddings", config.max_length)
    if isinstance(config, BertConfig):
        limits["token_type_ids"] = ("type_vocab_size", config.type_vocab_size)
        limits["position_ids"] = ("max_position_embeddings", config.max_position_embeddings)
    for name, (field, limit) in limits.items():
        if batch.get(name) is None:
            continue
        values = np.asarray(batch[name])
        wrong = (values < 0) | (values >= limit)
        if wrong.any():
            row, column = (int(i[0]) for i in np.nonzero(wrong))
            raise ValueError(
                f"{name}[{row}, {column}] is {values[row, column]}, but must be less than {limit}, "
                f"the model's {field}, and not negative. Does the tokenizer belong to this model?"
            )


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, key: Array) -> PyTree:
    shapes = model.input_shapes(2)
    inputs = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    return model.module.init({"params": key}, *map(inputs.get, INPUTS[type(model.config)]))[
        "params"
    ]


@functools.lru_cache(maxsize=16)
def _shapes(model: Model) -> PyTree:
    return jax.eval_shape(model.init, jax.random.key(0))


def _mask(inputs: Mapping[str, Array]) -> Array:
    """Which of the texts' places hold tokens, `[batch, length]`."""
    mask = inputs.get("attention_mask")
    return jnp.ones(inputs["input_ids"].shape, bool) if mask is None else mask.astype(bool)


def _check_length(config: ModelConfig, length: int, before: int = 0) -> None:
    if config.max_length is not None and length + before > config.max_length:
        virtual = f" and stand behind {before} trained vectors" if before else ""
        raise ValueError(
            f"The sequences are {length} tokens long{virtual}, but the model has positions for "
            f"{config.max_length}: truncate them."
        )


def _family_of(raw: Mapping[str, Any]) -> Family:
    model_type = str(raw.get("model_type"))
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not handled, only "
            f"{', '.join(map(repr, FAMILIES))}."
        )
    return FAMILIES[model_type]


def _task_of(raw: Mapping[str, Any]) -> str:
    tasks = _family_of(raw).tables.tasks
    for name in raw.get("architectures") or ():
        if name in tasks:
            return tasks[name]
    raise ValueError(
        f"config.json: architectures is {raw.get('architectures')!r}, which names no task known "
        f"here ({', '.join(tasks)}). Say task=... ."
    )
