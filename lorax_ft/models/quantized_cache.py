"""A folder of quantised weights: quantised once, and restored from there on later starts.

An entry is known by the files that it was read from, the model and the quantisation; whatever of
them changes makes another entry. It is restored straight to its shardings, by orbax, and checked
against the fingerprint that it was written with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.models.tensor_files import read_json, write_json
from lorax_ft.quantization import QuantizationConfig

PyTree = Any

FORMAT = 1  # raised when an older entry would be misread
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_RECORD = "record.json"  # written last: what has it is whole
logger = logging.getLogger(__name__)


def restore_or_make(
    directory: pathlib.Path,
    like: PyTree,
    make: Callable[[], PyTree],
    fingerprint: Callable[[PyTree], str],
) -> PyTree:
    """The parameters of an entry; where there is none that is whole, those of `make`, then kept.

    `like` has their structure, of `ShapeDtypeStruct`s with shardings.
    """
    is_there = directory.is_dir()
    params = _restore(directory, like, fingerprint) if is_there else None
    if params is None:
        params = make()
        _save(directory, params, fingerprint(params), replace=is_there)
    return params


def source_fingerprint(files: Iterable[pathlib.Path]) -> str:
    """A SHA-256 over each file's name, size, time of change and 64 samples of its bytes.

    The first sample is of the header, with every tensor's name, type and shape. Not the whole of
    the files is read, so a change that keeps the size, the time and all samples is not seen.
    """
    lines = []
    for path in sorted(files):
        stat, digest = path.stat(), hashlib.sha256()
        step = max(_SAMPLE_BYTES, stat.st_size // _SAMPLES)
        with path.open("rb") as file:
            for start in range(0, stat.st_size, step):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        lines.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def entry(
    folder: str | pathlib.Path,
    files: Iterable[pathlib.Path],
    model: Any,
    config: QuantizationConfig,
    *rest: Any,
) -> pathlib.Path:
    """Where in the folder is what files become as that model, so quantised; `rest` tells it too."""
    source = source_fingerprint(files)
    key = json.dumps([FORMAT, source, repr(model), dataclasses.asdict(config), repr(rest)])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return pathlib.Path(folder).expanduser().absolute() / name


def _restore(directory: pathlib.Path, like: PyTree, fingerprint: Callable[[PyTree], str]) -> PyTree:
    """The parameters of an entry; None and a warning for a broken one."""
    import orbax.checkpoint as ocp

    try:
        record = read_json(directory / _RECORD)
        with ocp.StandardCheckpointer() as reader:
            arrays = reader.restore(directory / "arrays", trees.flatten_arrays(like))
        params = jax.tree_util.tree_map_with_path(
            lambda path, _: _as_read(arrays.pop(trees.path_name(path))), like
        )
        if fingerprint(params) != record["fingerprint"]:
            raise ValueError("its arrays do not have the fingerprint they were written with")
    except Exception as error:  # whatever a damaged file makes of orbax and tensorstore
        first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        logger.warning("The quantised weights in %s are made anew: %s", directory, first_line)
        return None
    return params


def _as_read(array: jax.Array) -> jax.Array:
    """An array that no sharding was asked for, free to go to any device as one from a file is."""
    if isinstance(array.sharding, jax.sharding.SingleDeviceSharding):
        return jnp.asarray(np.asarray(array))
    return array


def _save(directory: pathlib.Path, params: PyTree, fingerprint: str, *, replace: bool) -> None:
    """Writes an entry, in place of a broken one where `replace`, under a name of its own until it
    is whole. A disk that is full is a warning in the log.

    Another program may make the same entry at the same time: the first that is whole is kept.
    """
    import orbax.checkpoint as ocp

    is_first = jax.process_index() == 0
    temporary = directory.with_name(f".{directory.name}.{_token()}.tmp")
    broken = temporary.with_suffix(".broken")
    try:
        if is_first:
            temporary.mkdir(parents=True)
        with ocp.StandardCheckpointer() as writer:
            writer.save(temporary / "arrays", trees.flatten_arrays(params))
        if is_first:
            write_json(temporary / _RECORD, {"fingerprint": fingerprint, "format": FORMAT})
            if replace:
                directory.rename(broken)
            _install(temporary, directory)
    except (OSError, ValueError) as error:
        logger.warning("The quantised weights could not be kept in %s: %s", directory, error)
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(broken, ignore_errors=True)


def _install(temporary: pathlib.Path, directory: pathlib.Path) -> None:
    """Gives an entry its name, if another program has not given it to a whole one."""
    try:
        temporary.rename(directory)
    except OSError:
        if not (directory / _RECORD).exists():
            raise


def _token() -> str:
    """Random, and the same in every process of this program."""
    token = np.uint32(secrets.randbits(32))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        token = multihost_utils.broadcast_one_to_all(token)
    return f"{int(token):08x}"
