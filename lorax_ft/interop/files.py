"""What every kind of Hugging Face PEFT directory has in common: files, names, arrays saved
whole."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.interop.pickles import read_torch
from lorax_ft.models.hugging_face import (
    SUFFIXES,
    Names,
    Tables,
    in_layer,
    is_stacked,
    is_turned,
    module_name,
    module_path,
    split_layer,
)
from lorax_ft.models.model import Model
from lorax_ft.models.tensor_files import new_directory, read_json

CONFIG, WEIGHTS, README = "adapter_config.json", "adapter_model.safetensors", "README.md"
PICKLE = "adapter_model.bin"  # as WEIGHTS was called before safetensors
TASK_TYPES = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "masked_lm": None,
    "encoder": "FEATURE_EXTRACTION",
}

# Fields of adapter_config.json that change nothing once an adapter is trained, of whatever kind.
HARMLESS = frozenset(
    """
    peft_type base_model_name_or_path revision task_type peft_version inference_mode auto_mapping
    """.split()
)

logger = logging.getLogger(__name__)

Pieces = dict[str, dict[int | None, np.ndarray]]
"""Arrays of a file by our path, and by layer where ours are stacked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What stands in a PEFT directory."""

    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]  # of the file of tensors


def read(
    directory: pathlib.Path, config: Mapping[str, Any] | None = None, allow_pickle: bool = False
) -> Contents:
    """Reads a PEFT directory.

    `config` stands for an adapter_config.json that is not there. Raises FileNotFoundError naming a
    file that is missing, and ValueError naming one that cannot be read, that is a pickle without
    `allow_pickle`, or that is there though `config` is given.
    """
    path = directory / CONFIG
    if config is None:
        config = read_json(path)
    elif path.exists():
        raise ValueError(f"load_peft: config is given, but {path} is there too. Leave one out.")
    tensors, metadata = _read_tensors(directory, allow_pickle)
    return Contents(config=config, tensors=tensors, metadata=metadata)


def _read_tensors(
    directory: pathlib.Path, allow_pickle: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata); a pickle is read only where there is nothing else."""
    import safetensors

    path, pickle = directory / WEIGHTS, directory / PICKLE
    if path.is_file():
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except Exception as error:  # the reader has several kinds of error for a broken file
            raise ValueError(f"load_peft: {path} cannot be read ({error}).") from error
    if not pickle.is_file():
        found = sorted(p.name for p in directory.glob("*")) if directory.is_dir() else "nothing"
        raise FileNotFoundError(f"load_peft: {path} is not there; found {found}.")
    if not allow_pickle:
        raise ValueError(
            f"load_peft: {directory} has {PICKLE} and no {WEIGHTS}. A pickle is read only when "
            "asked for: allow_pickle=True reads the tensors in it and runs nothing of it."
        )
    return read_state(pickle), {}


def read_state(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors by name of a file of `torch.save`. Raises ValueError where it holds others."""
    tensors = read_torch(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, np.ndarray) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not tensors by name alone.")
    return tensors


def write(
    directory: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    card: str,
) -> None:
    """Writes a new directory, whole or not at all."""
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with new_directory(directory) as new:
        save_file(contiguous, new / WEIGHTS, metadata={"format": "pt", **metadata})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (new / README).write_text(card, encoding="utf-8")


def check_fields(
    config: Mapping[str, Any], read: Collection[str], required: Collection[str] = ()
) -> None:
    """Raises ValueError for a field that is not handled and may change the maths, and for a missing
    one."""
    for name, value in config.items():
        if name not in read and name not in HARMLESS and value not in (None, False, {}, []):
            raise ValueError(
                f"{CONFIG}: {name} = {value!r} may change the maths and is not handled."
            )
    if missing := set(required) - set(config):
        raise ValueError(f"{CONFIG}: {sorted(missing)} is missing.")


def warn_of_orientation(config: Mapping[str, Any], paths: Collection[str], tables: Tables) -> None:
    """Tells where a file says that kernels are stored [out, in] and the base's are [in, out].

    The factors are the same either way, so it is read as the base has it, and PEFT does so too.
    """
    stored = [path for path in paths if path.endswith("/kernel") and not is_turned(tables, path)]
    if stored and config.get("fan_in_fan_out") is False:
        logger.warning(
            "%s: fan_in_fan_out is false, but the base keeps %s as [in, out]; read as true.",
            CONFIG,
            stored[0],
        )


# --- Names ----------------------------------------------------------------------------------------


def tables_of(model: Model | Names) -> Tables:
    """What PEFT calls the modules of a model, or of params whose names are given."""
    return model.family.tables if isinstance(model, Model) else Tables(names=model)


def our_path(
    key: str, module: str, kinds: tuple[str, ...], tables: Tables, paths: Mapping[str, Any]
) -> tuple[str, int | None]:
    """The parameter a tensor belongs to, and its layer where ours are stacked."""
    found = module_path(tables.names, module)
    if found is not None:
        ours, layer = found
        for kind in kinds:
            if f"{ours}/{kind}" in paths:
                return f"{ours}/{kind}", layer
            if layer is not None and (unrolled := f"{in_layer(ours, layer)}/{kind}") in paths:
                return unrolled, None
    known = [module_name(tables.names, p, 0) for p in paths if _is_named(tables, p)]
    raise ValueError(
        f"load_peft: the tensor {key!r} belongs to no parameter of this model. Nearest modules: "
        f"{', '.join(trees.nearest(module, dict.fromkeys(known)))}."
    )


def _is_named(tables: Tables, path: str) -> bool:
    return split_layer(path)[0].rpartition("/")[0] in tables.names


# --- Arrays saved whole ---------------------------------------------------------------------------


def plain_tensors(
    tables: Tables, params: Any, trainable: trees.Patterns, adapted: Collection[str] = ()
) -> tuple[dict[str, Any], str]:
    """Trained arrays of the model's own by PEFT's name, and PEFT's word for which biases are among
    them."""
    tensors, biases = {}, "none"
    parameters = trees.flatten(params)
    for path in trees.select(parameters, trainable, field="trainable"):
        depth = 1 if is_stacked(path) else 0
        for index in np.ndindex(tuple(parameters[path].shape[:depth])):
            module = module_name(tables.names, path, *index)
            kind, array = path.rsplit("/", 1)[1], np.asarray(parameters[path][index])
            if module in adapted and kind == "bias":
                tensors[f"{module}.base_layer.bias"] = array
                biases = "lora_only" if biases == "none" else biases
            else:
                turned = is_turned(tables, path)
                tensors[f"{module}.{SUFFIXES[kind]}"] = array.T if turned else array
    lone = _lone_biases(tensors)
    return tensors, "all" if lone else biases


def _lone_biases(tensors: Mapping[str, Any]) -> list[str]:
    """Biases whose module has no other trained tensor: they are no modules saved whole."""
    owners = collections.Counter(name.rsplit(".", 1)[0] for name in tensors)
    return [
        n
        for n in tensors
        if n.endswith(".bias") and owners[n.rsplit(".", 1)[0]] == 1 and ".base_layer." not in n
    ]


def modules_of(tensors: Mapping[str, Any], biases: str, tables: Tables) -> list[str] | None:
    """The modules that are saved whole, as `modules_to_save` names them.

    A head of several modules, such as RoBERTa's classifier, goes by its own name.
    """
    saved = {n.rsplit(".", 1)[0] for n in tensors if not _is_bias_only(n, biases)}
    for head in {name.partition(".")[0] for name in saved}:
        inner = {name for name in tables.names.values() if name.startswith(f"{head}.")}
        if inner and inner <= saved:
            saved = (saved - inner) | {head}
    return sorted(saved) or None


def _is_bias_only(name: str, biases: str) -> bool:
    return ".base_layer." in name or (biases == "all" and name.endswith(".bias"))


def add_plain(
    pieces: Pieces,
    key: str,
    name: str,
    tensor: np.ndarray,
    tables: Tables,
    paths: Mapping[str, Any],
) -> None:
    """Puts a tensor of a module that was saved whole among the pieces."""
    module, _, suffix = name.rpartition(".")
    kinds = ("bias",) if suffix == "bias" else ("kernel", "embedding", "scale")
    module = module.removesuffix(".modules_to_save.default")
    path, layer = our_path(key, module, kinds, tables, paths)
    pieces.setdefault(path, {})[layer] = tensor.T if is_turned(tables, path) else tensor


def fill(params: Any, pieces: Pieces) -> tuple[Any, tuple[str, ...]]:
    """Params with the arrays that were saved whole, and the patterns of these."""
    parameters = trees.flatten(params)
    changes = {path: _filled(path, parameters[path], layers) for path, layers in pieces.items()}
    return trees.with_fields(params, changes), tuple(re.escape(path) for path in pieces)


def _filled(path: str, value: Any, pieces: Mapping[int | None, np.ndarray]) -> Any:
    """A plain array with the layers that a file holds in place."""
    for layer, piece in pieces.items():
        expected = value.shape if layer is None else value.shape[1:]
        if piece.shape != tuple(expected):
            raise ValueError(
                f"load_peft: {path} is {list(expected)}, the file has {list(piece.shape)}."
            )
        piece = jnp.asarray(piece, value.dtype)
        value = piece if layer is None else value.at[layer].set(piece)
    return value
