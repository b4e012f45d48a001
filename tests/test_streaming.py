"""Weights go tensor by tensor, slice by slice, from files to quantised arrays on a mesh."""

import dataclasses
import functools
import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from lorax_ft import models
from lorax_ft.models import LlamaConfig, tensor_files
from lorax_ft.quantization import QuantizationConfig, encoding, int8, quantize
from lorax_ft.training import MeshConfig, make_mesh, shardings

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 40}
CONFIG = LlamaConfig(
    **SIZES, intermediate_size=192, num_key_value_heads=2, max_position_embeddings=16
)
KINDS = {
    "nf4": QuantizationConfig(),
    "plain_nf4": QuantizationConfig(double_quantization=False),
    "flat_fp4": QuantizationConfig(kind="fp4", block_size=256),
    "int8": QuantizationConfig(kind="int8"),
    "unquantised": None,
}
MESHES = [None, MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, fsdp=4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "model"
    model = models.build(CONFIG, task="causal_lm")
    models.save(folder, model, model.init(jax.random.key(0)), max_shard_bytes=150_000)
    return folder


def placement(mesh_config):
    if mesh_config is None:
        return None
    return functools.partial(shardings, mesh=make_mesh(mesh_config))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_whole_then_quantised_and_each_device_has_its_slice(directory, kind, mesh):
    config = KINDS[kind]
    _, whole = models.load(directory)
    expected = whole if config is None else quantize(whole, config)

    _, found = models.load(directory, quantization=config, shardings=placement(mesh))

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
    if mesh is not None:
        wanted = shardings(expected, make_mesh(mesh))
        for array, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            assert array.sharding == sharding
    assert models.fingerprint(found) == models.fingerprint(expected)


def test_unrolled_layers_and_narrow_parameters_stream_alike(directory):
    options = {"scan_layers": False, "param_dtype": "bfloat16"}
    _, whole = models.load(directory, **options)
    _, found = models.load(
        directory,
        quantization=KINDS["nf4"],
        shardings=placement(MeshConfig(fsdp=2, tensor=2)),
        **options,
    )
    expected = quantize(whole, KINDS["nf4"])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


def test_no_slice_of_a_kernel_is_read_twice_or_in_full(directory, monkeypatch):
    """Two devices of eight: a stand-in for what one of several processes would read."""
    read, sizes = tensor_files.TensorFiles.read, {}

    def counting(self, name, index=()):
        array = read(self, name, index)
        sizes.setdefault(name, []).append(array.size)
        return array

    monkeypatch.setattr(tensor_files.TensorFiles, "read", counting)
    models.load(directory, quantization=KINDS["nf4"], shardings=placement(MESHES[1]))

    name = "model.layers.1.self_attn.o_proj.weight"
    assert sizes[name] == [128 * 128 // 4] * 4  # copies on other devices are not read again


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_host_memory_stays_under_two_tensors_above_what_is_kept(tmp_path, monkeypatch, kind):
    for module in (encoding, int8):
        monkeypatch.setattr(module, "_CHUNK", 1 << 12)
    config = dataclasses.replace(CONFIG, hidden_size=512, intermediate_size=1024)
    model = models.build(config, task="causal_lm")
    models.save(tmp_path / "model", model, model.init(jax.random.key(0)))
    tensor = 512 * 1024 * 4
    options = {"quantization": dataclasses.replace(KINDS[kind], targets=r".*mlp/.*kernel")}
    models.load(tmp_path / "model", **options)  # modules imported, writers compiled
    tracemalloc.start()
    models.load(tmp_path / "model", **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensor < peak < 2 * tensor


# --- The cache of quantised weights ---------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_a_second_start_reads_no_weights_and_has_the_same_bits_where_they_belong(
    directory, tmp_path, monkeypatch, mesh
):
    options = {"quantization": KINDS["nf4"], "cache": tmp_path / "cache"}
    _, first = models.load(directory, **options)
    monkeypatch.setattr(tensor_files.TensorFiles, "read", never)

    _, again = models.load(directory, shardings=placement(mesh), **options)

    assert jax.tree.structure(again) == jax.tree.structure(first)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(first)))
    if mesh is not None:
        wanted = jax.tree.leaves(shardings(first, make_mesh(mesh)))
        assert [array.sharding for array in jax.tree.leaves(again)] == wanted


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
def test_a_broken_entry_is_made_anew_with_a_warning(directory, tmp_path, caplog, damage):
    options = {"quantization": KINDS["nf4"], "cache": tmp_path / "cache"}
    _, first = models.load(directory, **options)
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


def never(self, name, index=()):
    raise AssertionError(f"{name} was read")


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
