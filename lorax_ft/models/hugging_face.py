"""What Hugging Face calls things: names of parameters and fields of configs, both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorax_ft.trees import nearest

Names = Mapping[str, str]
"""Our modules by path and Hugging Face's names for them; `{layer}` stands for a layer's number."""

# Hugging Face calls a kernel, an embedding table and a norm's scale all "weight".
SUFFIXES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

_UNROLLED = re.compile(r"(?P<stack>^|.*/)layers_(?P<layer>\d+)/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """What Hugging Face calls the parts of one family of models."""

    names: Names

    # By transformers' class names; the first of a task is the one written.
    tasks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""  # of names in a model with a head, which those of a bare one lack

    heads: tuple[str, ...] = ()  # modules that a task may leave unread
    new_heads: tuple[str, ...] = ()  # those of them that start anew where a checkpoint lacks them
    classifier: tuple[str, ...] = ()  # those that classify, which no pretrained checkpoint has

    # What a checkpoint may hold beside these: buffers and heads of other tasks, and repetitions.
    foreign: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # in any task's checkpoint

    # How names ended in older checkpoints.
    old_suffixes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    # Modules whose kernels are stored as ours, [in, out], and not as torch's Linear, [out, in].
    conv1d: frozenset[str] = frozenset()

    # Last names of modules that transformers never holds in few bits.
    never_quantized: frozenset[str] = frozenset()


def split_layer(path: str) -> tuple[str, int | None]:
    """The path in stacked layers, and the layer: `"layers_3/mlp/up"` is `("layers/mlp/up", 3)`."""
    match = _UNROLLED.match(path)
    if match is None:
        return path, None
    return f"{match['stack']}layers/{path[match.end() :]}", int(match["layer"])


def is_stacked(path: str) -> bool:
    """Whether a parameter holds all layers of a stack: `"layers/..."`, `"encoder/layers/..."`."""
    return "layers" in path.split("/")


def in_layer(path: str, layer: int) -> str:
    """The inverse of `split_layer`: the path of one layer's own parameter."""
    return re.sub(r"(^|/)layers/", rf"\1layers_{layer}/", path, count=1)


def module_name(names: Names, path: str, layer: int | None = None) -> str:
    """Hugging Face's name of the module that holds the parameter `path`.

    `layer` is the layer's number where the path is one of stacked layers:
    `("layers/mlp/up/kernel", 3)` and `"layers_3/mlp/up/kernel"` are of the same module. Raises
    ValueError for a path that is not in the table.
    """
    stacked, own_layer = split_layer(path)
    module = stacked.rpartition("/")[0]
    if module not in names:
        raise ValueError(
            f"No Hugging Face name is known for the parameter {path!r}. Nearest: "
            f"{', '.join(nearest(module, names))}."
        )
    layer = layer if own_layer is None else own_layer
    if is_stacked(module) and layer is None:
        raise ValueError(f"{path!r} is a parameter of stacked layers: say which layer.")
    return names[module].format(layer=layer)


def tensor_name(names: Names, path: str, layer: int | None = None) -> str:
    """Hugging Face's name of the tensor that holds the parameter `path` (of layer `layer`)."""
    return f"{module_name(names, path, layer)}.{SUFFIXES[path.rpartition('/')[2]]}"


def is_turned(tables: Tables, path: str) -> bool:
    """Whether Hugging Face keeps the parameter transposed, as torch's Linear keeps its kernels."""
    module, _, kind = split_layer(path)[0].rpartition("/")
    return kind == "kernel" and module not in tables.conv1d


def module_path(names: Names, name: str) -> tuple[str, int | None] | None:
    """The inverse of `module_name`: our module and the layer; None for a name not in the table."""
    for path, template in names.items():
        if match := match_name(template, name):
            return path, int(match["layer"]) if match.groups() else None
    return None


def match_name(template: str, name: str) -> re.Match[str] | None:
    """Matches a Hugging Face name with a template in which `{layer}` stands for a number."""
    return re.fullmatch(re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)"), name)


# --- Config fields --------------------------------------------------------------------------------

# Fields of config.json that change nothing a model here computes, by any family.
# fmt: off
HARMLESS_FIELDS = frozenset(
    {
        "_name_or_path", "architectures", "bad_words_ids", "begin_suppress_tokens",
        "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id",
        "diversity_penalty", "do_sample", "dtype", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "label2id",
        "length_penalty", "max_length", "min_length", "model_type", "name_or_path",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_scores", "prefix",
        "pretraining_tp", "remove_invalid_values", "repetition_penalty", "return_dict",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
        "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
        "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
    }
)
# fmt: on

# Fields that would change the computation, with the values at which they do not.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "auto_map": (None,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "problem_type": (None, "single_label_classification"),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}


def take_fields(
    raw: Mapping[str, Any],
    *,
    fields: Iterable[str],
    names: Mapping[str, str] = {},
    neutral: Mapping[str, tuple[Any, ...]] = {},
    harmless: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
    """The entries of a config.json that a model reads, once every other entry is known to be inert.

    Args:
        raw: the whole config.json.
        fields: entries that the model reads, by our names.
        names: what config.json calls them, where it is not the same.
        neutral: the family's own entries beside `NEUTRAL_VALUES` that must have such a value.
        harmless: the family's own entries beside `HARMLESS_FIELDS` that change nothing.
        ignore: entries that the caller vouches for.

    Raises ValueError naming the entry, where one is not handled.
    """
    read = {names.get(field, field): field for field in fields}
    harmless, ignore = HARMLESS_FIELDS | set(harmless), set(ignore)
    neutral = {**NEUTRAL_VALUES, **neutral}
    for name, value in raw.items():
        if name in read or name in harmless or name in ignore:
            continue
        if name not in neutral:
            raise ValueError(
                f"config.json: the field {name!r} ({value!r}) is not known here, and may change "
                f"what the model computes. If it does not, pass ignore_fields=({name!r},)."
            )
        if value not in neutral[name]:
            raise ValueError(
                f"config.json: {name} = {value!r} is not handled, only "
                f"{' or '.join(map(repr, neutral[name]))}: the model would compute something else."
            )
    return {field: raw[name] for name, field in read.items() if name in raw and name not in ignore}


def renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Fields by what config.json calls them."""
    return {names.get(field, field): value for field, value in fields.items()}


def label_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names of a config.json by their numbers; transformers' two where it has none."""
    labels = raw.get("id2label")
    if labels is None:
        return tuple(f"LABEL_{i}" for i in range(raw.get("num_labels", 2)))
    by_number = {int(number): str(name) for number, name in labels.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise ValueError(
            f"config.json: id2label has the numbers {sorted(by_number)}, "
            f"not 0 to {len(by_number) - 1}."
        )
    return tuple(by_number[i] for i in range(len(by_number)))


def label_fields(names: tuple[str, ...]) -> dict[str, Any]:
    """The entries of a config.json that hold the class names."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
