"""Loader: batches of few static shapes, in an order that seed and epoch alone decide."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lorax_ft.data.tasks import IGNORED, Example

TARGETS = ("decoder_input_ids", "labels")  # of an encoder-decoder: as long as one another
Batch = dict[str, np.ndarray]
"""`input_ids` and `attention_mask` [batch, length] int32, with them `token_type_ids`, or of packed
examples `segment_ids` and `position_ids`; `labels` [batch] or [batch, length] int32; `weights`
[batch] float32, 0 for a row that only fills the batch. Of sources and targets `decoder_input_ids`
and `labels` are [batch, target length] int32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How examples become batches."""

    batch_size: int = 32  # of all processes together
    eval_batch_size: int | None = None  # None: as batch_size
    buckets: tuple[int, ...] = (16, 32, 64, 128)  # lengths to pad to; each is one compilation
    target_buckets: tuple[int, ...] | None = None  # of targets; None: as long as the longest one
    drop_last: bool = False  # leave out an epoch's short batch; else fill it with rows of weight 0
    prefetch: int = 8  # batches that a thread makes ahead
    seed: int | None = None  # of the order that examples are seen in; None: the run's own

    def __post_init__(self):
        for field in ("batch_size", "eval_batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"LoaderConfig.{field} = {value!r}: expected at least 1.")
        if self.prefetch < 0:
            raise ValueError(f"LoaderConfig.prefetch = {self.prefetch!r}: expected at least 0.")
        for field in ("buckets", "target_buckets"):
            buckets = getattr(self, field)
            if buckets is None:
                continue
            rising = all(a < b for a, b in itertools.pairwise(buckets))
            if not buckets or buckets[0] < 1 or not rising:
                raise ValueError(
                    f"LoaderConfig.{field} = {buckets!r}: expected rising lengths, such as "
                    "(16, 32, 64, 128)."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which examples a batch holds, and the length they are padded to."""

    indices: np.ndarray  # [at most batch size]
    length: int


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    buckets: Sequence[int],
    seed: int | None = None,
    epoch: int = 0,
    *,
    drop_last: bool = False,
) -> list[BatchPlan]:
    """Every example once, in batches of similar length; a pure function of its arguments.

    Examples are shuffled, dealt into the shortest bucket that holds them, and each bucket is cut
    into batches; the rest of a bucket moves on to the next longer one, so that at most one batch is
    short, and how many batches there are of each length is the same in every epoch. The batches are
    then shuffled. Without a seed nothing is shuffled. Raises ValueError for an example that is
    longer than the longest bucket.

    >>> plans = plan_epoch([3, 9, 4, 12, 2], batch_size=2, buckets=(4, 16), seed=0)
    >>> sorted((plan.length, len(plan.indices)) for plan in plans)
    [(4, 2), (16, 1), (16, 2)]
    """
    lengths = np.asarray(lengths)
    bucket_of = np.searchsorted(buckets, lengths)
    if (bucket_of == len(buckets)).any():
        index = int(np.argmax(bucket_of))
        raise ValueError(
            f"LoaderConfig.buckets = {tuple(buckets)}: example {index} has {lengths[index]} "
            "tokens. Add a longer bucket, or cut the examples with task.max_length."
        )
    random = None if seed is None else np.random.default_rng((seed, epoch))
    order = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
    plans, rest, length = [], order[:0], 0
    for bucket in np.unique(bucket_of):
        length = buckets[bucket]
        members = np.concatenate([rest, order[bucket_of[order] == bucket]])
        whole = len(members) - len(members) % batch_size
        starts = range(0, whole, batch_size)
        plans += [BatchPlan(indices=members[i : i + batch_size], length=length) for i in starts]
        rest = members[whole:]
    if len(rest) and not drop_last:
        plans.append(BatchPlan(indices=rest, length=length))
    return plans if random is None else [plans[i] for i in random.permutation(len(plans))]


def padding_share(lengths: Sequence[int] | np.ndarray, plans: Sequence[BatchPlan]) -> float:
    """Which fraction of the positions in the plans' rows is padding."""
    lengths = np.asarray(lengths)
    positions = sum(plan.length * len(plan.indices) for plan in plans)
    return 1 - sum(int(lengths[plan.indices].sum()) for plan in plans) / positions


def make_batch(
    examples: Sequence[Example],
    plan: BatchPlan,
    *,
    rows: slice,
    pad_id: int,
    target_buckets: Sequence[int] | None = None,
) -> Batch:
    """Rows of a planned batch, padded; those beyond its examples have weight 0 and no label.

    Targets are padded to the shortest bucket that holds all of the batch's, also other processes'.
    """
    target_length = _target_length([examples[i] for i in plan.indices], target_buckets)
    chosen = [examples[i] for i in plan.indices[rows]]
    count, length = rows.stop - rows.start, plan.length
    padding = {"labels": IGNORED, "token_type_ids": 0, "segment_ids": 0, "position_ids": 0}
    batch = {}
    for name, like in examples[0].items():  # scalars as [rows], vectors as [rows, length]
        long = length if name not in TARGETS or target_length is None else target_length
        shape = (count, long)[: 1 + like.ndim]
        batch[name] = np.full(shape, padding.get(name, pad_id), np.int32)
        for row, example in enumerate(chosen):
            place = (row, slice(example[name].size))[: 1 + like.ndim]
            batch[name][place] = example[name]
    # A row without tokens attends to one: to none, its softmax would be 0 / 0.
    ends = np.ones(count, int)
    ends[: len(chosen)] = np.maximum(_lengths(chosen), 1)
    batch["attention_mask"] = (np.arange(length) < ends[:, None]).astype(np.int32)
    batch["weights"] = (np.arange(count) < len(chosen)).astype(np.float32)
    return batch


def _target_length(examples: Sequence[Example], buckets: Sequence[int] | None) -> int | None:
    """The length that targets are padded to; None where the examples have none."""
    if buckets is None or "decoder_input_ids" not in examples[0]:
        return None
    longest = max(len(example["decoder_input_ids"]) for example in examples)
    return next(bucket for bucket in buckets if bucket >= longest)


def _target_buckets(examples: Sequence[Example], config: LoaderConfig) -> tuple[int, ...] | None:
    """The lengths that targets are padded to. Raises ValueError where one is longer than these."""
    if not examples or "decoder_input_ids" not in examples[0]:
        return None
    longest = max(len(example["decoder_input_ids"]) for example in examples)
    buckets = config.target_buckets or (longest,)
    if longest > buckets[-1]:
        raise ValueError(
            f"LoaderConfig.target_buckets = {buckets}: a target has {longest} tokens. Add a longer "
            "bucket, or cut the targets with task.max_target_length."
        )
    return buckets


class TrainBatches:
    """An endless iterator over shuffled batches, epoch after epoch, that starts at any position.

    Each process gets its rows of the same batches: all have the same number of them with the same
    shapes. `get_state` is what JSON can hold, and `set_state` goes on at exactly the next batch, on
    any number of processes. `seed` decides the order where `config` does not. Raises ValueError
    where there is no batch in an epoch and where processes cannot share the rows equally.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: LoaderConfig,
        *,
        pad_id: int,
        seed: int,
        process_index: int | None = None,  # None: as jax says
        process_count: int | None = None,
    ):
        import grain

        rows = _share(config.batch_size, process_index, process_count)
        seed = seed if config.seed is None else config.seed
        self._steps = TrainSteps(examples, config, pad_id, seed, rows)
        self._fingerprint = _fingerprint(examples, config, seed)
        options = grain.ReadOptions(
            num_threads=min(config.prefetch, 1), prefetch_buffer_size=config.prefetch
        )
        self._iterator = iter(grain.MapDataset.source(self._steps).to_iter_dataset(options))

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has, the same in each."""
        return self._steps.per_epoch

    def largest(self) -> Batch:
        """A batch of the greatest shape in the first epoch."""
        return self._steps.largest()

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the next batch is, and which data and order that is true of."""
        return {**self._iterator.get_state(), "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position. Raises ValueError where it is one of other data or another order."""
        if state["data"] != self._fingerprint:
            raise ValueError(
                "The training data, their tokens, seed, batch size or buckets are not those that "
                "the position was saved with, so the run cannot go on from it exactly. Restore "
                "them, or start a new run from the saved parameters."
            )
        self._iterator.set_state({"next_index": state["next_index"]})

    def close(self) -> None:
        """Ends the thread that makes batches ahead."""
        self._iterator.close()


def evaluation_batches(
    examples: Sequence[Example],
    config: LoaderConfig,
    *,
    pad_id: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once, as this process's pairs of indices `[n]` and batch.

    Row i of a batch is example `indices[i]`; rows from n on have weight 0, and fill the last batch
    so that all shapes are those of full batches.
    """
    batch_size = config.eval_batch_size or config.batch_size
    rows = _share(batch_size, process_index, process_count)
    targets = _target_buckets(examples, config)
    for plan in plan_epoch(_lengths(examples), batch_size, config.buckets):
        yield (
            plan.indices[rows],
            make_batch(examples, plan, rows=rows, pad_id=pad_id, target_buckets=targets),
        )


class TrainSteps:
    """A run's batches as a sequence without end: each is a pure function of its step."""

    def __init__(
        self, examples: Sequence[Example], config: LoaderConfig, pad_id: int, seed: int, rows: slice
    ):
        lengths = _lengths(examples)

        @functools.lru_cache(maxsize=2)
        def plan(epoch: int) -> list[BatchPlan]:
            return plan_epoch(
                lengths, config.batch_size, config.buckets, seed, epoch, drop_last=config.drop_last
            )

        self.examples, self.pad_id, self.rows, self.plan = examples, pad_id, rows, plan
        self.target_buckets = _target_buckets(examples, config)
        self.per_epoch = len(plan(0))
        if not self.per_epoch:
            raise ValueError(
                f"{len(examples)} training examples make no batch of {config.batch_size}. Lower "
                "LoaderConfig.batch_size, or set LoaderConfig.drop_last to False."
            )

    def largest(self) -> Batch:
        """A batch of the greatest shape in the first epoch."""

        def lengths(number: int) -> tuple[int, int]:
            plan = self.plan(0)[number]
            target = _target_length([self.examples[i] for i in plan.indices], self.target_buckets)
            return plan.length, target or 0

        return self[max(range(self.per_epoch), key=lengths)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        epoch, number = divmod(index, self.per_epoch)
        plan = self.plan(epoch)[number]
        return make_batch(
            self.examples,
            plan,
            rows=self.rows,
            pad_id=self.pad_id,
            target_buckets=self.target_buckets,
        )


def _share(batch_size: int, process_index: int | None, process_count: int | None) -> slice:
    """The rows of each batch that are this process's."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch_size % count:
        raise ValueError(
            f"A batch of {batch_size} cannot be shared equally by {count} processes: make "
            "LoaderConfig.batch_size and eval_batch_size multiples of that."
        )
    rows = batch_size // count
    return slice(index * rows, (index + 1) * rows)


def _lengths(examples: Sequence[Example]) -> np.ndarray:
    return np.array([len(example["input_ids"]) for example in examples], int)


def _fingerprint(examples: Sequence[Example], config: LoaderConfig, seed: int) -> str:
    """A hash of all that decides what the n-th batch is."""
    settings: tuple[Any, ...] = (seed, config.batch_size, config.buckets, config.drop_last)
    if config.target_buckets is not None:
        settings += (config.target_buckets,)
    digest = hashlib.sha256(repr(settings).encode())
    for example in examples:
        for name in sorted(example):
            digest.update(name.encode() + example[name].tobytes())
    return digest.hexdigest()[:16]
