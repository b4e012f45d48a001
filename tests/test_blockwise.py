"""Eight-bit optimizer states: bitsandbytes' codes and steps, in every tree that has parameters."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lorax_ft.quantization.codebooks import dynamic_map
from lorax_ft.training.blockwise import (
    Blocks,
    decode,
    encode,
    in_eight_bits,
    is_blocks,
    stored_axes,
    stored_shape,
)
from lorax_ft.training.optimizers import OptimizerConfig, build_optimizer
from lorax_ft.training.sharding import MeshConfig, Rule, make_mesh, shard
from tests.golden.moments import SHAPES, gradient, parameters

# bitsandbytes subtracts b2 = .999 from 1 in float32, where 1.3e-5 of what is left gets lost; optax,
# as PyTorch, does so in float64.
CONSTANT = 2e-5
EIGHT_BITS = {"state_dtype": "int8", "clip_norm": None, "schedule": "constant"}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """See tests/golden/make_adamw8bit.py."""
    with np.load(pathlib.Path(__file__).parent / "golden" / "adamw8bit.npz") as file:
        return dict(file)


def state_of(golden, prefix: str, moment: str) -> Blocks:
    codes, absmax = golden[f"{prefix}.{moment}"], golden[f"{prefix}.{moment}_absmax"]
    rows_are_blocks = codes.shape[-1] % 256 == 0
    absmax = absmax.reshape(*codes.shape[:-1], -1) if rows_are_blocks else absmax
    return Blocks(jnp.asarray(codes), jnp.asarray(absmax))


@pytest.mark.parametrize("signed", [True, False])
def test_maps_and_codes_are_bitsandbytes_own(golden, signed):
    name = "signed" if signed else "unsigned"
    values = golden["codes.values"] if signed else abs(golden["codes.values"])

    found = encode(jnp.asarray(values), signed)

    assert np.array_equal(dynamic_map(signed), golden[f"{name}_map"])
    assert np.array_equal(found.absmax[:, 0], golden[f"codes.{name}_absmax"])
    # CUDA's kernel keeps the sign of negative values that are nearest to zero
    to_zero = (golden[f"codes.{name}"] == 127) & (values < 0) if signed else values < 0
    wanted = np.where(to_zero, 126, golden[f"codes.{name}"])
    # the package multiplies with 1/absmax and so may take the other of two codes as near
    differ = np.asarray(found.codes) != wanted
    assert differ.mean() < 1e-3
    assert np.all(abs(found.codes.astype(int) - wanted.astype(int))[differ] == 1)


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_of_a_map_is_its_own_code(signed):
    table = jnp.asarray(dynamic_map(signed))

    state = encode(table, signed)

    assert np.array_equal(state.codes, np.arange(256))
    assert np.array_equal(decode(state, signed), table)


def test_one_update_is_that_of_bitsandbytes(golden):
    config = OptimizerConfig(weight_decay=0.01, **EIGHT_BITS)
    tx = build_optimizer(config, total_steps=100)
    params = {"kernel": jnp.asarray(golden["update.p"])}
    state = tx.init(params)
    moments = (state_of(golden, "update", name) for name in ("m", "v"))
    adam = state[0]._replace(
        count=jnp.asarray(20, jnp.int32),
        **dict(zip(("mu", "nu"), ({"kernel": m} for m in moments))),
    )

    updates, state = tx.update(
        {"kernel": jnp.asarray(golden["update.g"])}, (adam, *state[1:]), params
    )

    moved, wanted = (
        np.asarray(optax.apply_updates(params, updates)["kernel"]),
        golden["update.new_p"],
    )
    step = abs(wanted - golden["update.p"])
    assert np.all(abs(moved - wanted) < CONSTANT * step + 1.2e-7 * abs(wanted) + 1e-8)
    for field, name in {"mu": "m", "nu": "v"}.items():
        absmax = getattr(state[0], field)["kernel"].absmax[:, 0]
        np.testing.assert_allclose(absmax, golden[f"update.new_{name}_absmax"], rtol=CONSTANT)


@pytest.mark.parametrize("name", SHAPES)
def test_a_hundred_steps_are_those_of_bitsandbytes_kernel(golden, name):
    tx = build_optimizer(OptimizerConfig(weight_decay=0.01, **EIGHT_BITS), total_steps=100)
    params = {"kernel": jnp.asarray(parameters(name))}
    gradients = jnp.asarray(np.stack([gradient(name, step) for step in range(1, 101)]))

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"kernel": g}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state[0])

    _, (moved, adam) = jax.jit(lambda c: jax.lax.scan(step, c, gradients))(
        (params, tx.init(params))
    )

    for count in (1, 100):
        prefix = f"run.{name}.{count}"
        # Rounding may choose the other of two neighbouring codes, which are up to 45 % apart where
        # the map is coarsest; what that does to a step of 1e-3 is averaged over many.
        wanted = golden[f"{prefix}.p"]
        error = abs(np.asarray(moved["kernel"][count - 1]) - wanted)
        assert error.max() < (1e-7 if count == 1 else 2e-4)
        assert error.mean() < (1e-8 if count == 1 else 2e-6)
        for field, moment in {"mu": "m", "nu": "v"}.items():
            found = jax.tree.map(lambda x, i=count - 1: x[i], getattr(adam, field)["kernel"])
            codes = golden[f"{prefix}.{moment}"]
            assert (np.asarray(found.codes) == codes).mean() > 0.999
            absmax = golden[f"{prefix}.{moment}_absmax"]
            np.testing.assert_allclose(found.absmax.reshape(-1), absmax, rtol=1e-2)


def test_small_tensors_stay_float32_and_each_layer_has_blocks_of_its_own():
    params = {
        "layers": {"kernel": jnp.ones((3, 50, 100)), "small": jnp.ones((9, 4095))},
        "head": {"kernel": jnp.ones((4, 1024)), "bias": jnp.ones(4095)},
    }

    state = in_eight_bits(optax.scale_by_adam()).init(params)

    shapes = jax.tree.map(lambda x: (x.dtype.name, x.shape), state.nu)
    assert shapes["layers"]["kernel"] == (("uint8", (3, 50, 100)), ("float32", (3, 20)))
    assert shapes["layers"]["small"] == ("float32", (9, 4095))
    assert shapes["head"]["kernel"] == (("uint8", (4, 8, 128)), ("float32", (4, 4)))
    assert shapes["head"]["bias"] == ("float32", (4095,))

    values = jax.random.normal(jax.random.key(0), (3, 50, 100))
    each = [encode(layer, True) for layer in values]
    stacked = encode(values, True, stacked=True)
    assert all(np.array_equal(stacked.codes[i], one.codes) for i, one in enumerate(each))
    assert np.array_equal(decode(stacked, True, stacked=True)[1], decode(each[1], True))


@pytest.mark.parametrize(
    ("path", "shape", "stored", "axes"),
    [
        ("head", (24, 256), (3, 8, 256), ("rows", None, "columns")),
        ("layers/kernel", (3, 24, 256), (3, 3, 8, 256), (None, "rows", None, "columns")),
        ("layers/a", (3, 512, 64), (3, 32, 8, 128), (None, "rows", None, None)),  # no whole lanes
        ("layers/b", (3, 4, 1024), (3, 4, 8, 128), (None, "rows", None, None)),  # no eight rows
        ("head", (10, 1000), (10, 1000), ("rows", "columns")),
        ("layers/scale", (16, 8192), (16, 8192), ("rows", "columns")),
    ],
)
def test_a_state_has_its_codes_in_groups_of_eight_rows_in_the_same_order(path, shape, stored, axes):
    stacked = path.startswith("layers/")
    params = {path: jax.random.normal(jax.random.key(0), shape)}
    tx = in_eight_bits(optax.trace(0.9))

    start = tx.init(params).trace[path].codes
    codes = tx.update(params, tx.init(params))[1].trace[path].codes

    assert start.shape == codes.shape == stored == stored_shape(shape, stacked)
    assert np.array_equal(codes.reshape(shape), encode(params[path], True, stacked).codes)
    named = (None,) * (len(shape) - 2) + ("rows", "columns")
    assert stored_axes(named, shape, stacked) == axes


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_moments_in_eight_bits_are_near_those_in_float32(name):
    params = {"kernel": jnp.zeros((32, 256)), "bias": jnp.zeros(256)}
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), (5, *p.shape)), params)

    def run(state_dtype):
        tx = build_optimizer(OptimizerConfig(name=name, state_dtype=state_dtype), total_steps=10)

        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]

    (full, _), (eight, state) = run("parameter"), run("int8")

    assert any(map(is_blocks, jax.tree.leaves(state, is_leaf=is_blocks)))
    assert np.array_equal(full["bias"], eight["bias"])  # too small for eight bits
    moved, error = abs(full["kernel"]), abs(eight["kernel"] - full["kernel"])
    assert jnp.mean(error) < 0.02 * jnp.mean(moved)  # neighbouring codes are 1.5 % apart and more


def test_rows_that_pad_a_member_of_a_sweep_stay_zero_and_change_nothing_else():
    tx = build_optimizer(OptimizerConfig(weight_decay=0.1, state_dtype="int8"), total_steps=10)
    small = jax.random.normal(jax.random.key(0), (2, 24, 256))
    gradients = jax.random.normal(jax.random.key(1), (3, 2, 24, 256))

    def run(params, gradients):
        state = tx.init(params)
        for one in gradients:
            updates, state = tx.update({"a": one}, state, params)
            params = optax.apply_updates(params, updates)
        return params["a"]

    def padded(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 8), (0, 0)])

    each = jax.jit(jax.vmap(run, in_axes=({"a": 0}, 1)))
    alone = each({"a": small}, gradients)
    together = each({"a": padded(small)}, padded(gradients))

    assert jnp.all(together[:, 24:] == 0)
    assert jnp.array_equal(together[:, :24], alone)


@pytest.mark.usefixtures("optimized_compiles")
@pytest.mark.parametrize("shape", [(16, 1024), (16, 384), (2, 16, 512)])
def test_sharded_states_have_the_same_bits(shape):
    tx = build_optimizer(OptimizerConfig(**EIGHT_BITS), total_steps=10)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    rules = [Rule(pattern=".*", spec=PartitionSpec("fsdp", "tensor"))]
    params = {"layers" if len(shape) == 3 else "head": {"kernel": jnp.ones(shape)}}
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)

    def update(params, gradient):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradient, state, params)
        return updates, state

    alone = jax.jit(update)(params, gradient)
    there = jax.jit(update)(shard(params, mesh, rules), shard(gradient, mesh, rules))

    assert all(map(jnp.array_equal, jax.tree.leaves(alone), jax.tree.leaves(jax.device_get(there))))


def test_adafactor_has_no_states_in_eight_bits():
    with pytest.raises(ValueError, match="adafactor keeps a row and a column"):
        OptimizerConfig(name="adafactor", state_dtype="int8")
