"""Int8: laws of the rounding, the products and the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lorax_ft.quantization import Int8, QuantizationConfig, bits_per_parameter, quantize_array

pytestmark = pytest.mark.usefixtures("optimized_compiles")

CONFIG = QuantizationConfig(kind="int8")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_value_is_rounded_to_the_nearest_of_255_steps_of_its_output_channel():
    values = normal(50, 8) * np.logspace(-6, 6, 8, dtype=np.float32)
    kernel = quantize_array(values, CONFIG)
    step = np.abs(values).max(axis=0) / 127
    # half a step, and the rounding of the three float32 operations
    assert np.all(np.abs(kernel.dense() - values) <= 0.5001 * step)
    assert isinstance(kernel, Int8)
    assert kernel.quantized.dtype == np.int8
    assert kernel.quantized.min() >= -127


def test_zero_channels_stay_zero_and_extremes_stay_exact():
    values = normal(16, 3)
    values[:, 1] = 0
    values[0, 2] = -100
    kernel = quantize_array(values, CONFIG)
    assert np.all(kernel.dense()[:, 1] == 0)
    np.testing.assert_allclose(kernel.dense()[0, 2], -100, rtol=1e-6)


def test_weights_take_eight_bits_and_a_scale_for_each_output():
    kernel = quantize_array(jnp.zeros((512, 16)), CONFIG)
    assert bits_per_parameter(kernel) == 8 + 32 / 512


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_raise_with_the_path(value):
    with pytest.raises(ValueError, match=r"layer/kernel .* not finite"):
        quantize_array(np.full((4, 4), value, np.float32), CONFIG, path="layer/kernel")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_equal_those_of_the_dense_kernel(dtype):
    kernel = quantize_array(normal(12, 5), CONFIG).astype(dtype)
    x, z = jnp.asarray(normal(3, 12)).astype(dtype), jnp.asarray(normal(3, 5)).astype(dtype)
    weight = kernel.dense()
    assert weight.dtype == kernel.linear(x).dtype == dtype
    tolerance = {"float32": 1e-5, "bfloat16": 2**-6}[dtype]  # order of summation
    for got, expected in (
        (kernel.linear(x), x @ weight),
        (kernel.linear_transposed(z), z @ weight.T),
    ):
        got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_the_dense_product():
    kernel, x = quantize_array(jnp.asarray(normal(12, 5)), CONFIG), jnp.asarray(normal(3, 12))
    cotangent = jnp.asarray(normal(3, 5, seed=1))
    kernel_grad, x_grad = jax.vjp(lambda kernel, x: kernel.linear(x), kernel, x)[1](cotangent)
    expected_grad, expected_x_grad = jax.vjp(lambda kernel, x: x @ kernel.dense(), kernel, x)[1](
        cotangent
    )
    np.testing.assert_allclose(x_grad, expected_x_grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(kernel_grad.absmax, expected_grad.absmax, rtol=1e-4, atol=1e-5)
    assert kernel_grad.quantized.dtype == jax.dtypes.float0


def test_forward_keeps_only_integers_for_the_backward_pass():
    kernel, x = quantize_array(jnp.asarray(normal(12, 5)), CONFIG), jnp.ones((3, 12))
    kept = jax.tree.leaves(jax.eval_shape(lambda: jax.vjp(kernel.linear, x)[1]))
    assert sorted(array.shape for array in kept) == [(5,), (12, 5)]
    assert {array.dtype for array in kept if array.ndim == 2} == {np.dtype(np.int8)}


def test_a_stack_scans_as_its_layers_and_any_core_is_taken():
    stacked = quantize_array(jnp.asarray(0.1 * normal(3, 6, 2, 3)), CONFIG, in_axes=(-3,))
    assert (stacked.stack_shape, stacked.core_shape) == ((3,), (6, 2, 3))
    x = jnp.asarray(normal(4, 6))

    def layer(x, kernel):
        return jnp.tanh(kernel.linear(x)), None

    scanned = jax.jit(lambda x: jax.lax.scan(layer, x, stacked)[0])(x)
    for weight in stacked.dense():
        x = jnp.tanh(x @ weight.reshape(6, 6))
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-5)


def test_take_gives_rows_of_the_dense_kernel():
    kernel = quantize_array(normal(12, 5), CONFIG)
    ids = jnp.array([[3, 11], [0, 12]])
    np.testing.assert_array_equal(kernel.take(ids), kernel.dense().at[ids].get(mode="fill"))


def test_fields_are_sharded_as_the_kernel_is():
    kernel = quantize_array(normal(2, 12, 5), CONFIG)
    specs = kernel.partition_specs(PartitionSpec("layers", "data", "tensor"))
    assert specs.quantized == PartitionSpec("layers", "data", "tensor")
    assert specs.absmax == PartitionSpec("layers", "tensor")
