"""Checkpoints: all that a run needs to go on exactly where it stopped, without the base weights.

A checkpoint holds the trainable half and the optimizer state as arrays by path, and a JSON record
of the step, the PRNG key, the data iterator's position and the loop's own progress, with the text
of the config and the fingerprint of the base weights beside them. orbax writes it in the background
and renames it into place when it is whole; a checksum over the bits of the arrays tells later
whether it still is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.training.paging import is_split, page_rows

PyTree = Any

FORMAT = 1  # of the record; raised when an older reader would misread a newer checkpoint
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run is a run of; a checkpoint of another identity is refused."""

    config: str  # the whole config as text
    base: str  # fingerprint of the base weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run after `step` steps."""

    step: int
    train: PyTree
    opt_state: PyTree  # None where it was not asked for
    key: jax.Array
    data: Any  # position of the data iterator, anything JSON can hold; the same on every process
    progress: dict[str, Any]  # what the loop keeps count of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """A directory of checkpoints; made by `open_store`."""

    directory: pathlib.Path
    identity: Identity
    manager: Any  # orbax CheckpointManager
    scores: dict[int, float]  # by step, higher is better; for keeping the best


@contextlib.contextmanager
def open_store(
    directory: str | pathlib.Path,
    identity: Identity,
    *,
    keep_last: int = 2,
    keep_best: int = 0,
    read_only: bool = False,
) -> Iterator[Store]:
    """Opens a directory of checkpoints, which keeps the last and the best ones saved.

    What an interrupted save left behind is removed. On leaving, a save that is still being written
    is waited for. Raises OSError then if it failed.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    directory = pathlib.Path(directory).absolute()
    if read_only and not directory.is_dir():
        raise ValueError(f"There are no checkpoints: {directory} does not exist.")
    if not read_only:
        _remove_unfinished(directory)
    scores: dict[int, float] = {}
    kept = policies.AnyPreservationPolicy([policies.LatestN(keep_last), _Best(scores, keep_best)])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        read_only=read_only,
        create=not read_only,
        lightweight_initialize=True,  # a damaged checkpoint must not keep the others from opening
    )
    manager = ocp.CheckpointManager(directory, options=options)
    store = Store(directory=directory, identity=identity, manager=manager, scores=scores)
    scores |= _read_scores(store)
    try:
        yield store
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to be told
            manager.close()
        raise
    with _writing(store):
        manager.close()


def save(store: Store, snapshot: Snapshot, score: float | None = None) -> None:
    """Starts writing a checkpoint; returns when its arrays may be donated.

    `score` (higher is better) is what `keep_best` goes by. Raises OSError where the disk has no
    room for it or an earlier checkpoint could not be written; the last whole one stays. TypeError
    where the data state is nothing that JSON can hold.
    """
    import orbax.checkpoint as ocp

    train = trees.flatten_arrays(snapshot.train)
    optimizer = trees.flatten_arrays(snapshot.opt_state)
    record = _record(store.identity, snapshot, score, train, optimizer)
    try:
        json.dumps(record)
    except TypeError as error:
        raise TypeError(f"The run's state cannot be written as JSON: {error}.") from None
    with _writing(store):
        _check_room(store.directory, [*train.values(), *optimizer.values()])
        if snapshot.step in steps(store):  # saved before its evaluation, which it now brings along
            store.manager.delete(snapshot.step)
        if score is not None and math.isfinite(score):
            store.scores[snapshot.step] = score
        store.manager.save(
            snapshot.step,
            args=ocp.args.Composite(
                train=ocp.args.StandardSave(train),
                optimizer=ocp.args.StandardSave(optimizer),
                record=ocp.args.JsonSave(record),
            ),
        )


def wait(store: Store) -> None:
    """Waits until all is on disk. Raises OSError where it could not be written."""
    with _writing(store):
        store.manager.wait_until_finished()


def steps(store: Store) -> list[int]:
    """The steps that have checkpoints, in rising order."""
    return sorted(store.manager.all_steps())


def restore(
    store: Store,
    train: PyTree,
    opt_state: PyTree = None,
    *,
    step: int | None = None,
    set_aside: bool = False,
) -> Snapshot | None:
    """The last whole checkpoint, or that of `step`; None where there is none.

    `train` and `opt_state` are arrays or `ShapeDtypeStruct`s whose structure, shapes and shardings
    the result has, whatever mesh it was saved from; without `opt_state` that part is not read. A
    checkpoint that cannot be read or fails its checksum is passed over with a warning in the log
    for the one before it, and with `set_aside` renamed to `unreadable-<step>`, so that its step can
    be saved anew.

    Raises ValueError where the checkpoint is of another config, other base weights, or other
    parameters, and OSError where there are checkpoints and none of them can be read.
    """
    candidates = list(reversed(steps(store))) if step is None else [step]
    unreadable: dict[int, str] = {}
    for candidate in candidates:
        try:
            record = _read_record(store, candidate)
            arrays = _compare(store, candidate, record, train, opt_state)
            snapshot = _read(store, candidate, record, arrays, train, opt_state)
        except _Refused as refusal:
            raise ValueError(str(refusal)) from None
        except Exception as error:
            unreadable[candidate] = _first_line(error)
            continue
        for damaged, why in unreadable.items():
            _log.warning("Passed over checkpoint %d, which cannot be read: %s", damaged, why)
            if set_aside:
                _set_aside(store, damaged)
        return snapshot
    if unreadable:
        told = "; ".join(f"{damaged}: {why}" for damaged, why in unreadable.items())
        raise OSError(f"No checkpoint in {store.directory} can be read ({told}).")
    return None


class _Refused(Exception):
    """A whole checkpoint that is not this run's."""


class _Best:
    """orbax preservation policy: the checkpoints with the highest scores, the earlier of equals."""

    def __init__(self, scores: dict[int, float], count: int):
        self.scores, self.count = scores, count

    def should_preserve(self, checkpoints, *, context):
        del context
        scored = [c.step for c in checkpoints if c.step in self.scores]
        best = sorted(scored, key=lambda step: (-self.scores[step], step))[: self.count]
        return [c.step in best for c in checkpoints]


def _record(identity: Identity, snapshot: Snapshot, score, train, optimizer) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": snapshot.step,
        "config": identity.config,
        "base": identity.base,
        "score": score,
        "data": snapshot.data,
        "progress": snapshot.progress,
        "key": np.asarray(jax.random.key_data(snapshot.key)).tolist(),
        "key_implementation": str(jax.random.key_impl(snapshot.key)),
        "arrays": {"train": _describe(train), "optimizer": _describe(optimizer)},
        "checksums": {"train": checksum(train), "optimizer": checksum(optimizer)},
    }


def _read_record(store: Store, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    return store.manager.restore(
        step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
    ).record


def _read_scores(store: Store) -> dict[int, float]:
    scores = {}
    for step in steps(store):
        with contextlib.suppress(Exception):  # damaged: `restore` will say so
            scores[step] = _read_record(store, step)["score"]
    return {step: score for step, score in scores.items() if score is not None}


def _compare(store: Store, step: int, record: dict[str, Any], train: PyTree, opt_state: PyTree):
    """The arrays to read, by item and path; raises `_Refused` where they are not what was saved."""
    where = f"Checkpoint {step} in {store.directory}"
    if record["format"] != FORMAT:
        raise _Refused(f"{where} has format {record['format']}; this version reads {FORMAT}.")
    if record["base"] != store.identity.base:
        raise _Refused(
            f"{where} was trained on base weights {record['base']}, but this run's are "
            f"{store.identity.base}. "
            "Name the model that it was trained on, or another run directory."
        )
    if record["config"] != store.identity.config:
        raise _Refused(
            f"{where} was made with another config (-) than this run's (+):\n"
            f"{_difference(record['config'], store.identity.config)}\n"
            "Give the same config to go on with it, or name another run directory."
        )
    wanted = {"train": trees.flatten_arrays(train)}
    if opt_state is not None:
        wanted["optimizer"] = trees.flatten_arrays(opt_state)
    for item, arrays in wanted.items():
        saved, asked = record["arrays"][item], _describe(arrays)
        if saved != asked:
            paths = sorted(p for p in saved | asked if saved.get(p) != asked.get(p))
            lines = [f"  {p}: saved {saved.get(p)}, wanted {asked.get(p)}" for p in paths[:10]]
            raise _Refused(
                "\n".join([f"{where} holds other arrays ({item}) than asked for:", *lines])
            )
    return wanted


def _read(store: Store, step: int, record, arrays, train: PyTree, opt_state: PyTree) -> Snapshot:
    import orbax.checkpoint as ocp

    shapes = jax.tree.map(_abstract, arrays)
    items = {item: ocp.args.StandardRestore(tree) for item, tree in shapes.items()}
    found = store.manager.restore(step, args=ocp.args.Composite(**items))
    for item in items:
        if checksum(found[item]) != record["checksums"][item]:
            raise OSError(f"its {item} arrays do not have the checksum they were saved with")
    key = jnp.asarray(np.array(record["key"], np.uint32))
    return Snapshot(
        step=record["step"],
        train=_with_arrays(train, found["train"]),
        opt_state=None if opt_state is None else _with_arrays(opt_state, found["optimizer"]),
        key=jax.random.wrap_key_data(key, impl=record["key_implementation"]),
        data=record["data"],
        progress=record["progress"],
    )


def checksum(arrays: dict[str, jax.Array]) -> int:
    """A number of 32 bits that any changed, moved or swapped bits of the arrays change.

    Computed in integers, so it does not depend on how they are sharded, and on the devices; arrays
    in the host's memory come there page by page.
    """
    split = frozenset(path for path, array in arrays.items() if is_split(array.sharding))
    sums = _checksums(arrays, split)
    total = 0
    for path in sorted(sums):
        total = (total * 31 + int(sums[path])) % 2**32
    return total


@functools.partial(jax.jit, static_argnums=1)
def _checksums(arrays: dict[str, jax.Array], split: frozenset[str]) -> dict[str, jax.Array]:
    return {path: _array_checksum(array, path in split) for path, array in arrays.items()}


def _array_checksum(array: jax.Array, is_split: bool) -> jax.Array:
    if jax.typeof(array).memory_space != jax.memory.Space.Host:
        return _weighted_sum(array, 0)
    if is_split or not array.ndim:
        return _weighted_sum(jax.device_put(array, jax.memory.Space.Device), 0)

    rows = page_rows(array.shape)

    def add(page: Any, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(array, page * rows, rows, axis=0)
        part = jax.device_put(part, jax.memory.Space.Device)
        return total + _weighted_sum(part, page * rows)

    return jax.lax.fori_loop(0, array.shape[0] // rows, add, jnp.zeros((), jnp.uint32))


def _weighted_sum(array: jax.Array, first: Any) -> jax.Array:
    """The sum of an array's bits, each times the weight of its place; `first` is its first row."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)  # 64-bit values become pairs of 32 bits
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    weight = jnp.ones(bits.shape, jnp.uint32)
    for axis, prime in zip(
        range(bits.ndim), (2654435761, 2246822519, 3266489917, 668265263, 374761393)
    ):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        if axis == 0:
            index = index + jnp.asarray(first, jnp.uint32)
        weight = (weight + index) * jnp.uint32(prime)
    return jnp.sum(bits * (weight | jnp.uint32(1)), dtype=jnp.uint32)


def _describe(arrays: dict[str, Any]) -> dict[str, str]:
    """`{"layers/kernel/a": "float32[2,8,64]"}`."""
    return {p: f"{a.dtype}[{','.join(map(str, a.shape))}]" for p, a in arrays.items()}


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _with_arrays(tree: PyTree, arrays: dict[str, jax.Array]) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[trees.path_name(path)], tree)


def _difference(saved: str, given: str) -> str:
    lines = list(difflib.unified_diff(saved.splitlines(), given.splitlines(), lineterm="", n=0))
    changed = [line for line in lines[2:] if not line.startswith("@@")]
    return "\n".join(f"  {line}" for line in changed[:20])


def _first_line(error: Exception) -> str:
    """What went wrong, without the pages of detail that tensorstore adds."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _remove_unfinished(directory: pathlib.Path) -> None:
    """Removes what a killed save left. By the time it returns, so that no later store meets it."""
    import orbax.checkpoint as ocp

    if jax.process_index() == 0:
        for path in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(store: Store, step: int) -> None:
    source = store.directory / str(step)
    if source.is_dir() and jax.process_index() == 0:
        shutil.rmtree(target := store.directory / f"unreadable-{step}", ignore_errors=True)
        source.rename(target)
    store.scores.pop(step, None)
    store.manager.reload()


def _check_room(directory: pathlib.Path, arrays: list[jax.Array]) -> None:
    """Raises before anything is written where the arrays cannot fit."""
    needed = sum(
        shard.data.nbytes for a in arrays for shard in a.addressable_shards if not shard.replica_id
    )
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")


@contextlib.contextmanager
def _writing(store: Store) -> Iterator[None]:
    """Turns whatever goes wrong while writing into an OSError that says what is left."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):
            store.manager.reload()
        whole = steps(store)
        left = (
            f"The checkpoint of step {whole[-1]} is whole."
            if whole
            else "There is no whole one yet."
        )
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"A checkpoint could not be written to {store.directory}: {error} {left} Free some "
            "space or mend the disk, then start the run again: it goes on from there.",
        ) from error
