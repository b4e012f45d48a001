"""Checkpoints of Microsoft's loralib, the LoRA of Hu et al. 2021, as PEFT would have them.

loralib adds `lora_A` and `lora_B` to a model's own state. Its `MergedLinear`, which GPT-2's fused
queries, keys and values have, keeps a pair of factors for each part that is adapted: together they
are one LoRA of as many times the rank, whose second factor is zero outside its blocks.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorax_ft import trees
from lorax_ft.interop import files, lora
from lorax_ft.models import Model
from lorax_ft.models.hugging_face import Names, Tables, match_name

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])")


def load_loralib(
    path: str | os.PathLike[str],
    model: Model | Names,
    params: Any,
    *,
    alpha: float,
    enabled: Sequence[bool] | None = None,
    allow_pickle: bool = False,
) -> tuple[Any, tuple[str, ...]]:
    """Puts the LoRA of a loralib checkpoint into `params`, the base that it was trained on.

    Args:
        path: a file of `torch.save(lora_state_dict(model))`, or safetensors of the same.
        model: the base's, or names, as `load_peft` takes them.
        params: the base's parameters; nothing of them is altered.
        alpha: what the model was made with (`lora_alpha`); the file does not say.
        enabled: of a `MergedLinear`, which of its equal parts are adapted (`enable_lora`), such as
            (True, False, True) for queries and values; the file does not say.
        allow_pickle: read a file of `torch.save`: the tensors in it, and nothing of it is run.

    Returns the params and the patterns of the plain arrays that came with it. Factors of a
    `MergedLinear` that are trained further may fill the zeros between their blocks. Raises
    FileNotFoundError, and ValueError naming the tensor for one that is missing, unknown or of a
    shape that does not fit.
    """
    state = _read(pathlib.Path(path), allow_pickle)
    tables, paths = files.tables_of(model), trees.flatten(params)
    factors: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    tensors: dict[str, np.ndarray] = {}
    for key, tensor in state.items():
        name = _known_name(key.removeprefix("module."), tables)
        if match := _FACTOR.fullmatch(name):
            factors[match["module"]][match["part"]] = tensor
        elif not any(match_name(template, name) for template in tables.foreign):
            tensors[lora.PREFIX + name] = tensor
    if not factors:
        raise ValueError(f"load_loralib: {path} holds no lora_A and lora_B.")
    ranks, alphas = {}, {}
    for module, parts in factors.items():
        if set(parts) != {"A", "B"}:
            raise ValueError(f"load_loralib: {module} has only lora_{next(iter(parts))}.")
        ours, _ = files.our_path(module, module, ("kernel", "embedding"), tables, paths)
        out_size = paths[ours].shape[-1]
        a, b, count = _whole(module, parts["A"], parts["B"], out_size, enabled)
        tensors |= _as_peft(module, a, b, is_embedding=ours.endswith("/embedding"))
        ranks[re.escape(module)], alphas[re.escape(module)] = a.shape[0], alpha * count
    config = {"r": 1, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
    return lora.from_peft(config, tensors, tables, params)


def _read(path: pathlib.Path, allow_pickle: bool) -> Mapping[str, np.ndarray]:
    from safetensors.numpy import load_file

    if path.suffix == ".safetensors":
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing.")
        return load_file(path)
    if not allow_pickle:
        raise ValueError(
            f"load_loralib: {path} is no .safetensors file. A pickle is read only when asked for: "
            "allow_pickle=True reads the tensors in it and runs nothing of it."
        )
    return files.read_state(path)


def _known_name(name: str, tables: Tables) -> str:
    """The name with the prefix that a bare model's state lacks."""
    heads = tuple(n for n in tables.names.values() if not n.startswith(tables.prefix))
    return name if name.startswith((tables.prefix, *heads)) else tables.prefix + name


def _whole(
    module: str, a: np.ndarray, b: np.ndarray, out_size: int, enabled: Sequence[bool] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """(A `[count * r, in]`, B `[out, count * r]`, count of adapted parts) of a module's factors."""
    rank = b.shape[1]
    if a.shape[0] == rank and b.shape[0] == out_size:
        return a, b, 1
    if enabled is None:
        raise ValueError(
            f"load_loralib: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)} for "
            f"{out_size} outputs. If it is a MergedLinear, say which of its parts are adapted, "
            "such as enabled=(True, False, True)."
        )
    places = [i for i, is_adapted in enumerate(enabled) if is_adapted]
    size = out_size // len(enabled)
    if (a.shape[0], b.shape[0], size * len(enabled)) != (
        rank * len(places),
        size * len(places),
        out_size,
    ):
        raise ValueError(
            f"load_loralib: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which "
            f"do not fit {len(places)} parts of {len(enabled)} of its {out_size} outputs, as "
            f"enabled={tuple(enabled)} says."
        )
    whole = np.zeros((out_size, a.shape[0]), b.dtype)
    for i, place in enumerate(places):
        rows = slice(place * size, (place + 1) * size)
        whole[rows, i * rank : (i + 1) * rank] = b[i * size : (i + 1) * size]
    return a, whole, len(places)


def _as_peft(
    module: str, a: np.ndarray, b: np.ndarray, *, is_embedding: bool
) -> dict[str, np.ndarray]:
    name = lora.PREFIX + module
    if is_embedding:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
