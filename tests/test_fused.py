"""Fused products with a four-bit kernel: what is computed, and where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_ft import models, planning
from lorax_ft.generation import GenerationConfig, generate
from lorax_ft.jaxprs import live
from lorax_ft.methods import LoRA
from lorax_ft.models import LlamaConfig
from lorax_ft.models.layers import REMAT_POLICIES
from lorax_ft.planning import costs, hlo, targets
from lorax_ft.quantization import (
    QuantizationConfig,
    fused,
    gpu_product,
    quantize,
    quantize_array,
    tilings,
    tpu_product,
)
from lorax_ft.training.flops import count_flops
from tests.compilers import needs_gpu_compiler, needs_tpu_compiler

IN, OUT = 512, 128


def kernel_of(*stack, in_size=IN, out_size=OUT, kind="nf4", **options):
    matrix = np.random.default_rng(0).normal(size=(*stack, in_size, out_size)) / in_size**0.5
    config = QuantizationConfig(kind=kind, **options)
    return quantize_array(matrix.astype(np.float32), config).astype(jnp.bfloat16)


def inputs_of(*shape):
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)


def linear(kernel, x):
    return kernel.linear(x)


def linear_transposed(kernel, x):
    return kernel.linear_transposed(x)


def root_mean_square(values):
    return float(np.sqrt(np.square(np.asarray(values, np.float32)).mean()))


# --- The kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "kind", "block_size"),
    [(1, "nf4", 64), (5, "fp4", 64), (16, "nf4", 128), (20, "nf4", 64), (64, "fp4", 128)],
)
def test_the_kernel_for_gpus_computes_the_dequantised_product(rows, kind, block_size):
    in_size, out_size = 48 * block_size, 256  # several blocks a split, several columns of programs
    options = {"kind": kind, "block_size": block_size, "double_quantization": rows != 5}
    kernel = kernel_of(in_size=in_size, out_size=out_size, **options)
    x = inputs_of(rows, in_size)
    tiling = tilings.gpu_tiling(rows, in_size, out_size, block_size)
    assert tiling is not None
    assert tiling.splits == (16 if rows <= 16 else 8)

    found = gpu_product.product(
        x,
        kernel.packed,
        kernel.float_absmax(),
        kernel.table,
        block_size=kernel.block_size,
        tiling=tiling,
        interpret=True,
    )

    expected = kernel.linear(x)
    assert found.dtype == expected.dtype
    difference = np.asarray(found, np.float32) - np.asarray(expected, np.float32)
    # the table's values are rounded to bfloat16, relatively by 2**-9 at most, and so are the sums
    assert root_mean_square(difference) < 2**-8 * root_mean_square(expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "in_size", "out_size", "kind", "block_size"),
    [
        (1, 256, 384, "nf4", 64),  # tiles of the kernel are 256 by 128
        (20, 640, 128, "fp4", 128),  # five tiles are summed
        (tilings.ROWS + 52, 128, 256, "nf4", 64),  # two tiles of rows, the second not whole
    ],
)
def test_the_kernel_for_tpus_computes_the_dequantised_product(
    rows, in_size, out_size, kind, block_size, transposed
):
    kernel = kernel_of(in_size=in_size, out_size=out_size, kind=kind, block_size=block_size)
    x = inputs_of(rows, out_size if transposed else in_size)
    tiling = tilings.tpu_tiling(rows, in_size, out_size, block_size)
    assert tiling is not None

    found = tpu_product.product(
        x,
        kernel.packed,
        kernel.float_absmax(),
        kernel.table,
        block_size=kernel.block_size,
        transposed=transposed,
        tiling=tiling,
        interpret=True,
    )

    expected = (linear_transposed if transposed else linear)(kernel, x)
    assert found.dtype == expected.dtype
    # float32 sums in another order, then one rounding to bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float32),
        np.asarray(expected, np.float32),
        rtol=2**-7,
        atol=2**-16 * root_mean_square(expected) * 8,
    )
    assert (found == expected).mean() > 0.99


@pytest.mark.parametrize(("rows", "in_size", "out_size", "block_size", "tiling"), [
    (1, 4096, 14336, 64, (16, 512, 512)),
    (2049, 11008, 1280, 128, (1040, 256, 256)),
    (8192, 4096, 4096, 512, (2048, 512, 512)),
    (1, 4096, 4096, 1024, None),  # a block is more than a tile
    (1, 4096, 4096, 32, None),
    (1, 4096, 4000, 64, None),
    (1, 64 * 53, 128, 64, None),
    (0, 4096, 4096, 64, None),
])  # fmt: skip
def test_tiles_divide_the_kernel_or_the_shape_is_left_to_xla(
    rows, in_size, out_size, block_size, tiling
):
    found = tilings.tpu_tiling(rows, in_size, out_size, block_size)
    assert found == (None if tiling is None else tilings.TpuTiling(*tiling))


@pytest.mark.parametrize(("rows", "in_size", "out_size", "block_size", "splits"), [
    (1, 4096, 4096, 64, 16),
    (16, 4096, 14336, 64, 16),
    (17, 4096, 4096, 64, 8),
    (64, 4096, 1024, 128, 8),
    (1, 2816, 1024, 64, 11),  # of 44 blocks
    (1, 64 * 53, 128, 64, None),  # 53 blocks
    (1, 172, 128, 64, None),  # blocks that do not lie within columns
    (1, 4096, 4000, 64, None),
    (1, 4096, 4096, 32, None),
    (65, 4096, 4096, 64, None),
    (0, 4096, 4096, 64, None),
])  # fmt: skip
def test_splits_divide_the_blocks_or_the_shape_is_left_to_xla(
    rows, in_size, out_size, block_size, splits
):
    tiling = tilings.gpu_tiling(rows, in_size, out_size, block_size)
    assert (None if tiling is None else tiling.splits) == splits


# --- Where they run -------------------------------------------------------------------------------


@pytest.fixture
def marked(monkeypatch):
    """Other functions in the kernels' places: a program's text says which of them is there."""

    def marks(mark):
        def product(x, packed, absmax, table, *, block_size, tiling, transposed=False):
            size = 2 * packed.shape[0] if transposed else packed.shape[1]
            return jnp.broadcast_to(mark(x[:, :1] + absmax[0, 0].astype(x.dtype)), (len(x), size))

        return product

    monkeypatch.setattr(gpu_product, "product", marks(jnp.cbrt))
    monkeypatch.setattr(tpu_product, "product", marks(jnp.expm1))
    monkeypatch.setattr(fused, "_has_triton", lambda: True)


def is_fused(function, *operands, platforms=("cuda",)):
    text = jax.jit(function).trace(*operands).lower(lowering_platforms=platforms).as_text()
    assert not ("cbrt" in text and "exponential_minus" in text)
    return ("exponential_minus" if platforms == ("tpu",) else "cbrt") in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_program_for_one_accelerator_is_fused_and_no_other(marked, platform):
    kernel, x = kernel_of(), inputs_of(2, 4, IN)
    assert is_fused(linear, kernel, x, platforms=(platform,))
    for others in (("cpu",), ("cpu", platform)):
        assert not is_fused(linear, kernel, x, platforms=others)

    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put((kernel, x), whole)
    assert not is_fused(linear, *placed, platforms=(platform,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert not is_fused(linear, kernel, x, platforms=(platform,))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_only_products_in_bfloat16_are_fused(marked, platform):
    kernel, x = kernel_of(), inputs_of(4, IN)
    fused_here = functools.partial(is_fused, platforms=(platform,))
    assert fused_here(linear, kernel_of(kind="fp4"), x)
    assert fused_here(lambda kernel, x: lax.map(lambda x: kernel.linear(x), x), kernel, x)
    assert not fused_here(linear, kernel.astype(jnp.float32), x.astype(jnp.float32))
    wide = lambda kernel, x: kernel.linear(x, preferred_element_type=jnp.float32)
    assert not fused_here(wide, kernel, x)
    assert not fused_here(linear, kernel_of(in_size=IN + 12), inputs_of(4, IN + 12))
    assert not fused_here(linear, kernel_of(kind="int8"), x)


@pytest.mark.parametrize(("platform", "expected"), [("cuda", False), ("tpu", True)])
def test_many_rows_and_transposed_products_are_fused_for_tpus_alone(marked, platform, expected):
    kernel = kernel_of()
    for function, x in ((linear, inputs_of(65, IN)), (linear_transposed, inputs_of(4, OUT))):
        assert is_fused(function, kernel, x, platforms=(platform,)) == expected


def test_many_inputs_of_one_kernel_are_fused_and_many_kernels_are_not(marked):
    kernel, stack, x = kernel_of(), kernel_of(3), inputs_of(3, 4, IN)
    of_inputs = jax.vmap(linear, in_axes=(None, 0))
    assert is_fused(of_inputs, kernel, x)
    assert not is_fused(of_inputs, kernel, inputs_of(3, 30, IN))
    assert not is_fused(jax.vmap(linear), stack, x)
    assert is_fused(lambda stack, x: lax.map(lambda both: linear(*both), (stack, x)), stack, x)

    expected = jnp.stack([linear(kernel, x) for x in x])
    np.testing.assert_array_equal(of_inputs(kernel, x), expected)
    one_by_one = lax.map(lambda both: linear(*both), (stack, x))
    np.testing.assert_array_equal(jax.vmap(linear)(stack, x), one_by_one)


def test_an_adapted_kernel_is_fused_and_for_tpus_its_gradient_too(marked):
    kernel, x = kernel_of(), inputs_of(4, IN)
    factors = [jnp.ones((2, size), jnp.float32) for size in (IN, OUT)]
    adapted = LoRA(base=kernel, a=factors[0], b=factors[1], scale=jnp.float32(2), rank=jnp.int32(2))
    assert is_fused(linear, adapted, x)

    def loss(x, kernel):
        return jnp.square(kernel.linear(x).astype(jnp.float32)).sum()

    assert is_fused(jax.grad(loss), x, kernel, platforms=("tpu",))
    back = lambda x, kernel, dy: jax.vjp(lambda x: kernel.linear(x), x)[1](dy)
    assert is_fused(back, x, kernel, inputs_of(4, OUT), platforms=("tpu",))
    assert not is_fused(back, x, kernel, inputs_of(4, OUT))
    dense = kernel.matrix()
    expected = jax.grad(lambda x: jnp.square((x @ dense).astype(jnp.float32)).sum())(x)
    # both round the gradient of the product to bfloat16 and sum 128 of its multiples
    np.testing.assert_allclose(
        np.asarray(jax.grad(loss)(x, kernel), np.float32),
        np.asarray(expected, np.float32),
        rtol=2**-7,
        atol=2**-7 * root_mean_square(expected),
    )


def test_a_fused_product_counts_as_the_product_that_it_is():
    kernel, x = kernel_of(), inputs_of(2, 4, IN)
    assert count_flops(jax.jit(linear).trace(kernel, x).jaxpr) == 2 * 8 * IN * OUT

    def products(policy):
        @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[policy])
        def layer(x):
            return jnp.tanh(kernel.linear(x))

        def loss(x):
            return layer(x).astype(jnp.float32).sum()

        jaxpr = jax.jit(jax.value_and_grad(loss)).trace(x).jaxpr
        return str(live(jaxpr)).count("= four_bit_product")

    assert products("full") == 3  # forward, again, and back
    assert products("dots") == products("dots_without_batch") == 2


@pytest.mark.parametrize("spec", [(None, None), (None, "tensor"), ("tensor", None)], ids=str)
def test_on_a_mesh_each_device_multiplies_its_own_part(spec, monkeypatch):
    """On CPUs, where what each device runs is the plain product."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    kernel, rows = kernel_of(in_size=512, out_size=256), ("data", "fsdp")
    x, dy = inputs_of(8, 3, 512), inputs_of(8, 3, 256)
    expected = jax.vjp(kernel.linear, x)
    kernel = jax.tree.map(place, kernel)  # whole on every device; "fsdp" would split it, too
    kernel = kernel.gathered_as(NamedSharding(mesh, PartitionSpec(*spec)))

    def traced():  # a function of its own each time, or jax remembers the first trace
        def both(kernel, x, dy):
            y, pull = jax.vjp(kernel.linear, x)
            return y, pull(dy)[0]

        return jax.jit(both).trace(kernel, place(x, rows), place(dy, rows))

    plain = traced().jaxpr
    by_xla, arithmetic = str(plain), count_flops(plain)
    monkeypatch.setattr(fused, "_runs_kernels", lambda mesh: True)
    own = traced().jaxpr
    in_parts = str(own)
    y, dx = traced().lower().compile()(kernel, place(x, rows), place(dy, rows))

    assert "shard_map" not in by_xla
    assert in_parts.count("shard_map[") == in_parts.count("= four_bit_product") == 2
    assert arithmetic == 2 * 2 * 24 * 512 * 256
    assert count_flops(own) == arithmetic * (2 if spec == (None, None) else 1)  # both of "tensor"
    assert in_parts.count("psum") == (0 if spec == (None, None) else 1)
    for found, wanted in ((y, expected[0]), (dx, expected[1](dy)[0])):
        assert found.sharding.spec[0] == rows
        # sums over devices are rounded to bfloat16 in between
        difference = np.asarray(found, np.float32) - np.asarray(wanted, np.float32)
        assert root_mean_square(difference) < 2**-8 * root_mean_square(wanted)


def test_texts_are_written_by_fused_products(marked):
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
    )
    model = models.build(config, task="causal_lm", dtype="bfloat16", param_dtype="bfloat16")
    targets = ".*(attention|mlp)/.*/kernel"
    params = quantize(model.init(jax.random.key(0)), QuantizationConfig(targets=targets))
    inputs = {"input_ids": np.ones((2, 3), np.int32)}

    def write(params, inputs):
        return generate(model, params, inputs, GenerationConfig(max_new_tokens=4))

    # seven products of a layer, in the pass that reads the prompt and in the one of each token
    assert str(jax.make_jaxpr(write)(params, inputs)).count("= four_bit_product") == 14
    assert is_fused(write, params, inputs)


@pytest.fixture
def no_cache():
    """Without the compilation cache: what is compiled for no device is not read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@needs_gpu_compiler
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("block_size", tilings.BLOCK_SIZES)
def test_the_gpu_compiler_takes_the_kernel(rows, block_size, monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    (device,) = targets.compiler(planning.parse_target("h100")).devices
    sharding = jax.sharding.SingleDeviceSharding(device)
    kernel = kernel_of(block_size=block_size)
    kernel, x = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        (kernel, inputs_of(rows, IN)),
    )

    lowered = jax.jit(linear).trace(kernel, x).lower()

    assert "triton" in lowered.as_text()
    assert lowered.compile().memory_analysis() is not None


@needs_tpu_compiler
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("block_size", [64, 128])
def test_the_tpu_compiler_takes_the_kernel_and_keeps_no_dense_copy(block_size):
    target = planning.parse_target("tpu-v5e:2x2")
    planning.prepare_process(target)
    sharding = jax.sharding.SingleDeviceSharding(targets.compiler(target).devices[0])
    kernel = kernel_of(in_size=2048, out_size=2048, block_size=block_size)
    kernel, x, dy = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        (kernel, inputs_of(48, 2048), inputs_of(48, 2048)),
    )

    def both(kernel, x, dy):
        y, pull = jax.vjp(kernel.linear, x)
        return y, pull(dy)

    compiled = jax.jit(both).trace(kernel, x, dy).lower().compile()

    kernels = [kernel for kernel, flops, _ in costs.kernels(hlo.parse(compiled.as_text())) if flops]
    assert len(kernels) == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 2048  # a half of a dense copy
