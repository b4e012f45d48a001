"""Adapters as Hugging Face PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, IA3, prompts and prefixes go both ways, AdaLoRA comes in, with trained biases and modules
saved whole, for every model whose names are known. Strict both ways: a tensor that is not read,
one that is missing, and a config field that changes the maths and is not handled, raise.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorax_ft import trees
from lorax_ft.interop import adalora, bases, files, ia3, lora, prompts, rotary, seq2seq
from lorax_ft.interop.cards import ModelCard, write_card
from lorax_ft.leaves import Leaf
from lorax_ft.methods import IA3, DoRA, IA3Bias, LoRA
from lorax_ft.models import Model
from lorax_ft.models.hugging_face import Names, Tables, in_layer, is_stacked

READERS: Mapping[str, Callable[..., tuple[Any, tuple[str, ...]]]] = {
    "LORA": lora.from_peft,
    "ADALORA": adalora.from_peft,
    "IA3": ia3.from_peft,
    "PROMPT_TUNING": prompts.from_peft,
    "PREFIX_TUNING": prompts.from_peft,
    "P_TUNING": prompts.from_peft,
}


def load_peft(
    directory: str | os.PathLike[str],
    model: Model | Names,
    params: Any,
    *,
    config: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    interleaved_rotary: bool = False,
    check_base: bool = True,
) -> tuple[Any, tuple[str, ...]]:
    """Puts the adapter of a PEFT directory into `params`, the base that it was trained on.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        model: the base's; or, for params of your own, the adapter's names of their modules by
            path: `{"lin0": "lin0", "layers/up": "blocks.{layer}.up"}`.
        params: the base's parameters; nothing of them is altered.
        config: stands for an adapter_config.json that the directory does not have.
        allow_pickle: read an adapter_model.bin where there are no safetensors: the tensors in it,
            and nothing of it is run.
        interleaved_rotary: the adapter was trained on weights in the order of Meta's own LLaMA
            files, in which a head's rotated pairs stand side by side; what it has of queries and
            keys is put into the order of Hugging Face's.
        check_base: compare the base's fingerprint with that in the file, where it has one, as
            those of `save_peft` have.

    Returns the params and the patterns of the plain arrays that came with it, as `trees.partition`
    takes them. Raises FileNotFoundError for a missing file and ValueError naming file and key for a
    tensor that is not read or is missing, a module the model does not have, a shape that does not
    fit, another base, and a config field that is not handled.
    """
    directory = pathlib.Path(directory)
    found = files.read(directory, config, allow_pickle)
    kind, tensors = str(found.config.get("peft_type")), found.tensors
    if kind not in READERS:
        raise ValueError(
            f"{directory / files.CONFIG}: peft_type is {kind!r}; only {', '.join(READERS)} can be "
            "read."
        )
    if interleaved_rotary:
        tensors = rotary.halved(tensors, kind, model)
    if check_base:
        bases.check(found.metadata, params, str(directory))
    return READERS[kind](found.config, tensors, _known(kind, model), params)


def save_peft(
    directory: str | os.PathLike[str],
    model: Model,
    params: Any,
    trainable: trees.Patterns = (),
    *,
    base_name: str = "",
    dropout: float = 0.0,
    rslora: bool = False,
    card: ModelCard = ModelCard(),
) -> None:
    """Writes the adapters of `params`, and the plain arrays `trainable` names, as a PEFT directory.

    The directory must be new or empty, and appears whole or not at all, with a model card as its
    README.md; the base's fingerprint stands in it and in the file of tensors. `base_name` says
    which base model the adapter belongs to; `dropout` and `rslora` (the scale as alpha over the
    root of the rank) how LoRA is stated; `card` what is known of the training. What classifies goes
    along whether it was trained or not, since PEFT loads no classification without. Raises
    ValueError where there is nothing to save, where PEFT has no word for what there is, and where
    the directory holds something.
    """
    kind, tables = _kind(params), model.family.tables
    if kind is None and not trainable:
        raise ValueError("save_peft: the parameters hold no adapter and nothing is trainable.")
    kind = kind or "LORA"
    trainable = _with_classifier(model, params, trainable)
    if kind == "LORA":
        config, tensors = lora.to_peft(tables, params, trainable, dropout=dropout, rslora=rslora)
    elif kind == "IA3":
        config, tensors = ia3.to_peft(tables, params, trainable)
    else:
        config, tensors = prompts.to_peft(model, params, trainable)
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "peft_type": kind,
        "task_type": _task_type(model, params),
    }
    base = bases.describe(params, _brought_along(params, trainable))
    text = write_card(card, config, base, model.task)
    files.write(pathlib.Path(directory), config, tensors, base, text)


def can_save(params: Any) -> bool:
    """Whether `params` hold adapters and PEFT has a word for them."""
    try:
        return _kind(params) is not None
    except ValueError:
        return False


def _known(kind: str, model: Model | Names) -> Model | Tables | None:
    """What the reader of a kind knows the modules by."""
    if READERS[kind] is prompts.from_peft:
        return model if isinstance(model, Model) else None
    return files.tables_of(model)


def _with_classifier(model: Model, params: Any, trainable: trees.Patterns) -> tuple[str, ...]:
    """The patterns `trainable`, and those of what classifies in the model, if it is to be saved."""
    patterns = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    heads = _classifier(model, params)
    return patterns if _is_adapted(heads) else (*patterns, *map(re.escape, heads))


def _task_type(model: Model, params: Any) -> str | None:
    """PEFT's word for the task; by those for classifications it saves what classifies whole, so
    that an adapter within has none."""
    return None if _is_adapted(_classifier(model, params)) else files.TASK_TYPES.get(model.task)


def _classifier(model: Model, params: Any) -> dict[str, Any]:
    """What classifies, by path; nothing for other tasks."""
    if not model.task.endswith("classification"):
        return {}
    names = model.family.tables.classifier
    return {p: v for p, v in trees.flatten(params).items() if p.partition("/")[0] in names}


def _is_adapted(parameters: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Leaf) for value in parameters.values())


def _brought_along(params: Any, trainable: trees.Patterns) -> list[str]:
    """Paths, `layers_3/...` of a layer, of the plain arrays that are saved with the adapter."""
    parameters, paths = trees.flatten(params), []
    for path in trees.select(parameters, trainable, field="trainable"):
        if is_stacked(path):
            paths += [in_layer(path, i) for i in range(np.shape(parameters[path])[0])]
        else:
            paths.append(path)
    return paths


def _kind(params: Any) -> str | None:
    """PEFT's name of the one method that the params hold; None where they hold none."""
    seq2seq.check_prefix(params)
    seq2seq.check_embedding(params)
    kinds = {"PROMPT_TUNING"} if "prompt" in params else set()
    kinds |= {"PREFIX_TUNING"} if "prefix" in params else set()
    for path, value in trees.flatten(params).items():
        if isinstance(value, (LoRA, DoRA)):
            kinds.add("LORA")
        elif isinstance(value, (IA3, IA3Bias)):
            kinds.add("IA3")
        elif isinstance(value, Leaf) and value.trainable_count():
            raise ValueError(
                f"save_peft: {path} is a {trees.kind(value)} leaf, which PEFT has no files for. "
                "as_lora(params) makes LoRA of AdaLoRA, select(adapters, name) of MixedLoRA."
            )
    if len(kinds) > 1:
        raise ValueError(f"save_peft: a PEFT directory holds one method, not {sorted(kinds)}.")
    return kinds.pop() if kinds else None
