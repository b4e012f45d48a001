"""Adapters as Hugging Face PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, IA3, prompts and prefixes, for every model whose names are known, with trained biases and
modules saved whole. Strict both ways: a tensor that is not read, one that is missing, and a config
field that changes the maths and is not handled, raise.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from lorax_ft import trees
from lorax_ft.interop import files, ia3, lora, prompts, seq2seq
from lorax_ft.leaves import Leaf
from lorax_ft.methods import IA3, DoRA, IA3Bias, LoRA
from lorax_ft.models import Model

__all__ = ["can_save", "load_peft", "save_peft"]

READERS = {
    "LORA": lora.from_peft,
    "IA3": ia3.from_peft,
    "PROMPT_TUNING": prompts.from_peft,
    "PREFIX_TUNING": prompts.from_peft,
    "P_TUNING": prompts.from_peft,
}


def load_peft(
    directory: str | os.PathLike[str], model: Model, params: Any
) -> tuple[Any, tuple[str, ...]]:
    """Puts the adapter of a PEFT directory into `params`, the base that it was trained on.

    Returns the params and the patterns of the plain arrays that came with it, as `trees.partition`
    takes them. Raises ValueError naming the file and the key for a tensor that is not read or is
    missing, a module the model does not have, a shape that does not fit, and a config field that is
    not handled.
    """
    config, tensors = files.read(pathlib.Path(directory))
    reader = READERS.get(str(config.get("peft_type")))
    if reader is None:
        raise ValueError(
            f"{pathlib.Path(directory) / files.CONFIG}: peft_type is "
            f"{config.get('peft_type')!r}; only {', '.join(READERS)} can be read."
        )
    return reader(config, tensors, model, params)


def save_peft(
    directory: str | os.PathLike[str],
    model: Model,
    params: Any,
    trainable: trees.Patterns = (),
    *,
    base_name: str = "",
    dropout: float = 0.0,
    rslora: bool = False,
    card: str = "",
) -> None:
    """Writes the adapters of `params`, and the plain arrays `trainable` names, as a PEFT directory.

    The directory must be new or empty, and appears whole or not at all. `base_name` says which base
    model the adapter belongs to; `dropout` and `rslora` (the scale as alpha over the root of the
    rank) how LoRA is stated; `card` becomes README.md. Raises ValueError where there is nothing to
    save, where PEFT has no word for what there is, and where the directory holds something.
    """
    kind = _kind(params) or "LORA"
    if kind == "LORA":
        config, tensors = lora.to_peft(model, params, trainable, dropout=dropout, rslora=rslora)
    elif kind == "IA3":
        config, tensors = ia3.to_peft(model, params, trainable)
    else:
        config, tensors = prompts.to_peft(model, params, trainable)
    if not tensors:
        raise ValueError("save_peft: the parameters hold no adapter and nothing is trainable.")
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "peft_type": kind,
        "task_type": files.TASK_TYPES.get(model.task),
    }
    files.write(pathlib.Path(directory), config, tensors, card)


def can_save(params: Any) -> bool:
    """Whether `params` hold adapters and PEFT has a word for them."""
    try:
        return _kind(params) is not None
    except ValueError:
        return False


def _kind(params: Any) -> str | None:
    """PEFT's name of the one method that the params hold; None where they hold none."""
    seq2seq.check_prefix(params)
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
