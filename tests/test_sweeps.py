"""Sweeps: a member is the run that it would have been alone, in one program with one base."""

import functools

import jax
import numpy as np
import pytest

from lorax_ft import experiment, trees
from lorax_ft.adapted import adapt, make_outputs
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.sweeps import devices, members, planning
from lorax_ft.sweeps.groups import Run, group_runs
from lorax_ft.sweeps.program import Batches, Program, load_source
from lorax_ft.training import OBJECTIVES, make_train_step
from tests import tiny

STEPS = 200
BASE = {
    "lora": {"rank": 2, "targets": ["query", "value"]},
    "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1, "clip_norm": 0.5},
    "train": {"steps": STEPS, "progress_bar": False, "tensorboard": False},
}
# What members differ in: ranks, scales, rates, decays, warm-ups, lengths, dropout, seeds.
CHANGES = [
    {"lora.rank": 1, "lora.rslora": True, "optimizer.warmup_steps": 20},
    {"lora.rank": 16, "lora.alpha": 16.0, "optimizer.weight_decay": 0.0, "seed": 1},
    {"optimizer.learning_rate": 1e-2, "optimizer.clip_norm": 0.1, "train.steps": 250},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, and texts of three or of seven words, which are batches of two shapes."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("sweeps"))
    random = np.random.default_rng(1)
    lines = []
    for _ in range(160):
        colour = random.choice(list(tiny.LABELS))
        words = [*random.choice(["apple", "sky", "is", "the"], random.choice([2, 6])), colour]
        lines.append(f"{tiny.LABELS[colour]},{' '.join(random.permutation(words))}")
    (folder / "lengths.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
    return folder


def config_of(folder, changes=None, **sections) -> ExperimentConfig:
    values = {
        "model": {"path": str(folder / "bert")},
        "data": {
            "source": {"train": str(folder / "lengths.csv")},
            "split": {"validation": 0.2},
            "task": {"max_length": 8},
            "loader": {"batch_size": 16, "buckets": [8]},
        },
    }
    values |= {
        name: dict(section) for name, section in (BASE | sections).items() if section is not None
    }
    for key, value in (changes or {}).items():
        *sections_, name = key.split(".")
        section = values
        for part in sections_:
            section = section.setdefault(part, {})
        section[name] = value
    return parse(values, ExperimentConfig)


def runs_of(folder, changes=None, **sections) -> list[Run]:
    return [
        Run(name=f"run-{i}", config=config_of(folder, change, **sections), changes=change)
        for i, change in enumerate(CHANGES if changes is None else changes)
    ]


def alone(config, steps=STEPS):
    """Losses and last trainable half of a run by itself."""
    source = load_source(config)
    adapted = adapt(source.base, config)
    run = experiment.assemble(config, source.tokenizer, source.dataset, adapted)
    batches, total = Batches(source, config, 1), source.total_steps(config)
    tx = experiment.make_optimizer(config, total)
    step = make_train_step(make_outputs(run.adapted.model), OBJECTIVES[run.dataset.task], tx)
    key, train, losses = experiment.training_key(config.seed), run.train, []
    opt_state = tx.init(train)
    for n in range(steps):
        batch = batches.get(config, n)
        train, opt_state, metrics = step(
            train, opt_state, run.frozen, batch, jax.random.fold_in(key, n)
        )
        losses.append(float(metrics["loss"]))
    return np.array(losses), train


def together(runs, steps=STEPS, *, vectorized=True):
    """The program of one group of runs, losses [steps, runs] and the stack in the end."""
    (group,) = group_runs(runs)
    source = load_source(group.first)
    program = Program(source, group, len(runs), vectorized=vectorized)
    batches = Batches(source, group.first, len(runs))
    stack, keys, sizes = program.empty(), [], np.zeros(len(runs), np.int32)
    for i, run in enumerate(runs):
        member = program.start(run.config)
        stack = program.put(stack, i, member.stack)
        keys.append(member.key)
        sizes[i] = member.size
    losses = []
    for n in range(steps):
        own = [batches.get(run.config, n) for run in runs]
        batch = {name: np.stack([b[name] for b in own]) for name in own[0]}
        counts = np.full(len(runs), n, np.int32)
        stack, metrics = program.train(stack, np.stack(keys), sizes, counts, batch)
        losses.append(np.asarray(metrics["loss"]))
    return program, np.array(losses), stack


def law_runs(folder, drops):
    """Runs with a rate of adapter dropout each, or without any dropout."""
    dropout = 0.3 if drops else 0.0
    rates = [dropout, 0.0, dropout / 2] if dropout else [0.0] * 3
    overrides = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    common = {"model.overrides": overrides}
    return runs_of(
        folder, [c | common | {"lora.dropout": r} for c, r in zip(CHANGES, rates, strict=True)]
    )


@pytest.fixture(scope="module")
def plain(folder):
    """Members without dropout after all their steps."""
    return together(law_runs(folder, False))


@pytest.fixture(scope="module")
def by_themselves(folder):
    """What the runs with dropout, and those without, end in alone."""
    return functools.cache(lambda drops: [alone(run.config) for run in law_runs(folder, drops)])


@pytest.mark.parametrize(("drops", "vectorized"), [(False, True), (True, True), (True, False)])
def test_a_member_is_the_run_it_would_have_been_alone(
    folder, plain, by_themselves, drops, vectorized
):
    runs = law_runs(folder, drops)
    program, losses, stack = together(runs, vectorized=vectorized) if drops else plain

    assert program.compiles == 1
    assert len(program.sizes) == (1 if vectorized else 2)  # ranks 1 and 2 make the smaller steps
    for i, (run, (want, train)) in enumerate(zip(runs, by_themselves(drops), strict=True)):
        # float32 sums in another order, amplified over 200 steps of Adam
        np.testing.assert_allclose(losses[:, i], want, rtol=2e-3, atol=2e-4, err_msg=run.name)
        cut = trees.flatten_arrays(members.unpad(members.take(stack.train, i), train))
        for path, array in trees.flatten_arrays(train).items():
            np.testing.assert_allclose(cut[path], array, rtol=1e-2, atol=2e-3, err_msg=path)


def test_padding_stays_zero_in_parameters_and_moments(folder, plain):
    _, _, stack = plain

    for i, rank in enumerate((1, 16, 2)):
        member = trees.flatten_arrays(members.take((stack.train, stack.opt_state), i))
        factors = {p: x for p, x in member.items() if p.endswith(("/a", "/b"))}
        assert len(factors) == 3 * 2 * 2  # values and two moments, two kernels, two factors
        for path, array in factors.items():
            assert np.any(array[..., :rank, :]), path
            assert not np.any(array[..., rank:, :]), path


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_slot_without_a_batch_stays_as_it_is(folder, vectorized):
    program, _, stack = together(runs_of(folder), 1, vectorized=vectorized)
    before = jax.device_get(stack)
    one = Batches(program.source, program.group.first, 1).get(program.group.first, 0)
    batch = {name: np.stack([array] * program.slots) for name, array in one.items()}
    batch["weights"][1] = 0
    keys = np.stack([program.key_data] * program.slots)

    sizes, counts = np.zeros((2, program.slots), np.int32)
    sizes[:] = len(program.sizes) - 1
    after, metrics = program.train(stack, keys, sizes, counts + 1, batch)

    assert metrics["weight"].tolist() == [16, 0, 16]
    for i, moved in enumerate((True, False, True)):
        pairs = zip(*(jax.tree.leaves((s.train, s.opt_state)) for s in (before, after)))
        same = all(np.array_equal(x[i], y[i]) for x, y in pairs)
        assert same is not moved


def test_there_is_one_copy_of_the_base(plain):
    program, _, _ = plain

    base = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(program.source.base.params)}
    assert program.mesh.size == 3
    for array in jax.tree.leaves(program.shared):
        shards = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        assert len(shards) == 1
        assert shards <= base
    own = [p for p in trees.flatten_arrays(program.shapes.own) if not p.startswith("pooler/")]
    assert {path.rsplit("/", 1)[1] for path in own} == {"scale", "rank"}


def test_slots_are_parted_evenly_and_filled_by_turns():
    assert [devices.mesh_of(slots).size for slots in (1, 6, 7, 8, 11, 24)] == [1, 6, 7, 8, 1, 8]
    assert [devices.rounded_up(slots) for slots in (1, 7, 8, 9, 17)] == [1, 7, 8, 16, 24]
    assert [devices.rounded_down(slots) for slots in (1, 7, 8, 9, 17)] == [1, 7, 8, 8, 16]
    assert devices.in_turns(devices.mesh_of(16), 16) == [*range(0, 16, 2), *range(1, 16, 2)]


@pytest.mark.parametrize("keeps_best", [False, True])
def test_a_group_too_large_for_memory_has_as_many_slots_as_fit_and_fill_the_devices(
    folder, keeps_best
):
    best = {"train.best_metric": "accuracy" if keeps_best else None}
    (group,) = group_runs(runs_of(folder, [{"seed": seed} | best for seed in range(16)]))
    source = load_source(group.first)

    def taken(slots):
        """Bytes of the plan, which the arrays that are then made must keep to."""
        program, seconds = planning.make_program(source, group, slots, slots=slots, memory=1)
        plan = planning.make_plan(program, seconds, [1] * slots)
        kept = program.empty().train if keeps_best else ()
        arrays = trees.array_bytes
        held = sum(map(arrays, jax.tree.leaves((program.empty(), kept))))
        assert held <= plan.slots * plan.slot_bytes
        return plan.bytes

    sixteen, eight = taken(16), taken(8)
    for memory, slots in ((sixteen, 16), (sixteen - 1, 8), (eight, 8)):
        program, _ = planning.make_program(source, group, 16, slots=None, memory=memory)
        assert program.slots == slots


def test_a_quantised_base_is_shared_and_a_decomposed_one_is_each_runs_own(folder):
    quantized = config_of(folder, quantization={"kind": "nf4"})
    decomposed = config_of(folder, {"lora.initialization": "pissa", "seed": 1})

    one = members.part(load_source(quantized).base, quantized, drops=False)
    other = members.part(load_source(decomposed).base, decomposed, drops=False)

    shared, own = trees.flatten_arrays(one.shared), trees.flatten_arrays(one.own)
    assert any(path.endswith("query/kernel/base/packed") for path in shared)
    assert not any("base" in path for path in own)
    assert any(path.endswith("query/kernel/base") for path in trees.flatten_arrays(other.own))


@pytest.mark.parametrize(
    ("section", "values", "changes"),
    [
        ("vera", {"rank": 8}, [{}, {"vera.rank": 3, "vera.initial": 0.2}]),
        ("adapters", {"size": 8}, [{}, {"adapters.size": 3, "adapters.stddev": 0.1}]),
        (
            "adalora",
            {"rank": 3, "target_rank": 2, "targets": ["query"]},
            [{}, {"adalora.alpha": 4.0}],
        ),
        ("full", {}, [{}, {"seed": 5, "optimizer.learning_rate": 1e-4}]),
    ],
)
def test_other_methods_have_members_too(folder, section, values, changes):
    runs = runs_of(folder, changes, lora=None, **{section: values})

    _, losses, _ = together(runs, 6)

    want, _ = alone(runs[1].config, 6)
    np.testing.assert_allclose(losses[:, 1], want, rtol=1e-4, atol=1e-5)
