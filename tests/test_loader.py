"""Loader: every example once an epoch, few shapes, one order for all processes, exact positions."""

import itertools
import json

import numpy as np
import pytest

from lorax_ft.data.loader import (
    LoaderConfig,
    TrainBatches,
    evaluation_batches,
    padding_share,
    plan_epoch,
)

BUCKETS = (4, 8, 16)


def make_lengths(count, seed=0):
    return np.random.default_rng(seed).integers(1, 17, count)


def classified(lengths):
    """Examples that can be told apart by their label."""
    return [
        {"input_ids": np.arange(1, n + 1, dtype=np.int32), "labels": np.array(i, np.int32)}
        for i, n in enumerate(lengths)
    ]


def modelled(lengths):
    ids = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def loader(examples, process_index=0, process_count=1, seed=0, **config):
    return TrainBatches(
        examples,
        LoaderConfig(**{"batch_size": 8, "buckets": BUCKETS, **config}),
        pad_id=99,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def seen_in(batches):
    return [int(v) for b in batches for v, w in zip(b["labels"], b["weights"]) if w]


@pytest.mark.parametrize("count", [1, 7, 8, 100])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_epoch_has_every_example_once_in_a_bucket_that_holds_it(count, seed):
    lengths = make_lengths(count)

    plans = plan_epoch(lengths, 8, BUCKETS, seed)

    assert sorted(i for plan in plans for i in plan.indices) == list(range(count))
    assert all(lengths[plan.indices].max() <= plan.length for plan in plans)
    assert sum(len(plan.indices) < 8 for plan in plans) == (count % 8 > 0)


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def order(seed, epoch):
        return [i for p in plan_epoch(make_lengths(50), 8, BUCKETS, seed, epoch) for i in p.indices]

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)


def test_every_epoch_has_the_same_number_of_batches_of_each_length():
    def shapes(epoch):
        return sorted(plan.length for plan in plan_epoch(make_lengths(100), 8, BUCKETS, 0, epoch))

    assert len({tuple(shapes(epoch)) for epoch in range(5)}) == 1


def test_batches_of_all_lengths_are_mixed():
    lengths = [plan.length for plan in plan_epoch(make_lengths(400), 8, BUCKETS, 0)]

    assert lengths != sorted(lengths)


def test_no_batch_is_longer_than_the_longest_example_needs():
    assert {plan.length for plan in plan_epoch([3] * 9, 8, BUCKETS, 0)} == {4}


def test_no_more_is_padded_than_the_distance_of_the_buckets():
    lengths = make_lengths(400)

    shares = [
        padding_share(lengths, plan_epoch(lengths, 8, range(step, 17, step), 0))
        for step in (16, 4, 1)
    ]

    # Lengths are 8.5 on average. What moves on to a longer bucket is less than a batch a bucket.
    assert shares[0] == pytest.approx(1 - 8.5 / 16, abs=0.05)
    assert shares[1] == pytest.approx(1.5 / (8.5 + 1.5), abs=0.05)
    assert shares[2] < 0.05


def test_dropping_leaves_out_the_short_batch_alone():
    kept = plan_epoch(make_lengths(20), 8, BUCKETS, 0, drop_last=True)

    assert [len(plan.indices) for plan in kept] == [8, 8]


def test_an_example_beyond_the_longest_bucket_is_named():
    with pytest.raises(ValueError, match=r"buckets = \(4, 8, 16\): example 1 has 17 tokens"):
        plan_epoch([3, 17], 8, BUCKETS)


def test_padding_is_masked_has_no_label_and_no_weight():
    examples = modelled([2, 3, 3])

    (batch,) = take(loader(examples, batch_size=4), 1)

    assert batch["input_ids"].shape == batch["labels"].shape == (4, 4)
    for row, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
        assert row[mask == 0].tolist() == [99] * (mask == 0).sum()
        assert np.array_equal(labels, np.where((mask == 1) & (row != 99), row, -100))
    assert batch["weights"].tolist() == [1, 1, 1, 0]
    assert batch["attention_mask"][3].tolist() == [1, 0, 0, 0]  # to attend to none would be 0 / 0
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "input_ids": "int32",
        "labels": "int32",
        "attention_mask": "int32",
        "weights": "float32",
    }


@pytest.mark.parametrize("make", [modelled, classified])
def test_masks_hide_ends_of_rows_alone(make):
    """`make_outputs` is told so, and on GPUs attention reads nothing of a mask but its sum."""
    for batch in take(loader(make([5, 0, 3, 8, 1, 2, 7]), batch_size=4), 4):
        mask = batch["attention_mask"]
        assert np.array_equal(mask, np.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True))
        assert mask.sum(axis=1).min() > 0


def test_a_short_classification_batch_is_filled_with_rows_of_no_label():
    (batch,) = take(loader(classified([2, 3]), batch_size=4), 1)

    assert sorted(batch["labels"].tolist()) == [-100, -100, 0, 1]
    assert batch["weights"].tolist() == [1, 1, 0, 0]


def test_an_empty_text_is_a_row_that_attends_to_one_token():
    (batch,) = take(loader(classified([0, 2]), batch_size=2), 1)

    assert sorted(batch["attention_mask"].sum(axis=1).tolist()) == [1, 2]


def test_training_never_ends_and_each_epoch_is_complete():
    batches = loader(classified(make_lengths(20)))

    epochs = [seen_in(take(batches, batches.steps_per_epoch)) for _ in range(3)]

    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("prefetch", [0, 1, 8])
@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_a_position_is_exact_and_json_holds_it(stop, prefetch):
    examples = classified(make_lengths(20))
    whole = take(loader(examples), 10)
    first = loader(examples, prefetch=prefetch)
    take(first, stop)

    second = loader(examples, prefetch=prefetch)
    second.set_state(json.loads(json.dumps(first.get_state())))

    assert_same(take(second, 10 - stop), whole[stop:])
    first.close()
    second.close()


def test_setting_the_position_of_a_loader_that_has_run_forgets_what_it_had_ready():
    batches = loader(classified(make_lengths(20)))
    start = batches.get_state()
    first = take(batches, 4)

    batches.set_state(start)

    assert_same(take(batches, 4), first)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"batch_size": 4}, {"buckets": (8, 16)}, {"drop_last": True}],
)
def test_a_position_in_another_order_is_refused(change):
    examples = classified(make_lengths(20))
    state = loader(examples).get_state()

    with pytest.raises(ValueError, match="not those that the position was saved with"):
        loader(examples, **change).set_state(state)


def test_a_position_in_other_data_is_refused():
    state = loader(classified([1, 2, 3])).get_state()

    with pytest.raises(ValueError, match="training data"):
        loader(modelled([1, 2, 3])).set_state(state)


def test_processes_share_the_rows_of_the_same_batches():
    examples = classified(make_lengths(21))
    whole = take(loader(examples), 6)

    shares = [take(loader(examples, index, 4), 6) for index in range(4)]

    for step, batch in enumerate(whole):
        for name, array in batch.items():
            assert np.array_equal(np.concatenate([s[step][name] for s in shares]), array)


def test_a_position_holds_on_another_number_of_processes():
    examples = classified(make_lengths(20))
    two = loader(examples, 0, 2)
    take(two, 3)

    one = loader(examples)
    one.set_state(two.get_state())

    assert_same(take(one, 2), take(loader(examples), 5)[3:])


def test_a_batch_that_processes_cannot_share_equally_is_an_error():
    with pytest.raises(ValueError, match="batch of 8 cannot be shared equally by 3 processes"):
        loader(classified([1]), 0, 3)


def paired(lengths, target_lengths):
    rows = zip(modelled(lengths), modelled(target_lengths))
    return [s | {"decoder_input_ids": t["input_ids"], "labels": t["labels"]} for s, t in rows]


def test_targets_are_padded_to_lengths_of_their_own():
    (batch,) = take(loader(paired([2, 7], [3, 5]), batch_size=4), 1)

    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 8)
    assert batch["decoder_input_ids"].shape == batch["labels"].shape == (4, 5)
    order = np.argsort(batch["attention_mask"].sum(axis=1), kind="stable")[2:]
    assert batch["labels"][order].tolist() == [[1, 2, 3, -100, -100], [1, 2, 3, 4, 5]]
    assert batch["decoder_input_ids"][order].tolist() == [[1, 2, 3, 99, 99], [1, 2, 3, 4, 5]]
    assert (batch["labels"][batch["weights"] == 0] == -100).all()


def test_target_buckets_bound_the_shapes_on_every_process():
    examples = paired(make_lengths(100), make_lengths(100, seed=1))
    pairs = {"target_buckets": (6, 16), "batch_size": 2}
    one = loader(examples, **pairs)
    shares = [loader(examples, index, 2, **pairs) for index in range(2)]

    found = take(one, one.steps_per_epoch)
    shapes = [(b["input_ids"].shape[1], b["labels"].shape[1]) for b in found]
    assert set(shapes) == {(source, target) for source in BUCKETS for target in (6, 16)}
    for share in shares:
        of_share = take(share, share.steps_per_epoch)
        assert [(b["input_ids"].shape[1], b["labels"].shape[1]) for b in of_share] == shapes
    with pytest.raises(ValueError, match=r"target_buckets = \(6,\): a target has 16 tokens"):
        loader(examples, target_buckets=(6,))


def test_an_epoch_without_a_batch_is_an_error():
    with pytest.raises(ValueError, match=r"3 training examples make no batch of 8"):
        loader(classified([1, 2, 3]), drop_last=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_has_every_example_once_in_whole_batches(processes):
    examples = classified(make_lengths(21))
    config = LoaderConfig(batch_size=32, eval_batch_size=4, buckets=BUCKETS)
    seen = []

    for index in range(processes):
        for indices, batch in evaluation_batches(
            examples, config, pad_id=0, process_index=index, process_count=processes
        ):
            assert batch["input_ids"].shape[0] == 4 // processes
            assert batch["labels"][: len(indices)].tolist() == indices.tolist()
            assert batch["weights"].sum() == len(indices)
            seen += indices.tolist()

    assert sorted(seen) == list(range(21))


def test_no_shape_is_seen_outside_the_buckets():
    examples = classified(make_lengths(100))
    batches = loader(examples)

    shapes = {b["input_ids"].shape for b in take(batches, 3 * batches.steps_per_epoch)}

    assert shapes == {(8, bucket) for bucket in BUCKETS}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 0}, "LoaderConfig.batch_size = 0"),
        ({"eval_batch_size": 0}, "LoaderConfig.eval_batch_size = 0"),
        ({"buckets": ()}, r"LoaderConfig.buckets = \(\)"),
        ({"buckets": (16, 8)}, "expected rising lengths"),
        ({"target_buckets": (8, 8)}, r"LoaderConfig.target_buckets = \(8, 8\)"),
        ({"prefetch": -1}, "LoaderConfig.prefetch = -1"),
    ],
)
def test_a_loader_config_checks_itself(config, message):
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**config)
