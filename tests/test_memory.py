"""Memory: parts add up to the arrays' bytes, shapes weigh what arrays do, and a run that cannot fit
does not start."""

import contextlib
import dataclasses
import pathlib
import platform
import resource
import types

import jax
import jax.numpy as jnp
import pytest

from lorax_ft import adapted, cli, exit_codes, experiment, memory, planning, trees
from lorax_ft.config import ExperimentConfig, parse, to_dict
from lorax_ft.memory import machine
from lorax_ft.planning import shapes
from lorax_ft.training import host_memory, loop, make_mesh, paging
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("memory"))


def config_of(folder, **changes):
    values = {
        "model": {"path": str(folder / "llama")},
        "data": {
            "source": {"train": str(folder / "data.txt")},
            "task": {"kind": "language_modelling", "length": 16},
            "loader": {"batch_size": 8, "buckets": (16,)},
        },
        "train": {"steps": 4, "progress_bar": False, "tensorboard": False, "eval_every": 0},
    }
    return parse(values | changes, ExperimentConfig)


NF4 = {"quantization": {"kind": "nf4", "block_size": 32}}
METHODS = {
    "qlora": {"lora": {"rank": 4}, **NF4},
    "pissa": {"lora": {"rank": 4, "initialization": "pissa"}},
    "loftq": {"lora": {"rank": 4, "initialization": "loftq"}, **NF4},
    "dora with dropout": {"lora": {"rank": 2, "dora": True, "dropout": 0.1}},
    "adalora": {"adalora": {"rank": 4, "target_rank": 2}},
    "vera": {"vera": {}},
    "adapters": {"adapters": {"size": 4}},
    "prompt of a text": {
        "prompt": {"length": 3, "text": "the sky is", "initialization": "ids"},
        "quantization": {"kind": "int8"},
    },
    "prefix": {"prefix": {"length": 3, "projection": 8}},
    "full": {"full": {}},
}


@pytest.mark.parametrize("name", METHODS)
def test_shapes_are_those_of_the_arrays_that_a_run_has(folder, name):
    config = config_of(folder, **METHODS[name])

    real = adapted.load_adapted(config, "causal_lm")
    planned = adapted.load_shapes(config, "causal_lm")

    assert jax.tree.structure(planned.params) == jax.tree.structure(real.params)
    found, expected = trees.flatten_arrays(planned.params), trees.flatten_arrays(real.params)
    for path, array in expected.items():
        assert (found[path].shape, found[path].dtype) == (array.shape, array.dtype), path
    assert planned.trainable == real.trainable


def test_a_head_of_named_classes_is_planned_as_it_is_trained(folder):
    data = {
        "source": {"train": str(folder / "data.csv")},
        "task": {"max_length": 8, "label_names": ("cold", "neither", "warm")},
        "loader": {"batch_size": 16, "buckets": (8,)},
    }
    config = config_of(folder, model={"path": str(folder / "bert")}, data=data, ia3={})

    planned = shapes.describe(config)

    assert trees.flatten(planned.params)["classifier/kernel"].shape[-1] == 3
    assert "classifier/kernel" in [p.replace("\\", "") for p in planned.trainable]


@pytest.mark.parametrize("name", ["qlora", "prompt of a text", "adalora", "full"])
def test_parts_of_shapes_are_the_bytes_of_arrays(folder, name):
    config = config_of(folder, **METHODS[name])
    real = experiment.prepare(config)
    tx = experiment.make_optimizer(config, config.train.steps)
    opt_state = tx.init(real.train)

    step = shapes.make_step(config, shapes.describe(config), jax.devices())
    planned = memory.state_parts(step.train, step.frozen, step.opt_state)

    assert planned == memory.state_parts(real.train, real.frozen, opt_state)
    in_all = sum(x.nbytes for x in jax.tree.leaves((real.train, real.frozen, opt_state)))
    assert sum(planned.values()) == in_all
    assert planned["optimizer"] == sum(x.nbytes for x in jax.tree.leaves(opt_state))


def test_a_leafs_fields_are_told_apart(folder):
    real = experiment.prepare(config_of(folder, **METHODS["qlora"]))
    arrays = trees.flatten_arrays(real.frozen)

    parts = memory.state_parts(real.train, real.frozen, ())

    def of(*ends):
        return sum(array.nbytes for path, array in arrays.items() if path.endswith(ends))

    assert parts["packed"] == of("/packed")
    assert parts["absmax"] == of("/absmax", "/nested_absmax", "/offset")
    assert parts["weights"] == of("/embedding", "norm/scale", "lm_head/kernel")
    assert parts["adapters"] == of("kernel/rank", "kernel/scale") + sum(
        x.nbytes for x in jax.tree.leaves(real.train)
    )


def test_a_sharded_array_counts_its_share():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = jax.NamedSharding(mesh, jax.P("a", None))
    array = jax.device_put(jnp.ones((8, 6), jnp.bfloat16), sharding)

    assert memory.local_bytes(array) == 8 * 6 * 2 // 4
    assert memory.tree_bytes([array, jnp.ones(3)]) == 24 + 12


def test_a_batch_of_shapes_is_that_of_the_loader(folder):
    text = {
        "source": {"train": str(folder / "data.csv")},
        "task": {"max_length": 8},
        "loader": {"batch_size": 16, "buckets": (4, 8)},
    }
    packed = {
        "source": {"train": str(folder / "data.txt")},
        "task": {"kind": "language_modelling", "length": 8},
        "packed_length": 16,
    }
    configs = [
        config_of(folder, ia3={}),
        config_of(folder, ia3={}, model={"path": str(folder / "bert")}, data=text),
        config_of(folder, ia3={}, data=packed),
    ]
    for config in configs:
        _, dataset = experiment.load_data(config)
        batches = experiment.TrainBatches(dataset.train, config.data.loader, pad_id=0, seed=0)

        found, expected = shapes.batch_shapes(config), batches.largest()
        batches.close()

        assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
            n: (x.shape, x.dtype) for n, x in expected.items()
        }


@contextlib.contextmanager
def compiles():
    """The names of what is compiled, as they come."""
    names = []

    def listen(event, duration_secs, **details):
        del duration_secs
        if event.endswith("backend_compile_duration"):
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_says_what_it_takes_as_planned_and_compiles_its_step_once(
    folder, tmp_path, capsys, monkeypatch
):
    config = config_of(folder, **METHODS["qlora"])
    planned = planning.make_plan(config, planning.parse_target("cpu"))
    before, found = [], []  # names of what is compiled until the check has ended, and its memory

    def noted(program):
        before.extend(compiled)
        found.append(memory.step_memory(program))
        return found[0]

    monkeypatch.setattr(machine, "step_memory", noted)
    with compiles() as compiled:
        experiment.train(config, tmp_path / "run")

    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("memory"))
    assert "weights in few bits" in line
    assert "are free" in line
    assert planned.needed == pytest.approx(found[0].peak, rel=0.1)
    assert "step" in before[-1]
    assert before[-1] not in compiled[len(before) :], compiled


def test_a_run_whose_step_cannot_fit_is_refused_with_numbers_and_leaves_nothing(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "free_memory", iter([10**9, 1000]).__next__)

    with pytest.raises(
        ValueError, match=r"does not fit: a step takes .* KiB .* 1000\.0 B are free"
    ):
        experiment.train(config_of(folder, **METHODS["qlora"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_that_cannot_fit_is_refused_before_it_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    monkeypatch.setattr(experiment, "load_adapted", lambda *_: pytest.fail("weights were read"))

    with pytest.raises(
        ValueError,
        match=r"before its first step it takes .* KiB a device \(weights in few bits .*, optimizer "
        r"states .*\), and 1000\.0 B are free\. .*plan --suggest",
    ):
        experiment.train(config_of(folder, **METHODS["qlora"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("mesh", "paged"), [({}, False), ({"fsdp": 2}, False), ({}, True)])
def test_what_is_kept_between_steps_fits_to_the_byte(folder, monkeypatch, mesh, paged):
    monkeypatch.setattr(paging, "SMALLEST", 1)
    config = config_of(folder, **METHODS["full"], mesh=mesh, optimizer={"paged": paged})
    tx = experiment.make_optimizer(config, config.train.steps)
    kept = memory.place(shapes.describe(config), tx, make_mesh(config.mesh))
    arrays = jax.tree.leaves((kept.train, kept.frozen, kept.opt_state))
    devices = config.mesh.size  # which share this machine's memory
    needed = devices * sum(map(memory.local_bytes, arrays))

    assert (memory.host_bytes(kept.opt_state) > 0) == paged
    memory.check_kept(kept, free=needed)
    with pytest.raises(ValueError, match="does not fit"):
        memory.check_kept(kept, free=needed - 1)


def test_a_run_that_goes_on_is_checked_again_and_compiles_its_step_once(
    folder, tmp_path, monkeypatch
):
    train = {"steps": 4, "eval_every": 0, "checkpoint_every": 1}
    train |= {"progress_bar": False, "tensorboard": False}
    config = config_of(folder, **METHODS["qlora"], train=train)
    steps = iter(range(3))

    def break_off(*_):
        if next(steps) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_show", break_off)
        with pytest.raises(KeyboardInterrupt):
            experiment.train(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "free_memory", iter([10**9, 1000]).__next__)
        with pytest.raises(ValueError, match="does not fit: a step takes"):
            experiment.train(config, tmp_path / "run")
    with compiles() as compiled:
        results = experiment.train(config, tmp_path / "run")

    assert results["step"] == 4
    assert compiled.count("jit(step)") == 1, compiled


class RefusedStep:
    """A step that its compiler does not take, for the reason given."""

    def __init__(self, reason):
        self.reason = reason

    def lower(self, *arguments):
        return self

    def compile(self):
        raise RuntimeError(self.reason)


def test_a_compilers_refusal_ends_a_run_in_our_words():
    arguments = ({"x": jnp.zeros(4)}, {}, {}, {}, jax.random.key(0))
    hbm = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.04G of 15.75G hbm."

    with pytest.raises(
        ValueError,
        match=r"^This run does not fit: the compiler refuses the step: it would need 22\.04 GiB, "
        r"and 15\.75 GiB are there\. Lower data\.loader\.batch_size .*plan --suggest",
    ):
        memory.check_step(RefusedStep(hbm), arguments)
    with pytest.raises(RuntimeError, match=r"^INTERNAL: another fault$"):
        memory.check_step(RefusedStep("INTERNAL: another fault"), arguments)


FILE = '''"""A config."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict({VALUES})
'''


def test_a_host_without_room_for_paged_states_is_bad_input(folder, tmp_path, monkeypatch, capsys):
    values = to_dict(config_of(folder, **METHODS["full"], optimizer={"paged": True}))
    (tmp_path / "small.py").write_text(FILE.replace("{VALUES}", repr(values)))
    monkeypatch.setattr(paging, "SMALLEST", 1)
    monkeypatch.setattr(host_memory, "available", lambda: 1000)
    monkeypatch.setattr(machine, "free_memory", lambda: None)

    flags = [f"--config={tmp_path / 'small.py'}", f"--run_dir={tmp_path / 'run'}"]
    code = cli.main(["lorax-ft", "train", *flags])

    assert code == exit_codes.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("lorax-ft train: The paged states of the optimizer need ")
    assert "1,000 bytes (0.00 GiB) of it are available" in error
    assert "Traceback" not in error


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees by itself")
def test_what_was_freed_before_the_first_step_goes_back_to_the_system():
    def resident():
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    step = jax.jit(lambda train, state, frozen, batch, key: (train, state, {}))
    held = [bytes(1000) for _ in range(100_000)]
    last = bytes(1000)  # on top of them in the heap, so that they cannot go of themselves
    del held
    before = resident()

    memory.check_step(step, ({"x": jnp.zeros(4)}, {}, {}, {}, jax.random.key(0)))

    assert len(last) == 1000
    assert resident() < before - 50_000_000


def test_a_share_is_of_the_machine_and_no_further_part_of_what_an_allocator_may_take(monkeypatch):
    monkeypatch.setattr(machine.host_memory, "available", lambda: 1000)
    assert machine.free_memory(0.25) == 250
    allocator = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 400}
    )
    monkeypatch.setattr(machine.jax, "local_devices", lambda: [allocator])
    assert machine.free_memory(0.25) == 600


def test_a_step_that_its_compiler_tells_nothing_of_is_said_to_be_so():
    line = memory.memory_line({**dict.fromkeys(memory.STATE_PARTS, 0), "weights": 2048})

    assert line == "plain weights 2.0 KiB; what a step takes beside is not known here"


def test_peak_counts_what_is_donated_once():
    found = memory.StepMemory(arguments=10, outputs=6, aliased=5, temporaries=3, code=1)

    assert (found.added, found.peak) == (5, 15)
    assert dataclasses.replace(found, aliased=0).peak == 20
