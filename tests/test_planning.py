"""Plans: what a compiler says of a step, counted and told right; what cannot be is an error."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llama
from lorax_ft import cli, memory, planning, trees
from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.devices import DEVICES, by_device_kind
from lorax_ft.memory import refusal_of
from lorax_ft.models import attending, build
from lorax_ft.planning import command, shapes, targets
from lorax_ft.planning.plan import largest_logits, make_plan, on_mesh
from lorax_ft.training import MeshConfig
from lorax_ft.training.flops import PEAK_FLOPS
from tests.compilers import needs_gpu_compiler, needs_tpu_compiler
from tests.plans import CPU, SIZES, config_of, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def planned(model):
    return make_plan(config_of(model), CPU)


# --- The table, targets and meshes ----------------------------------------------------------------


def test_the_table_is_whole_and_names_no_device_twice():
    for name, device in DEVICES.items():
        assert min(device.memory, device.flops, device.bandwidth, device.link) > 0, name
        assert (device.kind == "gpu") == (device.gpu is not None), name
        assert device.kind == "tpu" or not device.topologies, name
        assert device.usable <= device.memory
    assert len(by_device_kind()) == sum(len(d.device_kinds) for d in DEVICES.values())
    assert PEAK_FLOPS["NVIDIA H100 PCIe"] == 756e12
    assert PEAK_FLOPS["TPU v5 lite"] == DEVICES["tpu-v5e"].flops


@pytest.mark.parametrize(("text", "count"), [
    ("a6000", 1), ("h100:8", 8), ("cpu", 1), ("cpu:4", 4), ("tpu-v5e", 1), ("tpu-v5e:4x4", 16),
    ("tpu-v5p:2x2x4", 16), ("tpu7x:2x2x1", 8),
])  # fmt: skip
def test_a_target_has_as_many_devices_as_its_name_says(text, count):
    assert planning.parse_target(text).count == count


@pytest.mark.parametrize(("text", "message"), [
    ("h10", r"no such device, only .*a6000.* and cpu\. Nearest: h100"),
    ("h100:", "a number of devices after the colon"),
    ("h100:0", "a number of devices after the colon"),
    ("h100:2x2", "only TPUs have one"),
    ("tpu-v5e:16", r"how are 16 chips wired\? .*tpu-v5e:4x4"),
    ("tpu-v5p:4x4", "wired in 3 dimensions"),
    ("tpu-v4", "its peak alone"),
])  # fmt: skip
def test_a_target_that_cannot_be_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        planning.parse_target(text)


def test_a_mesh_is_of_all_devices_or_an_error(model):
    config, eight = config_of(model), planning.parse_target("h100:8")
    meshed = functools.partial(dataclasses.replace, config)

    assert on_mesh(config, eight).mesh == MeshConfig(fsdp=8)
    half = meshed(mesh=MeshConfig(data=-1, tensor=4))
    assert on_mesh(half, eight).mesh == MeshConfig(data=2, tensor=4)
    for mesh in (MeshConfig(data=2, tensor=2), MeshConfig(data=3), MeshConfig(data=3, fsdp=-1)):
        with pytest.raises(ValueError, match=r"is not a mesh of the 8 devices of h100:8"):
            on_mesh(meshed(mesh=mesh), eight)


def test_a_mesh_that_divides_neither_batch_nor_kernels_is_an_error(model):
    plan = functools.partial(make_plan, target=planning.parse_target("cpu:8"))

    with pytest.raises(ValueError, match=r"A batch of 6 rows .* data × fsdp = 8"):
        plan(config_of(model, batch_size=6))
    config = config_of(model, mesh={"tensor": 3})
    with pytest.raises(ValueError, match=r"/kernel .* cannot be split"):
        make_plan(config, planning.parse_target("cpu:3"))


def test_flags_of_a_mesh_are_read():
    assert command.parse_mesh("data=2,fsdp=-1") == MeshConfig(data=2, fsdp=-1)
    with pytest.raises(ValueError, match="expected AXIS=SIZE"):
        command.parse_mesh("data:2")
    with pytest.raises(ValueError, match=r"--mesh\.model = 2: there is no such key"):
        command.parse_mesh("model=2")


def test_a_card_is_described_as_xla_wants_it():
    text = targets.target_config(planning.parse_target("h100"))

    assert "gpu_device_info {\n  threads_per_block_limit: 1024\n" in text
    assert "  cuda_compute_capability {\n    major: 9\n    minor: 0\n" in text
    assert "    feature_extension: ACCELERATED_FEATURES\n  }\n" in text
    assert "  memory_bandwidth: 3352320000000\n" in text
    assert text.count("{") == text.count("}") == 3


def test_a_missing_compiler_is_told_and_stood_in_for(model, monkeypatch):
    monkeypatch.setattr(targets, "_is_installed", lambda name: False)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    for name, extra in (("a6000", "cuda"), ("tpu-v5e", "tpu")):
        target = planning.parse_target(name)
        assert f"lorax_ft[{extra}]" in str(targets.missing(target))
        assert targets.compiler(target).stands_in == targets.missing(target)

    plan = make_plan(config_of(model), planning.parse_target("a6000"))
    assert plan.usable == DEVICES["a6000"].usable
    assert "NOTE      jax's CUDA plugin is not installed" in planning.plan_text(plan)


# --- What is read of a step, and of a compiler that refuses it ------------------------------------


def test_logits_are_found_by_their_last_axis():
    def loss(w, x):
        def chunk(total, part):
            return total + jnp.sum(part @ w), None

        return jax.lax.scan(chunk, 0.0, x)[0]

    w, x = jnp.ones((8, 100)), jnp.ones((3, 4, 8))
    assert largest_logits(jax.jit(loss).trace(w, x).jaxpr, 100) == (4, 100)
    assert largest_logits(jax.jit(loss).trace(w, x).jaxpr, 99) is None


@pytest.mark.parametrize("text", [
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 22.04G of 15.75G hbm. Exceeded hbm capacity by 6.29G.",  # until 2025
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(22.04G) exceeds available HBM (15.75G).",
])  # fmt: skip
def test_a_compilers_refusal_is_told_in_our_words(text):
    found = refusal_of(RuntimeError(text))

    assert found is not None
    assert found.needed == pytest.approx(22.04 * 2**30)
    assert found.available == pytest.approx(15.75 * 2**30)
    assert "it would need 22.04 GiB, and 15.75 GiB are there" in found.words


def test_another_error_of_the_compiler_is_no_refusal():
    assert refusal_of(RuntimeError("INVALID_ARGUMENT: no such layout")) is None
    scratch = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem"
    )
    assert refusal_of(RuntimeError(scratch)) is None


# --- Plans ----------------------------------------------------------------------------------------


def test_parts_of_a_plan_add_up_to_its_peak(planned):
    assert sum(planned.parts.values()) == planned.needed
    assert planned.memory.peak <= planned.needed < 1.1 * planned.memory.peak
    assert planned.parts["logits"] == 8 * 32 * 512 * 4
    assert planned.fits
    assert planned.flops > 0
    assert planned.roofline is None  # no table has this machine


def test_the_plan_is_of_the_step_that_a_run_compiles(model, planned):
    config = config_of(model)
    step = shapes.make_step(config, shapes.describe(config), jax.devices())
    arrays = jax.tree.map(zeros, step.arguments)

    compiled = step.function.lower(*arrays).compile()
    train, _, metrics = step.function(*arrays)

    assert memory.step_memory(compiled) == planned.memory
    unused = sum(map(memory.local_bytes, jax.tree.leaves(step.arguments)))
    unused -= planned.memory.arguments
    assert 0 <= unused < 2000  # such as the ranks, which no product reads
    assert planned.needed == planned.memory.peak + unused
    assert np.isfinite(float(metrics["loss"]))
    assert jax.tree.structure(train) == jax.tree.structure(step.train)


def test_a_step_is_told_that_the_loaders_masks_hide_ends_alone(model, monkeypatch):
    config = config_of(model)
    step = shapes.make_step(config, shapes.describe(config), jax.devices())
    told, plain = set(), attending.KERNELS["xla"]
    attend = lambda *args: (told.add(args[3].hides_ends), plain.attend(*args))[1]
    monkeypatch.setitem(attending.KERNELS, "xla", dataclasses.replace(plain, attend=attend))

    jax.eval_shape(step.function, *step.arguments)

    assert told == {True}


def zeros(shape):
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(shape.shape, shape.dtype)


def test_eight_devices_hold_an_eighth_of_the_weights_each(model, planned):
    plan = make_plan(config_of(model), planning.parse_target("cpu:8"))

    assert plan.mesh == MeshConfig(fsdp=8)
    assert plan.parts["packed"] == planned.parts["packed"] / 8
    assert plan.flops == pytest.approx(planned.flops / 8)
    assert plan.collectives
    assert min(row.sent for row in plan.collectives) > 0


def test_a_report_has_every_number_a_user_looks_for(planned):
    text = planning.plan_text(planned)

    for word in ("weights in few bits", "absmax", "adapters", "optimizer states", "gradients"):
        assert word in text
    assert f"{planned.needed:,}" in text
    assert "8 rows of 32 tokens" in text
    assert text.splitlines()[-1].startswith("Fits: ")


def test_a_card_that_must_be_given_more_than_jax_takes_by_itself_says_so(planned):
    target = planning.parse_target("a6000")
    on_card = functools.partial(
        dataclasses.replace, planned, target=target, usable=DEVICES["a6000"].usable
    )

    assert planning.verdict(on_card(needed=10 * 2**30)).endswith("left.")
    assert "MEM_FRACTION=0.95" in planning.verdict(on_card(needed=40 * 2**30))
    assert "DOES NOT FIT: 46.00 of 45.16 GiB" in planning.verdict(on_card(needed=46 * 2**30))


def test_a_model_too_long_for_its_positions_is_an_error(model):
    with pytest.raises(ValueError, match="positions for 256"):
        make_plan(config_of(model, length=512), CPU)


def test_a_plan_reads_no_weights_and_says_where_a_config_json_is_missing(model, tmp_path):
    config = config_of(tmp_path)

    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        make_plan(config, CPU)


def test_a_picture_is_drawn(planned, tmp_path):
    planning.plot_plans({"one": planned, "two": planned}, tmp_path / "plan.png")

    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no plans"):
        planning.plot_plans({}, tmp_path / "none.png")


# --- The command line -----------------------------------------------------------------------------

FILE = '''"""A config."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict({VALUES})
'''


@pytest.fixture
def no_preparation(monkeypatch):
    """JAX has met its devices already here."""
    monkeypatch.setattr(command, "prepare_process", lambda target: None)


def test_the_command_plans_from_a_config_alone(model, tmp_path, capsys, no_preparation):
    values = {
        "model": {"path": str(model)},
        "data": {
            "source": {"train": "nowhere.txt"},
            "task": {"kind": "language_modelling", "length": 32},
            "loader": {"batch_size": 4, "buckets": (32,)},
        },
        "lora": {"rank": 4},
    }
    (tmp_path / "small.py").write_text(FILE.replace("{VALUES}", repr(values)))
    flags = [f"--config={tmp_path / 'small.py'}", "--device=cpu", "--largest=none"]

    code = cli.main(["lorax-ft", "plan", *flags, f"--plot={tmp_path / 'plan.png'}"])

    assert code == 0
    assert "Fits: " in capsys.readouterr().out
    assert (tmp_path / "plan.png").exists()


PUBLISHED = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "33b": 32_528_943_616,
    "65b": 65_285_660_672,
    "3-8b": 8_030_261_248,
    "3-70b": 70_553_706_496,
    "3.2-1b": 1_235_814_400,
}


def test_every_size_of_the_llama_config_has_the_published_number_of_parameters():
    found = {}
    for size in llama.SIZES:
        config = parse(llama.get_config(f"{size}-lora"), ExperimentConfig)
        path = pathlib.Path(config.model.path) / "config.json"
        model = build(json.loads(path.read_text()), task="causal_lm")
        found[size] = trees.count(model.shapes()).total

    assert found == PUBLISHED


def test_every_size_and_method_of_the_llama_config_is_a_config():
    for size in llama.SIZES:
        for method in llama.METHODS:
            config = parse(llama.get_config(f"{size}-{method}"), ExperimentConfig)
            assert (pathlib.Path(config.model.path) / "config.json").exists()
    with pytest.raises(ValueError, match="SIZE-METHOD"):
        llama.get_config("65b")


# --- The targets' own compilers -------------------------------------------------------------------


def test_a_program_that_jax_cannot_read_leaves_its_memory_known(model, planned, monkeypatch):
    def as_text(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    plan = make_plan(config_of(model), CPU)

    assert (plan.needed, plan.parts, plan.flops) == (planned.needed, planned.parts, planned.flops)
    assert plan.fits
    assert plan.traffic is plan.cycles is plan.roofline is None
    assert "traffic, communication and cycles are not known" in planning.plan_text(plan)


@needs_tpu_compiler
def test_the_tpu_compiler_tells_cycles_and_refuses_in_our_words(model):
    plan = make_plan(config_of(model), planning.parse_target("tpu-v5e"))
    assert plan.stands_in is None
    assert plan.fits
    assert plan.cycles is not None
    assert plan.cycles.total > 0
    assert plan.roofline is not None

    huge = config_of(model)
    overrides = {"vocab_size": 2**26}
    huge = dataclasses.replace(huge, model=dataclasses.replace(huge.model, overrides=overrides))
    huge = make_plan(huge, planning.parse_target("tpu-v5e"))
    assert not huge.fits
    assert "would need" in str(huge.refused)
    assert huge.usable == DEVICES["tpu-v5e"].usable


@needs_tpu_compiler
def test_offloaded_inputs_of_layers_are_on_the_host_of_a_tpu(model):
    target, length, rows = planning.parse_target("tpu-v5e"), 128, 8

    def plan_of(remat):
        compute = {"remat": remat}
        return make_plan(config_of(model, length=length, batch_size=rows, compute=compute), target)

    kept, offloaded = plan_of("full"), plan_of("offload")

    inputs = SIZES["num_hidden_layers"] * rows * length * SIZES["hidden_size"] * 2
    assert (kept.host, offloaded.host) == (0, inputs)
    assert offloaded.memory is not None
    assert offloaded.memory.host == inputs
    assert offloaded.parts["activations"] < kept.parts["activations"]


@needs_tpu_compiler
def test_a_topology_that_the_tpu_compiler_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="knows no topology v5e:3x7"):
        targets.compiler(planning.parse_target("tpu-v5e:3x7"))


@needs_gpu_compiler
def test_the_gpu_compiler_is_asked_about_a_card_that_is_not_here(model):
    plan = make_plan(config_of(model), planning.parse_target("a6000"))

    assert plan.stands_in is None
    assert plan.fits


@needs_gpu_compiler
def test_offloaded_inputs_of_layers_are_on_the_host_of_a_card(model):
    config = config_of(model, length=128, batch_size=8, compute={"remat": "offload"})

    plan = make_plan(config, planning.parse_target("a6000"))

    assert plan.host == SIZES["num_hidden_layers"] * 8 * 128 * SIZES["hidden_size"] * 2
