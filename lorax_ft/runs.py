"""The run directory: what stands in it, and how it gets there whole or not at all.

config.json      the whole config, as the run was started
metrics.jsonl    losses, speeds and evaluations by step; also in tensorboard/
checkpoints/     to go on from
adapter/         what was trained, and all that `restore` needs besides the base weights
peft/            the adapter once more as Hugging Face PEFT reads it, where PEFT has its method
loss.png         the picture of metrics.jsonl
results.json     the last thing written: a run that has it is finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from lorax_ft import trees
from lorax_ft.config import ExperimentConfig, flat, parse, to_dict
from lorax_ft.models.tensor_files import new_directory, read_json

PyTree = Any
CONFIG, PEFT = "config.json", "peft"
ADAPTER, RECORD, TENSORS = "adapter", "adapter.json", "trainable.safetensors"
PLACEMENT = ("mesh", "processes")  # where a run is computed, which is no part of what it is
FORMAT = 1  # of an adapter; raised when an older reader would misread a newer one


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """What an adapter has to say of itself."""

    config: ExperimentConfig
    task: str
    label_names: tuple[str, ...]
    base: str  # fingerprint of the base weights


def config_text(config: ExperimentConfig) -> str:
    """The config as `config.json` has it."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def identity(config: ExperimentConfig) -> str:
    """What a run is a run of, as text: its config but for where it is computed."""
    kept = {key: value for key, value in to_dict(config).items() if key not in PLACEMENT}
    return json.dumps(kept, indent=2) + "\n"


def check_run(directory: pathlib.Path, config: ExperimentConfig) -> None:
    """Raises ValueError, naming the keys that differ, where another config's run is there.

    It may have been on another mesh or on other processes.
    """
    path = directory / CONFIG
    if not path.exists():
        return
    found, given = flat(read_json(path)), flat(to_dict(config))
    different = [
        key
        for key in found | given
        if found.get(key) != given.get(key) and key.split(".")[1] not in PLACEMENT
    ]
    if different:
        lines = [f"  {key}: {found.get(key)!r} there, {given.get(key)!r} here" for key in different]
        raise ValueError(
            f"{directory} holds a run of another config:\n" + "\n".join(lines[:10]) + "\n"
            "Give another --run_dir, or the same config to go on with that run."
        )


def is_started(directory: pathlib.Path) -> bool:
    """Whether a run was begun there."""
    return (directory / CONFIG).exists()


def start_run(directory: pathlib.Path, config: ExperimentConfig) -> None:
    """Makes the directory and its config.json, where they are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    if not is_started(directory):
        write_text(directory / CONFIG, config_text(config))


def read_config(directory: str | pathlib.Path) -> ExperimentConfig:
    """The config of a run. Raises FileNotFoundError where there is none."""
    return parse(read_json(pathlib.Path(directory) / CONFIG), ExperimentConfig)


def read_results(directory: str | pathlib.Path) -> dict[str, Any] | None:
    """The results of a finished run; None of one that is not."""
    path = pathlib.Path(directory) / "results.json"
    return read_json(path) if path.exists() else None


def write_results(directory: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results.json, which says that the run is finished."""
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, "utf-8")
    os.replace(new, path)


def save_adapter(directory: str | pathlib.Path, train: PyTree, record: AdapterRecord) -> None:
    """Writes the trainable half and its record to `directory`, in place of what was there."""
    from safetensors.numpy import save_file

    directory = pathlib.Path(directory)
    shutil.rmtree(directory, ignore_errors=True)
    arrays = {
        path: np.ascontiguousarray(array) for path, array in trees.flatten_arrays(train).items()
    }
    with new_directory(directory) as new:
        save_file(arrays, new / TENSORS)
        content = {"format": FORMAT} | to_dict(record)
        write_text(new / RECORD, json.dumps(content, indent=2) + "\n")


def read_record(directory: str | pathlib.Path) -> AdapterRecord:
    """The record of an adapter. Raises FileNotFoundError, or ValueError for another format."""
    path = pathlib.Path(directory) / RECORD
    if not path.exists():
        raise FileNotFoundError(
            f"There is no adapter in {directory}: {path.name} is missing. Is the run finished?"
        )
    content = read_json(path)
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} has another format than {FORMAT}, the one this version reads.")
    return parse(content, AdapterRecord, name=str(path))


def load_adapter(directory: str | pathlib.Path, train: PyTree) -> PyTree:
    """The trainable half `train` with the arrays that `save_adapter` wrote.

    Raises ValueError where the file is damaged or its arrays are not those of `train`.
    """
    import safetensors
    from safetensors.numpy import load_file

    path = pathlib.Path(directory) / TENSORS
    try:
        arrays = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}.") from None
    wanted = trees.flatten_arrays(train)
    different = [
        name
        for name in wanted | arrays
        if name not in arrays
        or name not in wanted
        or arrays[name].shape != wanted[name].shape
        or arrays[name].dtype != wanted[name].dtype
    ]
    if different:
        raise ValueError(
            f"{path} does not hold the parameters that its config trains. They differ in "
            f"{', '.join(different[:5])}."
        )
    return jax.tree_util.tree_map_with_path(
        lambda key_path, array: jax.device_put(arrays[trees.path_name(key_path)], array.sharding),
        train,
    )
