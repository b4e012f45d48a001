"""Models from and to Hugging Face directories: config.json and safetensors, strict both ways.

Every tensor of a checkpoint is read, or is one that the family's tables name as a buffer, a
repetition or another task's head; every parameter is filled from the checkpoint, or belongs to a
new head of the task.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import pathlib
import shutil
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from lorax_ft.leaves import is_leaf
from lorax_ft.models import quantized_cache
from lorax_ft.models.four_bit import (
    check_quantization,
    four_bit_files,
    layer_of,
    quantization_config,
    tensors_of,
)
from lorax_ft.models.hugging_face import in_layer, is_stacked, is_turned, split_layer
from lorax_ft.models.layers import Array, PyTree
from lorax_ft.models.llama import LlamaConfig
from lorax_ft.models.matching import (
    check_complete,
    named,
    new_parameters,
    tensor_names,
    with_own_head,
)
from lorax_ft.models.model import Model, build
from lorax_ft.models.streaming import (
    Reader,
    Transform,
    flatten_shardings,
    place_shapes,
    place_whole,
    plan,
    quantize_chosen,
)
from lorax_ft.models.tensor_files import (
    MAX_SHARD_BYTES,
    new_directory,
    open_tensors,
    read_json,
    write_json,
    write_tensors,
)
from lorax_ft.quantization import FourBit, QuantizationConfig
from lorax_ft.quantization.slices import on_host
from lorax_ft.trees import flatten, flatten_arrays, with_fields

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
    quantization: QuantizationConfig | None = None,
    shardings: Callable[[PyTree], PyTree] | None = None,
    cache: str | pathlib.Path | None = None,
    ignore_fields: tuple[str, ...] = (),
    interleaved_rotary: bool = False,
    **overrides: Any,
) -> tuple[Model, PyTree]:
    """Reads a model and its parameters; weights in four bits, of bitsandbytes, stay in them.

    Args:
        path_or_id: a directory with config.json and safetensors, or the name of one on the Hugging
            Face hub.
        task: what the model is for; where None, what its config.json says.
        num_labels: how many classes the head tells apart; where the checkpoint's tells apart
            another number, the head starts anew.
        key: for a head of the task that the checkpoint lacks, which is reported to `logging`.
        transform: `(path, array) -> array or leaf`, applied to each parameter as soon as it is
            read, so that the whole is never in memory. Of stacked layers it sees one at a time, and
            the arrays of what it returns are stacked. What is in four bits already it does not see.
        quantization: kernels that its patterns name are put in few bits as they are read.
        shardings: gives each array's `NamedSharding`, of the tree of parameters as
            `ShapeDtypeStruct`s: each process then reads only what its own devices hold.
        cache: a folder that keeps what `quantization` made of a checkpoint, under a fingerprint of
            its files: the second time no weights are read from them (but the head that a T5 may
            share with its table).
        ignore_fields: fields of config.json that are not known here and change nothing.
        interleaved_rotary: queries and keys are in the order of Meta's own LLaMA files, and are put
            into that of Hugging Face's.
        **overrides: fields of `ComputeConfig` (dtype, scan_layers, remat, ...) or of the model's
            config.

    Raises FileNotFoundError for what is missing, and ValueError naming the file, tensor or field
    for what is damaged, left over or not handled.
    """
    if cache is not None and quantization is None:
        raise ValueError("load: cache is for quantised weights: give quantization too.")
    if transform is not None and (quantization is not None or shardings is not None):
        raise ValueError("load: transform takes the place of quantization and shardings.")
    directory = find_directory(path_or_id)
    raw = read_json(directory / "config.json")
    if in_four_bits := raw.pop("quantization_config", None):
        check_quantization(in_four_bits)
    model = build(
        raw,
        task=task,
        num_labels=num_labels,
        ignore_fields=ignore_fields,
        **overrides,
    )
    if interleaved_rotary and not isinstance(model.config, LlamaConfig):
        raise ValueError(
            "load: interleaved_rotary is for models with rotary positions: leave it out."
        )
    with open_tensors(directory) as tensors:
        checkpoint = named(model, four_bit_files(tensors) if in_four_bits else tensors)
        model = with_own_head(model, checkpoint)
        paths = new_parameters(model, checkpoint, resized=num_labels is not None)
        planned = plan(model, checkpoint, quantization)
        placed: dict[str, Any] = {}
        if shardings is not None:
            tree = with_fields(model.shapes(), planned)
            placed = flatten_shardings(shardings(tree), planned)
        reader = Reader(
            model=model,
            checkpoint=checkpoint,
            transform=transform,
            quantization=quantization,
            shardings=placed,
            interleaved_rotary=interleaved_rotary,
        )
        if in_four_bits or quantization is None or cache is None:
            params = _read_all(reader, paths)
        else:
            files = [directory / "config.json", *tensors.handles]
            params = quantized_cache.restore_or_make(
                quantized_cache.entry(cache, files, model, quantization, interleaved_rotary, paths),
                {p: place_shapes(v, placed.get(p)) for p, v in planned.items() if p not in paths},
                functools.partial(_read_all, reader, paths),
                fingerprint,
            )
        if paths:
            logger.warning("New, for the task %s: %s.", model.task, ", ".join(paths))
        new = quantize_chosen(_start(model, paths, key, directory), quantization)
        for path, value in new.items():
            value = value if transform is None else transform(path, value)
            params[path] = place_whole(value, placed.get(path))
        return model, with_fields(model.shapes(), params)


def _read_all(reader: Reader, new: list[str]) -> dict[str, Any]:
    """The checkpoint's parameters by path, all but the new ones. Raises for what it lacks."""
    check_complete(reader.model, reader.checkpoint, new)
    shapes = flatten(reader.model.shapes())
    return {path: reader.read(path, shapes[path]) for path in shapes if path not in new}


def describe(
    path_or_id: str | pathlib.Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    ignore_fields: tuple[str, ...] = (),
    **overrides: Any,
) -> Model:
    """The model that `load` would give, by its config.json alone: no weights need be there.

    Raises ValueError for weights that are in four bits already, whose config.json does not say
    which of them are, and otherwise as `load` does.
    """
    raw = read_json(_find_config(path_or_id))
    if raw.pop("quantization_config", None):
        raise ValueError(
            f"{path_or_id}: its weights are in few bits already, and config.json alone does not "
            "say which. Describe the model that they were made from, with a quantisation of ours."
        )
    return build(raw, task=task, num_labels=num_labels, ignore_fields=ignore_fields, **overrides)


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
    if _is_no_id(path, name):
        raise FileNotFoundError(f"{path} is no directory.")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as error:  # the hub's errors, and httpx's, are both or either
        raise _not_given(name, error) from error


def _find_config(path_or_id: str | pathlib.Path) -> pathlib.Path:
    """The config.json of a directory, or else of that name on the hub, fetched without weights."""
    path = pathlib.Path(path_or_id).expanduser()
    if path.is_dir() or _is_no_id(path, str(path_or_id)):
        return find_directory(path_or_id) / "config.json"
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(str(path_or_id), "config.json"))
    except (OSError, ValueError) as error:
        raise _not_given(str(path_or_id), error) from error


def _is_no_id(path: pathlib.Path, name: str) -> bool:
    """Whether it cannot be a name on the hub: there is such a file, or no such id can be."""
    unlike = name.startswith((".", "~")) or name.count("/") > 1
    return path.exists() or path.is_absolute() or unlike


def _not_given(name: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name!r} is no directory here, and the Hugging Face hub did not give it: {error}"
    )


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
        params: plain arrays, and NF4 or FP4 leaves, which are written as bitsandbytes writes them;
            merge adapters first.
        tokenizer_files_from: a directory whose tokenizer files are copied.
        max_shard_bytes: a larger model is cut into files of at most this size, with an index.

    Raises ValueError where `directory` is not empty, `params` are not the model's, their leaves are
    of different kinds, or transformers would not hold one of them in few bits.
    """
    _check_parameters(model, params)
    parameters = flatten(params)
    places = _places(model, parameters)
    _check_four_bit(model, parameters, places)

    @functools.lru_cache(maxsize=1)  # the tensors of a four-bit weight are asked for one by one
    def tensors(name: str) -> dict[str, np.ndarray]:
        path, layer = places[name]
        value = parameters[path]
        if is_leaf(value):
            return tensors_of(name, layer_of(value, layer))
        array = np.asarray(value if layer is None else value[layer])
        return {name: array.T if is_turned(model.family.tables, path) else array}

    sizes, owners = {}, {}
    for name, (path, layer) in places.items():
        if is_leaf(parameters[path]):
            sizes |= {part: tensor.nbytes for part, tensor in tensors(name).items()}
            owners |= dict.fromkeys(tensors(name), name)
        else:
            count = 1 if layer is None else parameters[path].shape[0]
            sizes[name], owners[name] = parameters[path].nbytes // count, name
    with new_directory(pathlib.Path(directory)) as new:
        write_tensors(new, sizes, lambda name: tensors(owners[name])[name], max_shard_bytes)
        write_json(new / "config.json", _config(model, parameters, places))
        if tokenizer_files_from is not None:
            _copy_tokenizer(pathlib.Path(tokenizer_files_from), new)


def fingerprint(params: PyTree, without: Collection[str] = ()) -> str:
    """A SHA-256 over each array's name, dtype, shape and bytes, layers stacked or not.

    `without` names arrays to leave out, `layers_3/...` of a layer.
    """
    lines = []
    for path, array in flatten_arrays(params).items():
        stacked = is_stacked(path)
        if not isinstance(array, jax.Array) or len(array.devices()) == 1:
            array = np.asarray(array)  # on a CPU no copy
        for i in range(array.shape[0] if stacked else 1):
            part = on_host(array[i] if stacked else array)
            name = in_layer(path, i) if stacked else path
            if name in without:
                continue
            content = hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest()
            lines.append(f"{name} {part.dtype} {list(part.shape)} {content}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


# --- Reading --------------------------------------------------------------------------------------


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


def _places(model: Model, parameters: dict[str, Any]) -> dict[str, tuple[str, int | None]]:
    """The path and the layer of each tensor by its name in the file."""
    tables, places = model.family.tables, {}
    for path, array in parameters.items():
        for layer, name in tensor_names(model, path, array.shape).items():
            name = name.removeprefix(tables.prefix) if model.task == "encoder" else name
            places[name] = (path, layer)
    return places


def _config(
    model: Model, parameters: dict[str, Any], places: dict[str, tuple[str, int | None]]
) -> dict[str, Any]:
    """The config.json."""
    tables = model.family.tables
    architecture = next(name for name, task in tables.tasks.items() if task == model.task)
    dtype = str(next(value.dtype for value in parameters.values() if not is_leaf(value)))
    config = {**model.config.to_hugging_face(), "architectures": [architecture], "dtype": dtype}
    if kernels := {path: value for path, value in parameters.items() if is_leaf(value)}:
        linear = {
            name.removesuffix(".weight"): parameters[path]
            for name, (path, _) in places.items()
            if path.endswith("/kernel")
        }
        tied = {
            name.removesuffix(".weight"): None for name in tables.tied if name.endswith("weight")
        }
        config["quantization_config"] = quantization_config(kernels, {**tied, **linear})
    return config


def _check_parameters(model: Model, params: PyTree) -> None:
    expected, found = flatten(model.shapes()), flatten(params)
    if different := sorted(set(expected) ^ set(found)):
        raise ValueError(f"The parameters are not the model's: they differ in {different[:5]}.")
    for path, value in found.items():
        if is_leaf(value) and not isinstance(value, FourBit):
            raise ValueError(
                f"{path} is a {type(value).__name__} leaf, and the directory holds plain arrays "
                "and four-bit weights: merge adapters, and dequantise other leaves, first."
            )
        if value.shape != expected[path].shape:
            raise ValueError(
                f"{path} has shape {list(value.shape)}, but the model's config makes it "
                f"{list(expected[path].shape)}."
            )


def _check_four_bit(
    model: Model, parameters: dict[str, Any], places: dict[str, tuple[str, int | None]]
) -> None:
    never = model.family.tables.never_quantized
    for name, (path, _) in places.items():
        if is_leaf(parameters[path]) and name.split(".")[-2] in never:
            raise ValueError(
                f"{path} is in four bits, but transformers holds {name} in full and could not read "
                f"it. Add {split_layer(path)[0]!r} to QuantizationConfig.exclude, or dequantise it."
            )


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    files = [source / name for name in TOKENIZER_FILES if (source / name).exists()]
    if not files:
        raise FileNotFoundError(
            f"{source} has no tokenizer file: none of {', '.join(TOKENIZER_FILES)}."
        )
    for file in files:
        shutil.copyfile(file, target / file.name)
