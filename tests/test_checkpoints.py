"""Checkpoints: what was saved comes back, to its own run only, and damage is passed over."""

import dataclasses
import gc
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest

from lorax_ft import trees
from lorax_ft.training import checkpoints
from lorax_ft.training.checkpoints import Identity, Snapshot, open_store
from lorax_ft.training.optimizers import OptimizerConfig, build_optimizer
from lorax_ft.training.sharding import MeshConfig, make_mesh, replicate, shard

# orbax leaves unfinished coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning"
)

IDENTITY = Identity(config="rank: 8\nlearning_rate: 0.1", base="sha256:aaa")
TX = build_optimizer(OptimizerConfig(), total_steps=10)


@pytest.fixture(autouse=True)
def _coroutines_are_collected_here():
    yield
    gc.collect()


def params_at(step: int):
    return {
        "layers": {"up": {"kernel": jnp.arange(64.0).reshape(2, 8, 4) + step, "bias": jnp.ones(4)}},
        # large and random: its bytes lie in a file of their own, as they are
        "large": {"scale": jax.random.normal(jax.random.key(step), (64, 64))},
        "half": {"scale": jnp.full(3, step, jnp.bfloat16)},
        "frozen": {"bias": jnp.ones(2)},
    }


def snapshot_at(step: int) -> Snapshot:
    train, _ = trees.partition(params_at(step), ("layers/.*", "large/.*", "half/.*"))
    return Snapshot(
        step=step,
        train=train,
        opt_state=TX.init(train),
        key=jax.random.key(7),
        data={"epoch": 1, "position": step},
        progress={"nonfinite": 2, "best_value": 0.5},
    )


def save_steps(directory, *steps: int, scores=None, **options) -> list[int]:
    with open_store(directory, IDENTITY, **options) as store:
        for step in steps:
            checkpoints.save(store, snapshot_at(step), (scores or {}).get(step))
        checkpoints.wait(store)
        return checkpoints.steps(store)


def restore_last(directory, identity=IDENTITY, **options):
    like = snapshot_at(0)
    with open_store(directory, identity) as store:
        return checkpoints.restore(store, like.train, like.opt_state, **options)


def assert_same(found: Snapshot, wanted: Snapshot):
    chex.assert_trees_all_equal_structs(found.train, wanted.train)
    chex.assert_trees_all_equal((found.train, found.opt_state), (wanted.train, wanted.opt_state))
    assert jnp.array_equal(jax.random.key_data(found.key), jax.random.key_data(wanted.key))
    for field in ("step", "data", "progress"):
        assert getattr(found, field) == getattr(wanted, field)


def data_files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """The files of the trained arrays, largest first."""
    files = [f for f in (checkpoint / "train").rglob("*") if f.is_file() and f.parent.name == "d"]
    return sorted(files, key=lambda f: -f.stat().st_size)


def test_what_was_saved_comes_back(tmp_path):
    save_steps(tmp_path, 3)

    assert_same(restore_last(tmp_path), snapshot_at(3))


def test_a_directory_without_checkpoints_gives_none(tmp_path):
    assert restore_last(tmp_path) is None


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    @jax.jit
    def overwrite(tree):
        return jax.tree.map(lambda x: x * 0 - 1, tree)

    destroy = jax.jit(overwrite, donate_argnums=0)
    with open_store(tmp_path, IDENTITY) as store:
        snapshot = snapshot_at(1)
        checkpoints.save(store, snapshot)
        jax.block_until_ready(destroy((snapshot.train, snapshot.opt_state)))

    assert_same(restore_last(tmp_path), snapshot_at(1))


def test_the_trainable_half_can_be_read_without_the_optimizer(tmp_path):
    save_steps(tmp_path, 3)

    with open_store(tmp_path, IDENTITY, read_only=True) as store:
        found = checkpoints.restore(store, snapshot_at(0).train)

    assert found.opt_state is None
    chex.assert_trees_all_equal(found.train, snapshot_at(3).train)


@pytest.mark.parametrize("saved_on", [MeshConfig(fsdp=4, tensor=2), MeshConfig()])
def test_a_checkpoint_goes_onto_another_mesh(tmp_path, saved_on):
    def on(config: MeshConfig, step: int) -> Snapshot:
        mesh = make_mesh(config)
        snapshot = snapshot_at(step)
        train, _ = trees.partition(
            shard(params_at(step), mesh), ("layers/.*", "large/.*", "half/.*")
        )
        opt_state = replicate(TX.init(train), mesh)
        return dataclasses.replace(snapshot, train=train, opt_state=opt_state)

    with open_store(tmp_path, IDENTITY) as store:
        checkpoints.save(store, on(saved_on, 3))

    like = on(MeshConfig(data=2, fsdp=2, tensor=2), 0)
    with open_store(tmp_path, IDENTITY) as store:
        found = checkpoints.restore(store, like.train, like.opt_state)

    assert_same(found, snapshot_at(3))
    assert jax.tree.map(lambda x: x.sharding, found.train) == jax.tree.map(
        lambda x: x.sharding, like.train
    )


def test_the_last_and_the_best_are_kept(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 5: 0.2, 6: float("nan")}

    kept = save_steps(tmp_path, *range(1, 8), scores=scores, keep_last=2, keep_best=2)

    assert kept == [2, 3, 6, 7]


def test_scores_are_remembered_over_a_restart(tmp_path):
    save_steps(tmp_path, 1, 2, scores={1: 0.9, 2: 0.1}, keep_last=1, keep_best=1)

    kept = save_steps(tmp_path, 3, 4, scores={3: 0.5}, keep_last=1, keep_best=1)

    assert kept == [1, 4]


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path):
    save_steps(tmp_path, 1)

    save_steps(tmp_path, 1, scores={1: 0.5})

    with open_store(tmp_path, IDENTITY) as store:
        assert store.scores == {1: 0.5}


def test_a_checkpoint_of_other_base_weights_is_refused_naming_both(tmp_path):
    save_steps(tmp_path, 1)

    with pytest.raises(ValueError, match=r"base weights sha256:aaa, but this run's are sha256:bbb"):
        restore_last(tmp_path, Identity(config=IDENTITY.config, base="sha256:bbb"))


def test_a_checkpoint_of_another_config_is_refused_showing_what_differs(tmp_path):
    save_steps(tmp_path, 1)
    other = Identity(config="rank: 16\nlearning_rate: 0.1", base=IDENTITY.base)

    with pytest.raises(ValueError, match=r"-rank: 8\n  \+rank: 16\n") as raised:
        restore_last(tmp_path, other)

    assert "learning_rate" not in str(raised.value)


def test_a_checkpoint_of_other_parameters_is_refused_naming_them(tmp_path):
    save_steps(tmp_path, 1)
    like = jax.tree.map(lambda x: x[..., :2], snapshot_at(0).train)

    with (
        open_store(tmp_path, IDENTITY) as store,
        pytest.raises(
            ValueError, match=r"layers/up/kernel: saved float32\[2,8,4\], wanted .*2,8,2"
        ),
    ):
        checkpoints.restore(store, like)


def flip_a_bit(checkpoint: pathlib.Path):
    """In the middle of the largest file, so in an array's data."""
    path = data_files(checkpoint)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut_short(checkpoint: pathlib.Path):
    path = data_files(checkpoint)[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def lose_a_file(checkpoint: pathlib.Path):
    data_files(checkpoint)[0].unlink()


def lose_the_record(checkpoint: pathlib.Path):
    shutil.rmtree(checkpoint / "record")


def garble_the_record(checkpoint: pathlib.Path):
    (checkpoint / "record" / "metadata").write_text('{"step": 2, "conf')


def lose_all_but_the_folder(checkpoint: pathlib.Path):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def change_a_stored_number(checkpoint: pathlib.Path):
    """As a fault that orbax itself cannot see: the record's checksum no longer fits."""
    path = checkpoint / "record" / "metadata"
    record = json.loads(path.read_text())
    record["checksums"]["train"] ^= 1
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [
    flip_a_bit, cut_short, lose_a_file, lose_the_record, garble_the_record,
    lose_all_but_the_folder, change_a_stored_number,
])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    save_steps(tmp_path, 1, 2)
    damage(tmp_path / "2")

    found = restore_last(tmp_path, set_aside=True)

    assert_same(found, snapshot_at(1))
    assert "Passed over checkpoint 2" in caplog.text
    assert save_steps(tmp_path, 2) == [1, 2]  # its step is free again
    assert (tmp_path / "unreadable-2").is_dir()
    assert_same(restore_last(tmp_path), snapshot_at(2))


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(tmp_path):
    save_steps(tmp_path, 1, 2)
    cut_short(tmp_path / "2")

    with pytest.raises(OSError, match=r"No checkpoint in .* can be read \(2: "):
        restore_last(tmp_path, step=2)


def test_a_run_does_not_begin_anew_where_all_its_checkpoints_are_damaged(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        cut_short(tmp_path / str(step))

    with pytest.raises(OSError, match=r"can be read \(2: .*; 1: "):
        restore_last(tmp_path, set_aside=True)

    assert (tmp_path / "1").is_dir()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_the_checksum_sees_single_bits_and_swaps(dtype):
    array = (jnp.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    changed = array.at[1, 2, 3].set(array[0, 0, 0])
    swapped = array.at[0, 0, 0].set(array[0, 0, 1]).at[0, 0, 1].set(array[0, 0, 0])

    sums = {checksum({"x": x}) for x in (array, changed, swapped)}

    assert len(sums) == 3


def checksum(arrays):
    return checkpoints.checksum(arrays)


SAVER = """
import sys
sys.path.insert(0, {tests!r})
from test_checkpoints import *
with open_store(sys.argv[1], IDENTITY, keep_last=2) as store:
    for step in range(1, 10_000):
        checkpoints.save(store, snapshot_at(step))
        print(step, flush=True)
"""


def saver(directory, **options) -> subprocess.Popen:
    """Another process that saves step after step until it is killed."""
    code = SAVER.format(tests=str(pathlib.Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("seen", [2, 5])
def test_a_kill_in_the_middle_of_a_save_leaves_the_last_whole_one(tmp_path, seen):
    with saver(tmp_path) as process:
        for _ in range(seen):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)

    found = restore_last(tmp_path, set_aside=True)

    assert found.step >= last - 1  # the one that `save` waited for before it began the last
    assert_same(found, snapshot_at(found.step))
    save_steps(tmp_path, found.step + 1)
    assert not list(tmp_path.glob("*tmp*"))  # what the kill left is gone


def test_a_disk_too_full_for_a_checkpoint_is_told_before_it_is_touched(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))

    with pytest.raises(OSError, match="bytes are needed, 100 are free") as raised:
        save_steps(tmp_path, 2)

    assert "The checkpoint of step 1 is whole" in str(raised.value)
    assert_same(restore_last(tmp_path), snapshot_at(1))


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoints import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open_store(sys.argv[1], IDENTITY) as store:
    checkpoints.save(store, snapshot_at(1))
    checkpoints.wait(store)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # as if the disk filled up here
    try:
        checkpoints.save(store, snapshot_at(2))
        checkpoints.wait(store)
    except OSError as error:
        print(error)
        raise SystemExit(3)
"""


def test_a_disk_that_fills_up_while_saving_is_told_and_the_last_whole_one_stays(tmp_path):
    code = FULL.format(tests=str(pathlib.Path(__file__).parent))

    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert process.returncode == 3, process.stderr
    assert "could not be written" in process.stdout
    assert "The checkpoint of step 1 is whole" in process.stdout
    assert_same(restore_last(tmp_path), snapshot_at(1))


def test_a_data_state_that_json_cannot_hold_is_an_error(tmp_path):
    snapshot = dataclasses.replace(snapshot_at(1), data=object())

    with (
        open_store(tmp_path, IDENTITY) as store,
        pytest.raises(TypeError, match="cannot be written as JSON"),
    ):
        checkpoints.save(store, snapshot)
