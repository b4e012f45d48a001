"""`quantize` rewrites a tree by patterns, at load time, and can be asked for shapes alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import trees
from lorax_ft.inspection import inspect
from lorax_ft.leaves import dense, is_leaf
from lorax_ft.lift import lift
from lorax_ft.quantization import (
    FP4,
    NF4,
    Int8,
    QuantizationConfig,
    bits_per_parameter,
    quantize,
    quantize_array,
)

SHAPE = jax.ShapeDtypeStruct


def model_params():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: 0.2 * jax.random.normal(next(keys), shape)
    return {
        "embeddings": {"word": {"embedding": normal(11, 64)}},
        "layers": {
            "query": {"kernel": normal(2, 64, 4, 8), "bias": jnp.zeros((2, 4, 8))},
            "output": {"kernel": normal(2, 4, 8, 64)},
        },
        "classifier": {"kernel": normal(64, 3)},
    }


def apply(params, ids):
    def layer(x, p):
        heads = jnp.einsum("ti,ihd->thd", x, p["query"]["kernel"]) + p["query"]["bias"][None]
        return x + jnp.einsum("thd,hdo->to", jnp.tanh(heads), p["output"]["kernel"]), None

    x = params["embeddings"]["word"]["embedding"][ids]
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return x @ params["classifier"]["kernel"]


IDS = jnp.array([1, 5, 2])


@pytest.mark.parametrize(("kind", "leaf"), [("nf4", NF4), ("fp4", FP4), ("int8", Int8)])
def test_a_quantised_model_computes_what_its_dense_parameters_do(kind, leaf):
    params = model_params()
    quantised = quantize(params, QuantizationConfig(kind=kind), inspect(apply, params, IDS))
    query, output = quantised["layers"]["query"]["kernel"], quantised["layers"]["output"]["kernel"]
    assert isinstance(query, leaf)
    assert (query.stack_shape, query.core_shape, query.in_axes) == ((2,), (64, 4, 8), (-3,))
    assert (output.stack_shape, output.core_shape, output.in_axes) == ((2,), (4, 8, 64), (-3, -2))

    dense_params = jax.tree.map(dense, quantised, is_leaf=is_leaf)
    loss = lambda table, params: (
        lift(apply)({**params, "embeddings": {"word": {"embedding": table}}}, IDS) ** 2
    ).sum()
    table = params["embeddings"]["word"]["embedding"]
    got = jax.jit(jax.value_and_grad(loss))(table, quantised)
    expected = jax.jit(jax.value_and_grad(loss))(table, dense_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_embeddings_heads_and_other_parameters_are_left_alone():
    params = model_params()
    quantised = quantize(params, QuantizationConfig(), inspect(apply, params, IDS))
    for path in ("embeddings/word/embedding", "classifier/kernel", "layers/query/bias"):
        assert trees.flatten(quantised)[path] is trees.flatten(params)[path]
    assert "NF4" in trees.summary(quantised)


def test_a_pattern_that_matches_nothing_raises_with_the_nearest_paths():
    with pytest.raises(ValueError, match=r"QuantizationConfig.targets.*layers/query/kernel"):
        quantize(model_params(), QuantizationConfig(targets=".*/querry/kernel"))
    with pytest.raises(ValueError, match=r"QuantizationConfig.exclude.*leaves nothing"):
        quantize(model_params(), QuantizationConfig(targets="classifier/kernel"))


def test_a_parameter_that_no_product_takes_raises():
    params = model_params()
    with pytest.raises(ValueError, match="layers/query/bias: the model uses it as 'bias'"):
        quantize(params, QuantizationConfig(targets=".*bias"), inspect(apply, params, IDS))


def test_what_cannot_be_quantised_raises_naming_the_path():
    config = QuantizationConfig()
    quantised = quantize_array(np.ones((64, 2), np.float32), config)
    with pytest.raises(ValueError, match="a/kernel is a NF4 leaf already"):
        quantize({"a": {"kernel": quantised}}, config)
    with pytest.raises(TypeError, match="a/kernel has dtype int32"):
        quantize({"a": {"kernel": np.ones((64, 2), np.int32)}}, config)
    with pytest.raises(TypeError, match="a/kernel is traced"):
        jax.jit(lambda w: quantize({"a": {"kernel": w}}, config))(jnp.ones((64, 2)))
    with pytest.raises(ValueError, match="a/kernel of shape"):
        quantize({"a": {"kernel": np.ones(64, np.float32)}}, config)
    for value in (np.nan, -np.inf):
        bad = np.ones((2, 64, 2), np.float32)
        bad[1, 3, 0] = value
        with pytest.raises(ValueError, match=r"a/kernel cannot be quantised.*not finite"):
            quantize({"a": {"kernel": bad}}, config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "nf3"}, "kind"),
        ({"block_size": 16}, "block_size"),
        ({"block_size": 96}, "block_size"),
        ({"block_size": 8192}, "block_size"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_a_config_that_makes_no_sense_names_its_field(change, named):
    with pytest.raises(ValueError, match=f"QuantizationConfig.{named}"):
        QuantizationConfig(**change)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(2, 128, 6), (2, 172, 3), (2, 3, 7, 5)])
def test_shapes_alone_give_the_leaf_that_arrays_would(kind, double, shape):
    config = QuantizationConfig(kind=kind, double_quantization=double)
    from_shape = quantize_array(SHAPE(shape, jnp.bfloat16), config)
    from_array = quantize_array(jnp.ones(shape, jnp.bfloat16), config)
    describe = lambda leaf: [(field.shape, field.dtype) for field in jax.tree.leaves(leaf)]
    assert describe(from_shape) == describe(from_array)
    assert jax.tree.structure(from_shape) == jax.tree.structure(from_array)
    assert from_shape.shape == shape


def test_arrays_stay_where_they_are_and_files_can_be_read_tensor_by_tensor():
    values = np.random.default_rng(0).standard_normal((3, 128, 8)).astype(np.float32)
    config = QuantizationConfig()
    on_host = quantize_array(values, config)
    assert all(isinstance(field, np.ndarray) for field in jax.tree.leaves(on_host))
    on_device = quantize_array(jnp.asarray(values), config)
    assert all(isinstance(field, jax.Array) for field in jax.tree.leaves(on_device))
    layers = [quantize_array(layer, config) for layer in values]
    stacked = jax.tree.map(lambda *fields: np.stack(fields), *layers)
    jax.tree.map(np.testing.assert_array_equal, stacked, on_host)


def test_the_model_sees_the_dtype_of_the_array_or_of_the_config():
    array = jnp.ones((64, 2), jnp.bfloat16)
    assert quantize_array(array, QuantizationConfig()).dtype == jnp.bfloat16
    kernel = quantize_array(array, QuantizationConfig(dtype="float32"))
    assert kernel.dtype == kernel.dense().dtype == jnp.float32
    assert kernel.astype(jnp.bfloat16).dense().dtype == jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Llama:
    layers: int
    d: int
    hidden: int
    gigabytes: float  # of all linear layers with double quantisation

    def shapes(self):
        kernel = lambda *shape: {"kernel": SHAPE((self.layers, *shape), jnp.bfloat16)}
        names = ("query", "key", "value", "output")
        return {
            "layers": {
                "attention": {name: kernel(self.d, self.d) for name in names},
                "mlp": {
                    "gate": kernel(self.d, self.hidden),
                    "up": kernel(self.d, self.hidden),
                    "down": kernel(self.hidden, self.d),
                },
            }
        }


@pytest.mark.parametrize(
    "model",
    [
        Llama(32, 4096, 11008, 3.341),
        Llama(40, 5120, 13824, 6.545),
        Llama(60, 6656, 17920, 16.561),
        Llama(80, 8192, 22016, 33.408),
    ],
    ids=["7B", "13B", "33B", "65B"],
)
def test_llama_has_the_published_size_and_nothing_is_allocated(model):
    quantised = quantize(model.shapes(), QuantizationConfig())
    gigabytes = trees.count(quantised).bytes / 1e9
    assert round(gigabytes, 3) == model.gigabytes
    assert bits_per_parameter(quantised) == pytest.approx(4.126953, abs=5e-6)
    plain = quantize(model.shapes(), QuantizationConfig(double_quantization=False))
    assert bits_per_parameter(plain) == 4.5


def test_double_quantisation_saves_three_gigabytes_of_the_largest_llama():
    shapes = Llama(80, 8192, 22016, 33.408).shapes()
    plain = quantize(shapes, QuantizationConfig(double_quantization=False))
    saved = trees.count(plain).bytes - trees.count(quantize(shapes, QuantizationConfig())).bytes
    assert saved / 1e9 == pytest.approx(3.02, abs=0.005)
