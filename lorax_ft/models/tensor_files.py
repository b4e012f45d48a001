"""Directories of safetensors files, read tensor by tensor, and written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # as transformers cuts them, but for its newer, larger default

_DTYPES: Mapping[str, Any] = {
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(bool),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFiles:
    """The tensors of a directory; each is read from its memory-mapped file when it is asked for."""

    file_of: Mapping[str, pathlib.Path]  # by tensor name
    handles: Mapping[pathlib.Path, Any]

    four_bit: ClassVar[Collection[str]] = ()  # all that `read` gives are arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handles[self.file_of[name]].get_slice(name).get_shape())

    def read(
        self,
        name: str,
        index: tuple[slice, ...] = (),
        *,
        shape: tuple[int, ...] | None = None,
        dtype: Any = None,
    ) -> np.ndarray:
        """The tensor, or that slice of it, as a copy: the file's pages are let go of at once.

        `shape` and `dtype` are others that its bytes are seen in. Raises ValueError where they do
        not fit.
        """
        path = self.file_of[name]
        start, entries = _header(path)
        entry = entries[name]
        first, end = entry["data_offsets"]
        own_dtype = _DTYPES.get(entry["dtype"])
        if own_dtype is None:
            raise ValueError(f"{path}: the tensor {name!r} has dtype {entry['dtype']}.")
        dtype = own_dtype if dtype is None else dtype
        shape = tuple(entry["shape"]) if shape is None else shape
        if first == end:
            return np.empty(shape, dtype)[index]
        data = np.memmap(path, np.uint8, mode="r", offset=start + first, shape=(end - first,))
        return np.array(data.view(dtype).reshape(shape)[index])


@contextlib.contextmanager
def open_tensors(directory: pathlib.Path) -> Iterator[TensorFiles]:
    """Opens every file of a safetensors checkpoint.

    Raises FileNotFoundError where there is none or a shard is missing, and ValueError for a damaged
    file and for an index that does not fit the files, in names or in bytes.
    """
    paths, promised = _files(directory)
    with contextlib.ExitStack() as stack:
        handles, file_of = {}, {}
        for path in paths:
            handles[path] = stack.enter_context(_open(path))
            for name in handles[path].keys():  # noqa: SIM118 - not a dictionary
                if name in file_of:
                    raise ValueError(f"The tensor {name!r} is in {file_of[name]} and in {path}.")
                file_of[name] = path
        for name, path in promised.items():
            if file_of.get(name) != path:
                raise ValueError(
                    f"{directory / INDEX_FILE} says that {name!r} is in {path.name}, but it is "
                    "not: the files are of different versions."
                )
        if promised:
            _check_versions(directory / INDEX_FILE, file_of, promised)
        yield TensorFiles(file_of=file_of, handles=handles)


def _files(directory: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, pathlib.Path]]:
    """The files of a checkpoint, and which tensors an index promises in them."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return [single], {}
    if not index.exists():
        raise FileNotFoundError(_nothing_there(directory))
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map that says which tensor is in which file.")
    promised = {}
    for name, shard in shards.items():
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f"{index}: the file {shard!r} of {name!r} is not in the directory.")
        promised[name] = directory / shard
    paths = sorted(set(promised.values()))
    if missing := [path.name for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"{directory} lacks {len(missing)} of the {len(paths)} files that {INDEX_FILE} names: "
            f"{', '.join(missing)}."
        )
    return paths, promised


def _check_versions(
    index: pathlib.Path,
    file_of: Mapping[str, pathlib.Path],
    promised: Mapping[str, pathlib.Path],
) -> None:
    """Raises ValueError where shards hold more than their index says, or other sizes of it.

    An index may count the weights in another precision than all its files have: it was written
    before they were cast.
    """
    if unnamed := sorted(set(file_of) - set(promised)):
        raise ValueError(
            f"{file_of[unnamed[0]]} holds {unnamed[0]!r}, which {index.name} does not name: the "
            "files are of different versions."
        )
    total = (read_json(index).get("metadata") or {}).get("total_size")
    paths = sorted(set(file_of.values()))
    sizes = {path: path.stat().st_size - _header(path)[0] for path in paths}
    if total is None or total == sum(sizes.values()):
        return
    entries = [_header(path)[1][name] for name, path in file_of.items()]
    count = sum(math.prod(entry["shape"]) for entry in entries)
    if len({entry["dtype"] for entry in entries}) == 1 and total in (2 * count, 4 * count):
        return
    written = index.stat().st_mtime
    files = ", ".join(
        f"{path.name} ({size:,} bytes{', newer' if path.stat().st_mtime > written else ''})"
        for path, size in sizes.items()
    )
    raise ValueError(
        f"{index} says that the tensors have {total:,} bytes, but they have "
        f"{sum(sizes.values()):,}: the files are of different versions. They are {files}; newer "
        "is what was written after the index. Fetch all of them again."
    )


def _header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Where the data of an opened, so whole, file begins, and what is said of each tensor."""
    stat = path.stat()
    return _parsed_header(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _parsed_header(path: pathlib.Path, size: int, mtime_ns: int) -> tuple[int, dict[str, Any]]:
    del size, mtime_ns  # a file that was written anew is read anew
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def _nothing_there(directory: pathlib.Path) -> str:
    message = f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}."
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        message += (
            f" It has {', '.join(pickles)}: pickles can run any program when they are read, so "
            "they never are here. Where you trust them, load the model in transformers and call "
            "save_pretrained, which writes safetensors."
        )
    return message


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}, of {path.stat().st_size} bytes, is damaged or cut short: {error}."
        ) from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError for a damaged file, naming it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{path} is no JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object but a {type(content).__name__}.")
    return content


# --- Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write to, that becomes `directory` when all is written, and is gone if not.

    Raises ValueError where `directory` exists and is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty: nothing is overwritten.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent)
    )
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's is for the owner alone
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tensors(
    directory: pathlib.Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors as one file, or as shards with an index; one shard is in memory at a time.

    Args:
        sizes: each tensor's bytes by name.
        read: gives a tensor by name.

    Raises OSError where the disk is full.
    """
    shards = _shards(sizes, max_shard_bytes)
    file_of = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else file
        # The format stores plain bytes: an array that is a transposed view must be laid out first.
        arrays = {name: np.ascontiguousarray(read(name)) for name in names}
        try:
            safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk, among others
            raise OSError(f"{file} could not be written to {directory.parent}: {error}") from None
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        write_json(directory / INDEX_FILE, index)


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object as transformers does: two spaces, sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
