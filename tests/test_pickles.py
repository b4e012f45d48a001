"""Files of torch.save are read without torch: tensors and plain containers, and nothing is run."""

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest

from lorax_ft.interop import read_torch

NUMBERS = np.arange(12, dtype=np.float32)


class Storage:
    """Stands for a storage of `numbers` in what is pickled here, named as torch names it."""

    def __init__(self, name="0", kind="FloatStorage", size=12):
        self.pid = ("storage", Name("torch", kind), name, "cuda:0", size)


class Name:
    """A module's name, which a pickle looks up."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """A call that a pickle makes."""

    def __init__(self, module, name, *arguments):
        self.function, self.arguments = Name(module, name), arguments

    def __reduce__(self):
        return self.function, self.arguments


class Pickler(pickle._Pickler):  # the one in Python can write names of what is not imported
    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def tensor(storage=None, offset=0, shape=(3, 4), strides=(4, 1)):
    arguments = (storage or Storage(), offset, shape, strides, False, collections.OrderedDict())
    return Call("torch._utils", "_rebuild_tensor_v2", *arguments)


@pytest.fixture
def saved(tmp_path):
    """Writes a file as torch.save does, of `value` and the bytes of storages."""

    def write(value, storages=None, raw=None, compression=zipfile.ZIP_STORED):
        text = io.BytesIO()
        Pickler(text, protocol=2).dump(value)
        path = tmp_path / "file.bin"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", text.getvalue() if raw is None else raw)
            archive.writestr("archive/byteorder", "little")
            for name, content in (storages or {"0": NUMBERS.tobytes()}).items():
                archive.writestr(f"archive/data/{name}", content)
        return path

    return write


def test_tensors_of_any_strides_in_plain_containers_are_read(saved):
    state = collections.OrderedDict(
        plain=tensor(),
        turned=tensor(shape=(4, 3), strides=(1, 4)),
        part=tensor(offset=5, shape=(2,), strides=(3,)),
        number=tensor(offset=11, shape=(), strides=()),
        none=tensor(offset=12, shape=(0, 7), strides=(7, 1)),
        parameter=Call("torch._utils", "_rebuild_parameter", tensor(), True, None),
        other=[1, (2.5, "text", None), {"deep": tensor(shape=(12,), strides=(1,))}],
    )
    found = read_torch(saved(state))

    np.testing.assert_array_equal(found["plain"], NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(found["turned"], NUMBERS.reshape(3, 4).T)
    np.testing.assert_array_equal(found["part"], [5, 8])
    assert found["number"] == 11
    assert found["none"].shape == (0, 7)
    np.testing.assert_array_equal(found["parameter"], found["plain"])
    assert found["other"][:2] == [1, (2.5, "text", None)]
    np.testing.assert_array_equal(found["other"][2]["deep"], NUMBERS)


def test_every_storage_type_has_its_numbers(saved):
    import ml_dtypes

    kinds = {"DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64}
    kinds |= {"BFloat16Storage": ml_dtypes.bfloat16, "ByteStorage": np.uint8}
    for kind, dtype in kinds.items():
        numbers = np.arange(12).astype(dtype)
        found = read_torch(saved(tensor(Storage(kind=kind)), {"0": numbers.tobytes()}))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, numbers.reshape(3, 4))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("no.such.module", "function"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("collections", "OrderedDict.fromkeys"),
        ("lorax_ft.interop.pickles", "os.system"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_calls_anything_else_is_refused_and_runs_nothing(
    saved, tmp_path, module, name, inside
):
    mark = tmp_path / "executed"
    call = Call(module, name, f"touch {mark}")
    path = saved({"weight": tensor(), "bad": call} if inside else call)

    with pytest.raises(ValueError, match=rf"nothing of it was run.* asks for {module}.{name}"):
        read_torch(path)
    assert not mark.exists()


def test_names_are_refused_by_whatever_instruction_a_pickle_looks_them_up(saved):
    by_stack = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R."
    by_instance = b"(S'id'\nios\nsystem\n."
    for raw in (by_stack, by_instance):
        with pytest.raises(ValueError, match=r"asks for os\.system"):
            read_torch(saved(None, raw=raw))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor(offset=1), r"shape \[3, 4\] reaches beyond its storage '0' of 12"),
        (tensor(strides=(5, 1)), "reaches beyond its storage"),
        (tensor(shape=(1 << 40, 1 << 20), strides=(0, 0)), "reaches beyond its storage"),
        (tensor(offset=-4), "offset, shape or strides are none"),
        (tensor(strides=(-4, 1)), "offset, shape or strides are none"),
        (tensor(shape=(3,)), r"the shape \(3,\) but the strides \(4, 1\)"),
        (tensor(shape=("a", "b")), "offset, shape or strides are none"),
        (tensor(Storage(size=13), shape=(13,), strides=(1,)), "48 bytes, not those of 13 numbers"),
        (tensor(Storage(name="../0")), r"lacks the storage '\.\./0'"),
        (tensor(Storage(kind="QInt8Storage")), "asks for torch.QInt8Storage"),
        ({tensor(): 1}, "has a _Tensor as a key"),
        ([Storage()], "holds a _Storage"),
        (1 + 2j, "asks for builtins.complex|asks for __builtin__.complex"),
        ({1, 2}, "asks for builtins.set|asks for __builtin__.set"),
    ],
)
def test_what_is_no_tensor_within_its_storage_is_refused(saved, value, message):
    with pytest.raises(ValueError, match=message):
        read_torch(saved(value))


def test_a_damaged_compressed_or_older_file_is_named(saved, tmp_path):
    path = saved([tensor()], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"file\.bin is not read.*is compressed"):
        read_torch(path)
    path = saved(None, raw=b"\x80\x02]q\x00")
    with pytest.raises(ValueError, match=r"file\.bin is damaged"):
        read_torch(path)
    content = saved([tensor()]).read_bytes()
    for broken in (content[:-30], pickle.dumps({"weight": 1})):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is no zip archive"):
            read_torch(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_torch(tmp_path / "nowhere.bin")


def test_what_a_pickle_does_to_what_it_was_given_does_not_last(saved):
    spoil = b"\x80\x02ctorch\nFloatStorage\n}(S'dtype'\nS'int8'\nub."
    with pytest.raises(ValueError, match="damaged"):
        read_torch(saved(None, raw=spoil))

    np.testing.assert_array_equal(read_torch(saved([tensor()]))[0], NUMBERS.reshape(3, 4))
