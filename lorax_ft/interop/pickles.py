"""Files of `torch.save`, read without torch and without running anything that they hold.

Such a file is a zip archive of one pickle and the bytes of each storage. A pickle is a program: it
may name any function and call it. Here it may name what makes tensors and ordered dictionaries,
and these names stand for records of our own, so that the worst it can do is not to be read.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pathlib
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
"""What the elements of each of torch's storage types are."""

_PLAIN = (str, bytes, bool, int, float, type(None))
_MAX_PICKLE_BYTES = 1 << 28  # the names and shapes of tensors, without their numbers


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote: numpy arrays where there were tensors, in plain containers.

    Tensors, numbers, texts, lists, tuples, dictionaries and ordered dictionaries of these are
    read, and nothing of the file is run. Raises FileNotFoundError where there is no file, and
    ValueError naming it for a pickle that asks for anything else, for tensors that reach beyond
    their storage, and for a file that is damaged or of torch before 1.6.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no zip archive, so torch 1.6 or newer did not write it, or it is cut "
            "short. If you trust it, load it in torch and save it anew."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive).read()
    except _Refused as error:
        raise ValueError(f"{path} is not read, and nothing of it was run: {error}.") from None
    except Exception as error:  # a damaged pickle or archive may raise any
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


class _Refused(Exception):
    """What is said of a file that is whole, but holds what is not read."""


class _Storage(NamedTuple):
    """A storage that the pickle speaks of."""

    name: str  # of its file in the archive
    dtype: str  # a key of DTYPES
    size: int


class _Tensor(NamedTuple):
    """A view of a storage. Tuples cannot be altered by what a pickle does to them later."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *unread: Any) -> _Tensor:
    """Stands for `torch._utils._rebuild_tensor_v2`; gradients and hooks are left unread."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _Refused("a tensor's storage, offset, shape or strides are none")
    if len(shape) != len(strides):
        raise _Refused(f"a tensor has the shape {shape} but the strides {strides}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *unread: Any) -> Any:
    """Stands for `torch._utils._rebuild_parameter`."""
    return data


NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): name for name in DTYPES},
}
"""All that a pickle may name, and what it gets for it."""


class _Unpickler(pickle.Unpickler):
    """Gives a pickle the names of NAMES and no others."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in NAMES:
            raise _Refused(f"its pickle asks for {module}.{name}, which is no tensor")
        return NAMES[module, name]

    def persistent_load(self, pid: Any, /) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(name), _, int(size)) if dtype in DTYPES and size >= 0:
                return _Storage(name, dtype, size)
        raise _Refused(f"its pickle speaks of {str(pid)[:100]!r}, which is no storage")


class _Archive:
    """An open zip archive, and the storages that were read from it."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.storages: dict[_Storage, np.ndarray] = {}
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _Refused("the archive does not hold one data.pkl, as those of torch.save do")
        self.folder = pickles[0].removesuffix("data.pkl")

    def read(self) -> Any:
        if self._has("byteorder") and self._bytes("byteorder") != b"little":
            raise _Refused("its numbers are not little-endian")
        text = self._bytes("data.pkl", limit=_MAX_PICKLE_BYTES)
        return self._arrays(_Unpickler(io.BytesIO(text)).load())

    def _arrays(self, value: Any) -> Any:
        """The value with arrays for tensors, all of it of plain types."""
        if isinstance(value, _Tensor):
            return self._array(value)
        if isinstance(value, dict):
            if bad := next((key for key in value if not isinstance(key, _PLAIN)), None):
                raise _Refused(f"a dictionary has a {type(bad).__name__} as a key")
            return {key: self._arrays(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._arrays(item) for item in value)
        if type(value) not in _PLAIN:
            raise _Refused(f"it holds a {type(value).__name__}")
        return value

    def _array(self, tensor: _Tensor) -> np.ndarray:
        storage, count = tensor.storage, math.prod(tensor.shape)
        steps = zip(tensor.shape, tensor.strides)
        last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
        if count > storage.size or (count and last >= storage.size):
            raise _Refused(
                f"a tensor of shape {list(tensor.shape)} reaches beyond its storage "
                f"{storage.name!r} of {storage.size} numbers"
            )
        if storage not in self.storages:
            self.storages[storage] = self._numbers(storage)
        numbers = self.storages[storage]
        strides = [stride * numbers.itemsize for stride in tensor.strides]
        # a view: many tensors on one storage take no more memory than it
        return np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, strides, writeable=False
        )

    def _numbers(self, storage: _Storage) -> np.ndarray:
        dtype = np.dtype(DTYPES[storage.dtype])
        if not self._has(f"data/{storage.name}"):
            raise _Refused(f"the archive lacks the storage {storage.name!r}")
        content = self._bytes(f"data/{storage.name}")
        if len(content) != storage.size * dtype.itemsize:
            raise _Refused(
                f"the storage {storage.name!r} has {len(content)} bytes, not those of "
                f"{storage.size} numbers of {dtype}"
            )
        return np.frombuffer(content, dtype)

    def _has(self, name: str) -> bool:
        return self.folder + name in self.archive.NameToInfo

    def _bytes(self, name: str, limit: int | None = None) -> bytes:
        info = self.archive.getinfo(self.folder + name)
        # torch compresses nothing, so that what is read is no more than the file
        if info.compress_type != zipfile.ZIP_STORED or (limit and info.file_size > limit):
            raise _Refused(f"{name} is compressed or of {info.file_size} bytes")
        return self.archive.read(info)
