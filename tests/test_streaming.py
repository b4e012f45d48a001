"""Weights go tensor by tensor, slice by slice, from files to quantised arrays on a mesh."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_ft import models
from lorax_ft.models import LlamaConfig, quantized_cache, tensor_files
from lorax_ft.quantization import QuantizationConfig, encoding, int8, quantize
from lorax_ft.training import MeshConfig, make_mesh, shardings

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40}
CONFIG = LlamaConfig(  # three blocks of 64 rows into `down`, so that two devices cut one of them
    **SIZES, intermediate_size=192, num_key_value_heads=2, max_position_embeddings=16
)
KINDS = {
    "nf4": QuantizationConfig(),
    "plain_nf4": QuantizationConfig(double_quantization=False),
    "flat_fp4": QuantizationConfig(kind="fp4", block_size=256),
    "int8": QuantizationConfig(kind="int8"),
    "unquantised": None,
}
MESH = MeshConfig(data=2, fsdp=2, tensor=2)  # four parts of a kernel, each on two devices
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "model"
    model = models.build(CONFIG, task="causal_lm")
    models.save(folder, model, model.init(jax.random.key(0)), max_shard_bytes=150_000)
    return folder


@pytest.fixture(scope="module")
def whole(directory):
    _, params = models.load(directory)
    return params


@pytest.fixture(scope="module")
def four_bit(directory, whole, tmp_path_factory):
    """Directories of the model in bitsandbytes' four bits, by kind."""
    model, folder = models.build(CONFIG, task="causal_lm"), tmp_path_factory.mktemp("four_bit")
    for kind in ("nf4", "plain_nf4", "flat_fp4"):
        models.save(folder / kind, model, quantize(whole, KINDS[kind]))
    return folder


@pytest.fixture
def read_sizes(monkeypatch):
    """Sizes of what is read of each tensor, by name."""
    read, sizes = tensor_files.TensorFiles.read, {}

    def counting(self, name, *args, **options):
        array = read(self, name, *args, **options)
        sizes.setdefault(name, []).append(array.size)
        return array

    monkeypatch.setattr(tensor_files.TensorFiles, "read", counting)
    return sizes


def on_mesh(params):
    return shardings(params, make_mesh(MESH))


def assert_same_bits(found, expected, *, placed=False):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
    if placed:
        wanted = jax.tree.leaves(on_mesh(expected))
        assert [array.sharding for array in jax.tree.leaves(found)] == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_whole_then_quantised_and_each_device_has_its_slice(directory, whole, kind):
    config = KINDS[kind]
    expected = whole if config is None else quantize(whole, config)

    assert_same_bits(models.load(directory, quantization=config)[1], expected)
    _, found = models.load(directory, quantization=config, shardings=on_mesh)

    assert_same_bits(found, expected, placed=True)
    if kind == "int8":
        assert models.fingerprint(found) == models.fingerprint(expected)


@pytest.mark.parametrize("kind", ["nf4", "plain_nf4", "flat_fp4"])
def test_a_checkpoint_in_four_bits_is_placed_with_its_own_bits(four_bit, whole, kind):
    _, found = models.load(four_bit / kind, shardings=on_mesh)
    assert_same_bits(found, quantize(whole, KINDS[kind]), placed=True)


def test_unrolled_layers_and_narrow_parameters_stream_alike(directory):
    options = {"scan_layers": False, "param_dtype": "bfloat16"}
    _, whole = models.load(directory, **options)
    _, found = models.load(directory, quantization=KINDS["nf4"], shardings=on_mesh, **options)
    assert_same_bits(found, quantize(whole, KINDS["nf4"]), placed=True)


@pytest.mark.parametrize("kind", ["nf4", "int8", "unquantised"])
def test_no_slice_of_a_kernel_is_read_twice_or_in_full(directory, read_sizes, kind):
    models.load(directory, quantization=KINDS[kind], shardings=on_mesh)
    assert read_sizes[O_PROJ] == [128 * 128 // 4] * 4  # copies on other devices are not read again


PROCESS = """
import os, sys
folder, cache, port, index = *sys.argv[1:4], int(sys.argv[4])
from tests.compilers import xla_flags
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=2)}
import jax
jax.distributed.initialize("localhost:" + port, num_processes=2, process_id=index)
from lorax_ft import models, training
from lorax_ft.models import tensor_files
from lorax_ft.quantization import QuantizationConfig

read, sizes = tensor_files.TensorFiles.read, []
def counting(self, name, *args, **options):
    array = read(self, name, *args, **options)
    if name == "model.layers.1.self_attn.o_proj.weight":
        sizes.append(array.size)
    return array

tensor_files.TensorFiles.read = counting
mesh = training.make_mesh(training.MeshConfig(fsdp=2, tensor=2))
for start in range(2):
    _, params = models.load(
        folder,
        quantization=QuantizationConfig(),
        shardings=lambda params: training.shardings(params, mesh),
        cache=cache,
    )
    print("RESULT", models.fingerprint(params), sizes)
"""


def test_two_processes_read_half_each_and_share_a_cache(directory, whole, tmp_path):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, directory, tmp_path / "cache", port, str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]

    fingerprint = models.fingerprint(quantize(whole, KINDS["nf4"]))
    for output in outputs:
        lines = [line for line in output.splitlines() if line.startswith("RESULT")]
        assert lines == [f"RESULT {fingerprint} {[128 * 128 // 4] * 2}"] * 2  # none the second time


def test_a_checkpoint_in_four_bits_is_read_by_slices_too(four_bit, read_sizes):
    models.load(four_bit / "nf4", shardings=on_mesh)
    assert read_sizes[O_PROJ] == [128 * 128 // 2 // 4] * 4
    assert read_sizes[f"{O_PROJ}.absmax"] == [128 * 128 // 64 // 4] * 4


def test_four_bits_whose_shape_is_not_that_of_their_codes_raise_on_a_mesh_too(four_bit, tmp_path):
    folder = shutil.copytree(four_bit / "nf4", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {O_PROJ: tensors[O_PROJ][:-8]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"o_proj\.weight"):
        models.load(folder, shardings=on_mesh)


@pytest.mark.parametrize(("kind", "placement"), [("nf4", None), ("int8", None), ("int8", on_mesh)])
def test_host_memory_stays_under_two_tensors_above_what_is_kept(
    tmp_path, monkeypatch, kind, placement
):
    for module in (encoding, int8):
        monkeypatch.setattr(module, "_CHUNK", 1 << 12)
    config = dataclasses.replace(CONFIG, hidden_size=512, intermediate_size=1024)
    model = models.build(config, task="causal_lm")
    models.save(tmp_path / "model", model, model.init(jax.random.key(0)))
    tensor = 512 * 1024 * 4
    options = {"quantization": dataclasses.replace(KINDS[kind], targets=r".*kernel")}
    options["shardings"] = placement
    models.load(tmp_path / "model", **options)  # modules imported, writers compiled
    tracemalloc.start()
    loaded = models.load(tmp_path / "model", **options)
    kept, peak = tracemalloc.get_traced_memory()  # JAX's arrays may lie where NumPy's did
    tracemalloc.stop()
    del loaded
    assert kept < tensor < peak < kept + 2 * tensor


# --- The cache of quantised weights ---------------------------------------------------------------


@pytest.fixture
def cached(directory, tmp_path):
    """Parameters in NF4, and the options that load them from the cache."""
    options = {"quantization": KINDS["nf4"], "cache": tmp_path / "cache"}
    return models.load(directory, **options)[1], options


@pytest.mark.parametrize("placement", [None, on_mesh])
def test_a_second_start_reads_no_weights_and_has_the_same_bits_where_they_belong(
    directory, cached, read_sizes, placement
):
    first, options = cached

    _, again = models.load(directory, shardings=placement, **options)

    assert not read_sizes
    assert_same_bits(again, first, placed=placement is not None)
    assert all(array.committed == bool(placement) for array in jax.tree.leaves(again))


def test_programs_that_make_an_entry_at_once_leave_one_that_is_whole(
    directory, tmp_path, monkeypatch, caplog, read_sizes
):
    options = {"quantization": KINDS["nf4"], "cache": tmp_path / "cache"}
    save = quantized_cache._save

    def save_after_another(*args, **kwargs):
        monkeypatch.setattr(quantized_cache, "_save", save)
        models.load(directory, **options)
        save(*args, **kwargs)

    monkeypatch.setattr(quantized_cache, "_save", save_after_another)
    models.load(directory, **options)
    read_sizes.clear()

    models.load(directory, **options)

    assert not read_sizes
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not caplog.text


def test_a_full_disk_leaves_no_entry_and_is_warned_of(directory, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(quantized_cache, "write_json", full)
    models.load(directory, quantization=KINDS["nf4"], cache=tmp_path / "cache")
    assert "could not be kept" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_another_source_setting_or_model_has_an_entry_of_its_own(directory, tmp_path):
    folder, cache = copy(directory, tmp_path), tmp_path / "cache"
    models.load(folder, quantization=KINDS["nf4"], cache=cache)
    models.load(folder, quantization=KINDS["plain_nf4"], cache=cache)
    models.load(folder, quantization=KINDS["nf4"], cache=cache, scan_layers=False)
    assert len(list(cache.iterdir())) == 3
    model, params = models.load(folder)
    shutil.rmtree(folder)
    models.save(folder, model, jax.tree.map(lambda x: 2 * x, params), max_shard_bytes=150_000)
    _, found = models.load(folder, quantization=KINDS["nf4"], cache=cache)
    assert len(list(cache.iterdir())) == 4
    assert models.fingerprint(found) == models.fingerprint(
        models.load(folder, quantization=KINDS["nf4"])[1]
    )


@pytest.mark.parametrize("damage", ["record", "array"])
def test_a_broken_entry_is_made_anew_with_a_warning(directory, cached, tmp_path, caplog, damage):
    first, options = cached
    (entry,) = (tmp_path / "cache").iterdir()
    if damage == "record":
        (entry / "record.json").unlink()
    else:
        largest = max(
            (p for p in (entry / "arrays").rglob("*") if p.is_file()),
            key=lambda p: p.stat().st_size,
        )
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 255
        largest.write_bytes(content)

    _, again = models.load(directory, **options)

    assert models.fingerprint(again) == models.fingerprint(first)
    assert "are made anew" in caplog.text
    caplog.clear()
    models.load(directory, **options)
    assert "are made anew" not in caplog.text


# --- Shards of different versions -----------------------------------------------------------------


def test_a_size_that_the_index_does_not_promise_raises_with_the_files(directory, tmp_path):
    folder = copy(directory, tmp_path)
    edit_index(folder, lambda index: index["metadata"].update(total_size=12345))
    with pytest.raises(ValueError, match=r"12,345 bytes.*different versions.*model-00002-of"):
        models.load(folder)


def test_an_index_from_before_all_weights_were_cast_is_read(directory, tmp_path):
    folder = copy(directory, tmp_path)
    edit_index(folder, lambda i: i["metadata"].update(total_size=i["metadata"]["total_size"] // 2))
    models.load(folder)


def test_a_tensor_that_the_index_does_not_name_raises(directory, tmp_path):
    folder = copy(directory, tmp_path)
    edit_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"'model.norm.weight', which .* does not name"):
        models.load(folder)


def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
