"""Models from and to Hugging Face directories: config.json and safetensors, strict both ways.

Every tensor of a checkpoint is read, or is one that the family's tables name as a buffer, a
repetition or another task's head; every parameter is filled from the checkpoint, or belongs to a
new head of the task.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft.leaves import is_leaf
from lorax_ft.models.hugging_face import is_turned
from lorax_ft.models.layers import Array, PyTree
from lorax_ft.models.matching import (
    Checkpoint,
    check_complete,
    named,
    new_parameters,
    tensor_names,
)
from lorax_ft.models.model import Model, build
from lorax_ft.models.tensor_files import (
    MAX_SHARD_BYTES,
    new_directory,
    open_tensors,
    read_json,
    write_json,
    write_tensors,
)
from lorax_ft.trees import flatten, flatten_arrays, map_with_path

Transform = Callable[[str, Array], Any]

logger = logging.getLogger(__name__)

# What is fetched from the hub, and what `save` may copy beside the weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_FETCHED = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)


def load(
    path_or_id: str | pathlib.Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    key: Array | None = None,
    transform: Transform | None = None,
    ignore_fields: tuple[str, ...] = (),
    **overrides: Any,
) -> tuple[Model, PyTree]:
    """Reads a model and its parameters.

    Args:
        path_or_id: a directory with config.json and safetensors, or the name of one on the Hugging
            Face hub.
        task: what the model is for; where None, what its config.json says.
        num_labels: how many classes the head tells apart; where the checkpoint's tells apart
            another number, the head starts anew.
        key: for a head of the task that the checkpoint lacks, which is reported to `logging`.
        transform: `(path, array) -> array or leaf`, applied to each parameter as soon as it is
            read, so that the whole is never in memory. Of stacked layers it sees one at a time, and
            the arrays of what it returns are stacked.
        ignore_fields: fields of config.json that are not known here and change nothing.
        **overrides: fields of `ComputeConfig` (dtype, scan_layers, remat, ...) or of the model's
            config.

    Raises FileNotFoundError for what is missing, and ValueError naming the file, tensor or field
    for what is damaged, left over or not handled.
    """
    directory = find_directory(path_or_id)
    model = build(
        read_json(directory / "config.json"),
        task=task,
        num_labels=num_labels,
        ignore_fields=ignore_fields,
        **overrides,
    )
    with open_tensors(directory) as tensors:
        checkpoint = named(model, tensors)
        paths = new_parameters(model, checkpoint, resized=num_labels is not None)
        check_complete(model, checkpoint, paths)
        if paths:
            logger.warning("New, for the task %s: %s.", model.task, ", ".join(paths))
        new = _start(model, paths, key, directory)

        def parameter(path: str, shape: jax.ShapeDtypeStruct) -> Any:
            if path in new:
                return new[path] if transform is None else transform(path, new[path])
            return _read(model, checkpoint, path, shape, transform)

        return model, map_with_path(parameter, model.shapes())


def new_head(
    path_or_id: str | pathlib.Path, model: Model, key: Array, *, num_labels: int | None = None
) -> dict[str, Array]:
    """By path, what `load` with this key starts anew, since the checkpoint lacks it.

    Gives a model that was loaded the head of another key without reading its weights again.
    """
    directory = find_directory(path_or_id)
    with open_tensors(directory) as tensors:
        checkpoint = named(model, tensors)
        paths = new_parameters(model, checkpoint, resized=num_labels is not None)
    return _start(model, paths, key, directory)


def find_directory(path_or_id: str | pathlib.Path) -> pathlib.Path:
    """The directory of that path, or else of that name on the Hugging Face hub, fetched."""
    path = pathlib.Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{path} is no directory.")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as error:  # the hub's errors, and httpx's, are both or either
        raise FileNotFoundError(
            f"{name!r} is no directory here, and the Hugging Face hub did not give it: {error}"
        ) from error


def save(
    directory: str | pathlib.Path,
    model: Model,
    params: PyTree,
    *,
    tokenizer_files_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a directory that transformers reads; whole or, if anything fails, not at all.

    Args:
        directory: new, or empty.
        params: plain arrays; merge adapters and dequantise first.
        tokenizer_files_from: a directory whose tokenizer files are copied.
        max_shard_bytes: a larger model is cut into files of at most this size, with an index.

    Raises ValueError where `directory` is not empty or `params` are not the model's.
    """
    _check_parameters(model, params)
    tables, names = model.family.tables, {}
    for path, array in flatten(params).items():
        for layer, name in tensor_names(model, path, array.shape).items():
            names[name.removeprefix(tables.prefix) if model.task == "encoder" else name] = (
                path,
                layer,
            )
    arrays = flatten(params)

    def read(name: str) -> np.ndarray:
        path, layer = names[name]
        array = np.asarray(arrays[path] if layer is None else arrays[path][layer])
        return array.T if is_turned(tables, path) else array

    sizes = {
        name: arrays[path].nbytes // (1 if layer is None else arrays[path].shape[0])
        for name, (path, layer) in names.items()
    }
    architecture = next(name for name, task in tables.tasks.items() if task == model.task)
    config = {"architectures": [architecture], "dtype": str(next(iter(arrays.values())).dtype)}
    with new_directory(pathlib.Path(directory)) as new:
        write_tensors(new, sizes, read, max_shard_bytes)
        write_json(new / "config.json", {**model.config.to_hugging_face(), **config})
        if tokenizer_files_from is not None:
            _copy_tokenizer(pathlib.Path(tokenizer_files_from), new)


def fingerprint(params: PyTree) -> str:
    """A SHA-256 over each array's name, dtype, shape and bytes, layers stacked or not."""
    lines = []
    for path, array in flatten_arrays(params).items():
        array = np.asarray(array)
        stacked = path.startswith("layers/")
        for i, part in enumerate(array if stacked else [array]):
            name = f"layers_{i}/{path.removeprefix('layers/')}" if stacked else path
            content = hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest()
            lines.append(f"{name} {part.dtype} {list(part.shape)} {content}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


# --- Reading --------------------------------------------------------------------------------------


def _read(
    model: Model,
    checkpoint: Checkpoint,
    path: str,
    shape: jax.ShapeDtypeStruct,
    transform: Transform | None,
) -> Any:
    """One parameter, in our orientation and dtype; layers stacked."""

    def layer(name: str) -> np.ndarray:
        array = checkpoint.read(name).astype(shape.dtype, copy=False)
        return array.T if is_turned(model.family.tables, path) else array

    names = tensor_names(model, path, shape.shape)
    if transform is None:
        arrays = [layer(name) for name in names.values()]
        return jnp.asarray(arrays[0] if None in names else np.stack(arrays))
    parts = [transform(path, jnp.asarray(layer(name))) for name in names.values()]
    return parts[0] if None in names else jax.tree.map(lambda *fields: jnp.stack(fields), *parts)


def _start(
    model: Model, paths: list[str], key: Array | None, directory: pathlib.Path
) -> dict[str, Array]:
    """Initial values of a new head; of the model's initialisation nothing else is computed."""
    if not paths:
        return {}
    if key is None:
        raise ValueError(
            f"{directory} has no {', '.join(paths)} that fits the task {model.task}: pass key=..., "
            "such as jax.random.key(0), to start anew there."
        )

    @jax.jit
    def initial(key: Array) -> dict[str, Array]:
        params = flatten(model.init(key))
        return {path: params[path] for path in paths}

    return initial(key)


# --- Writing --------------------------------------------------------------------------------------


def _check_parameters(model: Model, params: PyTree) -> None:
    expected, found = flatten(model.shapes()), flatten(params)
    if different := sorted(set(expected) ^ set(found)):
        raise ValueError(f"The parameters are not the model's: they differ in {different[:5]}.")
    for path, value in found.items():
        if is_leaf(value):
            raise ValueError(
                f"{path} is a {type(value).__name__} leaf, and the directory holds plain arrays: "
                "merge adapters and dequantise first."
            )
        if value.shape != expected[path].shape:
            raise ValueError(
                f"{path} has shape {list(value.shape)}, but the model's config makes it "
                f"{list(expected[path].shape)}."
            )


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    files = [source / name for name in TOKENIZER_FILES if (source / name).exists()]
    if not files:
        raise FileNotFoundError(
            f"{source} has no tokenizer file: none of {', '.join(TOKENIZER_FILES)}."
        )
    for file in files:
        shutil.copyfile(file, target / file.name)
