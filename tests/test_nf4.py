"""NF4 and FP4: bit-exact with bitsandbytes; laws of the leaf's products, gradients and layout."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from lorax_ft.quantization import (
    FP4,
    NF4,
    QuantizationConfig,
    bits_per_parameter,
    from_bitsandbytes,
    quantize_array,
    to_bitsandbytes,
)
from lorax_ft.quantization.codebooks import dynamic_map
from lorax_ft.quantization.nf4 import _select

pytestmark = pytest.mark.usefixtures("optimized_compiles")

CONFIGS = {
    "nf4": QuantizationConfig(double_quantization=False),
    "nf4, double": QuantizationConfig(),
    "fp4, double, blocks of 32": QuantizationConfig(kind="fp4", block_size=32),
}
SHAPES = {"blocked": (128, 24), "flat": (172, 10), "flat, odd": (7, 3)}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# --- Bit for bit ----------------------------------------------------------------------------------


def golden_cases(shared):
    folder = shared / "golden" / "nf4"
    for case in json.loads((folder / "manifest.json").read_text())["cases"]:
        arrays = np.load(folder / case["file"])
        # torch's weight [out, in]; a golden of one or three axes is the same flat array
        weight = arrays["input"].reshape(-1, case["shape"][-1]).astype(case["input_dtype"])
        for name in case["quantisations"]:
            kind, block, scheme = name.split(".")
            config = QuantizationConfig(
                kind=kind, block_size=int(block[1:]), double_quantization=scheme == "dq"
            )
            fields = {
                k.removeprefix(f"{name}."): arrays[k] for k in arrays.files if k.startswith(name)
            }
            yield case["name"], weight, config, fields


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_golden_is_reproduced_to_the_bit(shared, kind, double):
    count = 0
    for name, weight, config, golden in golden_cases(shared):
        if (config.kind, config.double_quantization) != (kind, double):
            continue
        if name in ("inf", "nan"):
            with pytest.raises(ValueError, match=r"layer/kernel .* not finite"):
                quantize_array(weight.T, config, path="layer/kernel")
            continue
        tensors = to_bitsandbytes(quantize_array(weight.T, config))
        state = json.loads(tensors[f"weight.quant_state.bitsandbytes__{kind}"].tobytes())
        np.testing.assert_array_equal(tensors["weight"][:, 0], golden["packed"], err_msg=name)
        np.testing.assert_array_equal(tensors["weight.absmax"], golden["absmax"], err_msg=name)
        if double:
            np.testing.assert_array_equal(tensors["weight.nested_absmax"], golden["nested_absmax"])
            np.testing.assert_array_equal(tensors["weight.nested_quant_map"], golden["nested_code"])
            assert state["nested_offset"] == golden["offset"], name
        count += 1
    assert count >= 44


DTYPES = {"deq_f32": jnp.float32, "deq_bf16": jnp.bfloat16, "deq_f16": jnp.float16}
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # XLA flushes what is smaller to zero


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantised_goldens_are_reproduced_to_the_bit(shared, kind):
    in_each_dtype = jax.jit(
        lambda kernel: {name: kernel.astype(dtype).dense() for name, dtype in DTYPES.items()}
    )
    for name, weight, config, golden in golden_cases(shared):
        if config.kind != kind or name in ("inf", "nan"):
            continue
        for field, values in in_each_dtype(quantize_array(weight.T, config)).items():
            if field not in golden:  # the largest are kept in float32 alone
                continue
            got = np.asarray(values, np.float32).T.reshape(-1)
            expected = golden[field].reshape(-1)
            if field == "deq_bf16":
                expected = expected.view(ml_dtypes.bfloat16)
            expected = expected.astype(np.float32)
            flushed = (got == 0) & (np.abs(expected) < SMALLEST_NORMAL)
            assert np.all((got == expected) | flushed), (name, config, field)


def test_the_documented_weight_has_the_documented_bytes():
    i = np.arange(512 * 384)
    weight = (0.05 * np.sin(0.7 * i) * np.exp(((-i) % 97) / 50)).astype(np.float32)

    tensors = to_bitsandbytes(quantize_array(weight.reshape(512, 384).T, QuantizationConfig()))

    assert tensors["weight"][:8, 0].tolist() == [126, 254, 180, 16, 39, 222, 234, 65]
    assert digest(tensors["weight"]).startswith("9994fa3eccb9178d")
    assert digest(tensors["weight.absmax"]).startswith("748b74a92da78bdf")
    state = json.loads(tensors["weight.quant_state.bitsandbytes__nf4"].tobytes())
    assert state["nested_offset"] == 0.29109838604927063


def test_the_dynamic_map_is_bitsandbytes_own():
    assert digest(dynamic_map()).startswith("e732639a65f497b4")
    assert dynamic_map()[127] == 0


@pytest.mark.parametrize("variant", ["nf4_dq", "nf4_plain", "fp4_dq", "nf4_dq_bf16storage"])
def test_serialised_linear4bit_layers_are_read_multiplied_and_written_back(shared, variant):
    tensors = load_file(shared / "golden" / "nf4" / "linear4bit.safetensors")
    state = {
        key.removeprefix(f"{variant}.state."): value
        for key, value in tensors.items()
        if key.startswith(f"{variant}.state.weight")
    }
    kernel = from_bitsandbytes(state)

    x, bias = tensors[f"{variant}.x"], tensors[f"{variant}.state.bias"]
    y = kernel.linear(jnp.asarray(x)) + bias[None]
    np.testing.assert_allclose(y, tensors[f"{variant}.y"], atol=1e-5)  # order of summation

    written = to_bitsandbytes(kernel)
    assert written.keys() == state.keys()
    for key, value in state.items():
        assert written[key].tobytes() == value.tobytes(), key

    kind = "fp4" if variant.startswith("fp4") else "nf4"
    config = QuantizationConfig(kind=kind, double_quantization="dq" in variant)
    again = to_bitsandbytes(quantize_array(tensors[f"{variant}.float_weight"].T, config))
    assert all(again[key].tobytes() == value.tobytes() for key, value in state.items())


def test_bitsandbytes_round_trip_keeps_every_field(shape, config):
    kernel = quantize_array(normal(*shape), config)
    again = from_bitsandbytes(to_bitsandbytes(kernel))
    assert jax.tree.structure(kernel) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, kernel, again)


def test_bitsandbytes_conversion_refuses_what_it_cannot_keep():
    stacked = quantize_array(normal(2, 64, 3), QuantizationConfig())
    with pytest.raises(ValueError, match="stack"):
        to_bitsandbytes(stacked)
    tensors = to_bitsandbytes(quantize_array(normal(64, 3), QuantizationConfig()))
    with pytest.raises(ValueError, match="quant_map"):
        from_bitsandbytes(tensors | {"weight.quant_map": np.zeros(16, np.float32)})
    with pytest.raises(ValueError, match="expected one tensor"):
        from_bitsandbytes({"weight": tensors["weight"]})


@pytest.mark.parametrize(
    ("kind", "double", "error"),
    [("nf4", False, 0.00846), ("nf4", True, 0.00846), ("fp4", True, 0.01486)],
)
def test_reconstruction_error_of_normal_numbers_is_the_published_one(kind, double, error):
    values = normal(1024, 512)
    config = QuantizationConfig(kind=kind, double_quantization=double)
    kernel = quantize_array(values, config)
    # half a percent: what half a million random numbers leave open
    np.testing.assert_allclose(np.mean((kernel.dense() - values) ** 2), error, rtol=0.005)


@pytest.mark.parametrize(
    ("double", "block_size", "bits"), [(False, 64, 4.5), (True, 64, 4.126953), (False, 128, 4.25)]
)
def test_bits_per_parameter_are_measured_on_the_arrays(double, block_size, bits):
    config = QuantizationConfig(double_quantization=double, block_size=block_size)
    kernel = quantize_array(jnp.zeros((1024, 1024)), config)
    # one offset of 32 bits a kernel is beside the formula
    assert bits_per_parameter(kernel) == pytest.approx(bits, abs=32 / kernel.size + 1e-6)


# --- Layout ---------------------------------------------------------------------------------------


def test_fields_lie_in_the_kernels_own_orientation():
    kernel = quantize_array(normal(3, 128, 24), QuantizationConfig())
    assert kernel.packed.shape == (3, 64, 24)
    assert kernel.absmax.shape == (3, 2, 24)
    assert kernel.nested_absmax.shape == (3, 1)
    assert kernel.offset.shape == (3,)
    assert kernel.packed.dtype == kernel.absmax.dtype == np.uint8


def test_the_first_half_of_a_block_is_in_the_high_nibbles():
    values = np.full((64, 1), -1.0, np.float32)
    values[:32] = 1.0  # codes 15 and 0
    kernel = quantize_array(values, QuantizationConfig())
    assert np.all(kernel.packed == 0xF0)


@pytest.mark.parametrize(
    ("shape", "in_axes", "torch_order"),
    [
        ((6, 64), (-1,), lambda core: core),
        ((64, 3, 2), (-3,), lambda core: core.reshape(64, 6).T),
        ((4, 16, 5), (-3, -2), lambda core: core.reshape(64, 5).T),
        ((3, 4, 5), (-3, -2), lambda core: core.reshape(12, 5).T),
    ],
)
def test_blocks_run_over_the_inputs_whatever_the_shape(shape, in_axes, torch_order, config):
    core = normal(*shape)
    kernel = quantize_array(core, config, in_axes=in_axes)
    expected = quantize_array(torch_order(core).T, config)
    assert kernel.shape == shape
    assert (
        to_bitsandbytes(kernel)["weight"].tobytes() == to_bitsandbytes(expected)["weight"].tobytes()
    )
    np.testing.assert_array_equal(torch_order(np.asarray(kernel.dense())), expected.dense().T)


def test_a_stack_is_quantised_layer_by_layer(shape, config):
    values = normal(2, 2, *shape)
    stacked = quantize_array(values, config)
    assert stacked.stack_shape == (2, 2)
    assert stacked.dense().shape == values.shape
    for i in range(2):
        single = quantize_array(values[1, i], config)
        sliced = jax.tree.map(lambda field, i=i: field[1, i], stacked)
        jax.tree.map(np.testing.assert_array_equal, single, sliced)
        np.testing.assert_array_equal(stacked.dense()[1, i], single.dense())


# --- Products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_equal_those_of_the_dense_kernel(shape, config, dtype):
    kernel = quantize_array(normal(*shape), config).astype(dtype)
    x = jnp.asarray(normal(2, 5, shape[0])).astype(dtype)
    z = jnp.asarray(normal(4, shape[1])).astype(dtype)
    wide = {"preferred_element_type": jnp.float32}

    @jax.jit
    def compute(kernel):
        weight = kernel.dense()
        return [
            (kernel.linear(x), x @ weight),
            (kernel.linear_transposed(z), z @ weight.T),
            (kernel.linear(x, **wide), jnp.matmul(x, weight, **wide)),
        ]

    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]  # order of summation
    for got, expected in compute(kernel):
        assert got.dtype == expected.dtype
        got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_dense_product(shape, config, transposed):
    kernel = quantize_array(jnp.asarray(normal(*shape)), config)
    x, cotangent = jnp.asarray(normal(5, shape[transposed])), normal(5, shape[not transposed])

    def product(kernel, x):
        return kernel.linear_transposed(x) if transposed else kernel.linear(x)

    def dense_product(kernel, x):
        return x @ (kernel.dense().T if transposed else kernel.dense())

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(function, kernel, x):
        return jax.vjp(function, kernel, x)[1](jnp.asarray(cotangent))

    kernel_grad, x_grad = gradients(product, kernel, x)
    expected_kernel_grad, expected_x_grad = gradients(dense_product, kernel, x)
    np.testing.assert_allclose(x_grad, expected_x_grad, rtol=1e-5, atol=1e-5)
    assert kernel_grad.packed.dtype == jax.dtypes.float0
    for name in ["nested_absmax", "offset"] if config.double_quantization else ["absmax"]:
        got, expected = getattr(kernel_grad, name), getattr(expected_kernel_grad, name)
        assert np.any(got != 0), name
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_mixed_precision_gradients_have_the_dtypes_of_a_dense_product():
    kernel = quantize_array(normal(64, 8), QuantizationConfig(dtype="bfloat16"))
    x = jnp.ones((3, 64), jnp.bfloat16)
    loss = lambda x: kernel.linear(x, preferred_element_type=jnp.float32).sum()
    assert jax.grad(loss)(x).dtype == jnp.bfloat16


def test_forward_keeps_only_packed_arrays_for_the_backward_pass(shape, config):
    kernel = quantize_array(jnp.asarray(normal(*shape)), config)
    x = jnp.ones((5, shape[0]))

    def residuals(of):
        return jax.tree.leaves(jax.eval_shape(lambda: jax.vjp(of, kernel, x)[1]))

    frozen = jax.eval_shape(lambda: jax.vjp(kernel.linear, x)[1])
    sizes = sorted(array.shape for array in jax.tree.leaves(frozen))
    assert sizes == sorted(field.shape for field in jax.tree.leaves(kernel))
    everything = residuals(lambda kernel, x: kernel.linear(x))
    assert not any(array.dtype == jnp.float32 and array.shape == shape for array in everything)
    assert any(array.shape == x.shape for array in everything)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(128, 24), (172, 10)])
def test_scan_remat_vmap_and_jit_give_what_a_loop_gives(shape, double):
    config = QuantizationConfig(double_quantization=double)
    stacked = quantize_array(jnp.asarray(0.1 * normal(3, *shape)), config)
    x = jnp.asarray(normal(4, shape[0]))

    def layer(x, kernel):
        return x + jnp.tanh(kernel.linear_transposed(jnp.tanh(kernel.linear(x)))), None

    def loop(x):
        for weight in stacked.dense():
            x = x + jnp.tanh(jnp.tanh(x @ weight) @ weight.T)
        return x.sum()

    @jax.jit
    def compute(stacked, x):
        scanned = lambda x, body: jax.lax.scan(body, x, stacked)[0].sum()
        first = jax.tree.map(lambda field: field[0], stacked)
        return {
            "loop": jax.grad(loop)(x),
            "scan": jax.grad(scanned)(x, layer),
            "remat": jax.grad(scanned)(x, jax.checkpoint(layer)),
            "products": x[None] @ stacked.dense(),
            "vmap over kernels": jax.vmap(lambda kernel: kernel.linear(x))(stacked),
            "vmap over x": jax.vmap(jax.grad(lambda x: first.linear(x[None]).sum()))(x),
        }

    got = compute(stacked, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(got["scan"], got["loop"])
    close(got["remat"], got["loop"])
    close(got["vmap over kernels"], got["products"])
    close(got["vmap over x"], np.tile(stacked.dense()[0].sum(1), (4, 1)))


def test_a_sweep_over_inputs_dequantises_a_shared_kernel_once():
    kernel = quantize_array(jnp.asarray(normal(64, 8)), QuantizationConfig())
    members = jnp.ones((5, 3, 64))
    program = str(jax.make_jaxpr(jax.vmap(jax.grad(lambda x: kernel.linear(x).sum())))(members))
    assert "f32[64,8]" in program
    assert "f32[5,64,8]" not in program
    assert "u8[5," not in program


def test_a_stack_has_no_single_product():
    stacked = quantize_array(normal(2, 64, 3), QuantizationConfig())
    with pytest.raises(ValueError, match="stack"):
        stacked.linear(jnp.ones((1, 64)))


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_take_gives_rows_of_the_dense_kernel(shape, config, mode):
    kernel = quantize_array(normal(*shape), config)
    ids = jnp.arange(shape[0])[::-1].reshape(-1, 1)
    if mode != "promise_in_bounds":
        ids = jnp.concatenate([ids, jnp.array([[shape[0]], [shape[0] + 70]])])
    expected = kernel.dense().at[ids].get(mode=mode)
    np.testing.assert_allclose(kernel.take(ids, mode=mode), expected, rtol=1e-6, atol=1e-7)


def test_take_of_a_negative_row_is_nan_as_in_a_gather():
    kernel = quantize_array(normal(64, 3), QuantizationConfig())
    assert jnp.isnan(kernel.take(jnp.array([-1]), mode="fill")).all()


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [NF4.table, FP4.table], ids=["nf4", "fp4"])
def test_selects_on_bits_look_up_what_a_gather_does(table):
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(_select(table, codes), table)


@pytest.mark.parametrize(("platform", "gathers"), [("tpu", False), ("cuda", True), ("cpu", True)])
def test_only_a_tpu_looks_codes_up_by_selects(platform, gathers):
    kernel = quantize_array(normal(64, 8), QuantizationConfig(double_quantization=False))
    traced = jax.jit(lambda kernel, x: kernel.linear(x)).trace(kernel, jnp.ones((2, 64)))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.gather" in program) == gathers


@pytest.mark.parametrize(
    "spec", [PartitionSpec(None, "data", "tensor"), PartitionSpec("data"), PartitionSpec()]
)
def test_sharded_kernels_give_the_unsharded_product(spec, config):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    kernel = quantize_array(jnp.asarray(normal(2, 256, 32)), config)
    specs = kernel.partition_specs(spec)
    place = lambda field, spec: jax.device_put(field, NamedSharding(mesh, spec))
    is_spec = lambda value: isinstance(value, PartitionSpec)
    placed = jax.tree.map(lambda spec, field: place(field, spec), specs, kernel, is_leaf=is_spec)
    shards = [1 if name is None else mesh.shape[name] for name in (*spec, None, None, None)[:3]]
    local = placed.packed.addressable_shards[0].data.shape
    assert local == tuple(n // k for n, k in zip(kernel.packed.shape, shards))

    x = jnp.asarray(normal(3, 256))
    multiply = jax.jit(jax.vmap(lambda kernel, x: kernel.linear(x), in_axes=(0, None)))
    np.testing.assert_allclose(multiply(placed, x), multiply(kernel, x), rtol=1e-5, atol=1e-4)


def test_flat_blocks_are_sharded_along_the_stack_alone():
    kernel = quantize_array(normal(2, 172, 8), QuantizationConfig())
    specs = kernel.partition_specs(PartitionSpec("layers", "data", "tensor"))
    assert specs.packed == specs.absmax == PartitionSpec("layers", None)
    assert specs.offset == PartitionSpec("layers")
