"""Attention gives the same numbers by every kernel, and each is chosen where it serves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.models import attending
from lorax_ft.models.attending import KERNELS, Kernel, Products, Seen, attend
from lorax_ft.models.layers import ATTENTIONS
from lorax_ft.training import MeshConfig, make_mesh
from lorax_ft.training.flops import count_flops
from tests.compilers import needs_tpu_compiler

BATCH, LENGTH = 2, 130  # a length that is no multiple of a TPU's lanes
INTERPRETED = functools.partial(attending.splash, interpret=True)


def arrays(length: int = LENGTH, heads: int = 4, kv_heads: int = 2, batch: int = BATCH):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (batch, length, n, 16))
        for key, n in zip(keys, (heads, kv_heads, kv_heads))
    ]


def mask_of(*lengths: int):
    places = np.arange(LENGTH) < np.array(lengths)[:, None]
    return jnp.asarray(places)[:, None, None]


SEGMENTS = jnp.repeat(jnp.array([[1, 2, 3, 0], [1, 1, 2, 2]]), jnp.array([40, 50, 30, 10]), axis=1)
CASES = {
    "causal": (Seen(is_causal=True), Products()),
    "both ways": (Seen(), Products(scale=0.5)),
    "padding": (Seen(mask=mask_of(130, 70)), Products()),
    "causal padding in front": (Seen(mask=mask_of(130, 70)[..., ::-1], is_causal=True), Products()),
    "window": (Seen(is_causal=True, window=33), Products()),
    "window both ways": (Seen(window=20), Products()),
    "texts that share a row": (Seen(is_causal=True, segments=SEGMENTS), Products()),
    "windowed texts": (Seen(is_causal=True, segments=SEGMENTS, window=17), Products()),
    "softcap": (Seen(is_causal=True), Products(softcap=2.0)),
}


def real_places(seen: Seen):
    places = jnp.ones((BATCH, LENGTH), bool) if seen.mask is None else seen.mask[:, 0, 0]
    places = places if seen.segments is None else places & (seen.segments > 0)
    return places.astype(jnp.float32)[:, :, None, None]


@pytest.mark.parametrize("case", CASES)
def test_splash_attention_and_its_gradients_are_those_of_plain_products(case):
    seen, products = CASES[case]
    query, key, value = arrays()
    weights = jax.random.normal(jax.random.key(1), query.shape)
    weights = weights * real_places(seen)

    def loss(function, *arrays):
        y = function(*arrays, seen, products)
        return jnp.sum(y * weights), y * real_places(seen)

    grad = functools.partial(jax.grad, argnums=(1, 2, 3), has_aux=True)
    wanted, y = jax.jit(grad(loss), static_argnums=0)(attending.plain, query, key, value)
    found, y_found = jax.jit(grad(loss), static_argnums=0)(INTERPRETED, query, key, value)

    np.testing.assert_allclose(y_found, y, atol=2e-5)
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize(
    ("sizes", "gathered"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 0),
        ({"fsdp": 2, "tensor": 4}, 0),  # more devices than heads of keys
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, 2),  # keys and values
    ],
)
def test_on_a_mesh_each_device_computes_its_rows_heads_and_queries(sizes, gathered, monkeypatch):
    monkeypatch.setitem(KERNELS, "splash", Kernel(INTERPRETED))
    mesh = make_mesh(MeshConfig(**sizes))
    given = arrays(256, batch=4)
    heads = "tensor" if sizes["tensor"] == 2 else None
    lies = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence", heads))
    there = [jax.device_put(x, lies) for x in given]

    @jax.jit
    def compute(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attend(*arrays, Seen(is_causal=True), kernel="splash")

    np.testing.assert_allclose(compute(*there), attend(*given, Seen(is_causal=True)), atol=2e-5)
    text = compute.lower(*there).compile().as_text()
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) <= gathered


def chosen(monkeypatch, *arrays, **options) -> str:
    """The kernel that `attend` takes."""
    taken = []
    for name, one in KERNELS.items():
        take = lambda query, *_, name=name: (taken.append(name), query)[1]
        monkeypatch.setitem(KERNELS, name, Kernel(take, one.lacks, one.serves))
    attend(*arrays, **options)
    return taken[0]


@pytest.mark.parametrize(
    ("platform", "length", "changes", "kernel"),
    [
        ("cpu", 256, {}, "xla"),
        ("tpu", 256, {}, "splash"),
        ("tpu", 128, {}, "xla"),  # too short to be worth it
        ("gpu", 256, {}, "cudnn"),
        ("gpu", 256, {"products": Products(softcap=1.0)}, "xla"),
        ("tpu", 256, {"products": Products(softcap=1.0)}, "splash"),
        ("tpu", 256, {"seen": Seen(first=3)}, "xla"),  # a cache
        ("tpu", 256, {"seen": Seen(crosses=True)}, "xla"),  # an encoder's keys, as many by chance
        ("tpu", 256, {"seen": Seen(window=jnp.array(4))}, "xla"),  # a scanned layer's
        ("tpu", 256, {"products": Products(dropout_rate=0.1, dropout_key=1)}, "xla"),
    ],
)
def test_each_platform_has_its_kernel_where_it_serves(
    monkeypatch, platform, length, changes, kernel
):
    given = [x.astype(jnp.bfloat16) for x in arrays(length)]

    assert chosen(monkeypatch, *given, kernel="auto", platform=platform, **changes) == kernel


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
@pytest.mark.parametrize("seen", [Seen(is_causal=True), Seen()], ids=["causal", "both ways"])
def test_as_much_arithmetic_is_counted_whatever_computes_attention(monkeypatch, kernel, seen):
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)  # which is asked for where a call is only traced
    given = [x.astype(jnp.bfloat16) for x in arrays(256)]

    def loss(kernel, *arrays):
        return jnp.sum(KERNELS[kernel].attend(*arrays, seen, Products()).astype(jnp.float32) ** 2)

    def counted(function, kernel):
        return count_flops(jax.jit(function, static_argnums=0).trace(kernel, *given).jaxpr)

    product = 2 * given[0].size * given[1].shape[1]  # of all queries with all keys
    # splash attention states the sums of an output by its gradient as a product
    sums = 2 * given[0].size if kernel == "splash" else 0

    assert counted(loss, "xla") == counted(loss, kernel) == 2 * product
    gradient = jax.grad(loss, argnums=(1, 2, 3))
    assert counted(gradient, "xla") == counted(gradient, kernel) - sums == 6 * product


def test_float32_is_nothing_for_cudnn(monkeypatch):
    assert chosen(monkeypatch, *arrays(256), kernel="auto", platform="gpu") == "xla"
    with pytest.raises(ValueError, match="'cudnn' knows no float32, only bfloat16"):
        attend(*arrays(), kernel="cudnn")


def test_what_splash_attention_never_has_is_an_error_where_it_is_asked_for():
    with pytest.raises(ValueError, match="'splash' knows no bias of positions"):
        attend(*arrays(), products=Products(bias=jnp.zeros((1, 4, 130, 130))), kernel="splash")
    with pytest.raises(ValueError, match=r"windows that differ .* scan_layers=False"):
        attend(*arrays(), Seen(window=jnp.array(4)), kernel="splash")


def test_the_table_and_the_config_name_the_same_kernels():
    assert set(ATTENTIONS) == {"auto", *KERNELS}


@needs_tpu_compiler
def test_a_tpus_compiler_takes_splash_attention_forward_and_backward_on_a_mesh():
    from lorax_ft import planning

    mesh = make_mesh(
        MeshConfig(data=1, fsdp=2, tensor=2),
        planning.compiler(planning.parse_target("tpu-v5e:2x2")).devices,
    )
    lies = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=lies)
    given = [shape((4, 1024, heads, 64)) for heads in (8, 4, 4)]

    def loss(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            y = attend(*arrays, Seen(is_causal=True), kernel="auto", platform="tpu")
        return jnp.sum(y.astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()

    assert "tpu_custom_call" in compiled.as_text()
    scores = 2 * 4 * 1024 * 1024 * 4  # of one device, in float32
    assert compiled.memory_analysis().temp_size_in_bytes < scores
