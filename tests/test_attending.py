"""Attention gives the same numbers by every kernel, and each is chosen where it serves."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft import planning
from lorax_ft.axes import MEMBER
from lorax_ft.models import LlamaConfig, attending, build
from lorax_ft.models.attending import KERNELS, Kernel, Products, Seen, attend
from lorax_ft.models.layers import ATTENTIONS, REMAT_POLICIES
from lorax_ft.sweeps.devices import mesh_of, spread
from lorax_ft.training import MeshConfig, make_mesh
from lorax_ft.training.flops import count_flops
from tests.compilers import needs_gpu_compiler, needs_tpu_compiler

BATCH, LENGTH = 2, 130  # a length that is no multiple of a TPU's lanes
INTERPRETED = functools.partial(attending.splash.attend, interpret=True)


def arrays(length: int = LENGTH, batch: int = BATCH, keys: int | None = None, head_dim: int = 16):
    lengths = length, keys or length, keys or length
    return [
        jax.random.normal(key, (batch, size, heads, head_dim))
        for key, size, heads in zip(jax.random.split(jax.random.key(0), 3), lengths, (4, 2, 2))
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
    wanted, y = jax.jit(grad(loss), static_argnums=0)(attending.plain.attend, query, key, value)
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


def test_on_a_sweeps_devices_each_computes_its_members(monkeypatch):
    monkeypatch.setitem(KERNELS, "splash", Kernel(INTERPRETED))
    given = [jnp.stack([x, -x]) for x in arrays()]
    one = functools.partial(attend, seen=Seen(is_causal=True))
    members = jax.vmap(functools.partial(one, kernel="splash"), axis_name=MEMBER)
    computed = spread(lambda q, k, v: members(q, k, v), mesh_of(2), common=())

    np.testing.assert_allclose(computed(*given), jax.vmap(one)(*given), atol=2e-5)


def chosen(monkeypatch, *arrays, **options) -> str:
    """The kernel that `attend` takes."""
    taken = []
    for name, one in KERNELS.items():
        take = lambda query, *_, name=name: (taken.append(name), query)[1]
        monkeypatch.setitem(KERNELS, name, dataclasses.replace(one, attend=take))
    attend(*arrays, **options)
    return taken[0]


@pytest.mark.parametrize(
    ("platform", "length", "changes", "kernel"),
    [
        ("cpu", 256, {}, "xla"),
        ("tpu", 256, {}, "splash"),
        ("tpu", 128, {}, "xla"),  # too short to be worth it
        ("gpu", 128, {}, "cudnn"),
        ("gpu", 96, {}, "xla"),
        ("gpu", 128, {"seen": Seen(is_causal=True, window=33)}, "xla"),
        ("gpu", 256, {"seen": Seen(is_causal=True, window=33)}, "cudnn"),
        ("gpu", 256, {"products": Products(softcap=1.0)}, "xla"),
        ("tpu", 256, {"products": Products(softcap=1.0)}, "splash"),
        ("tpu", 256, {"seen": Seen(first=3)}, "xla"),  # a cache
        ("tpu", 256, {"seen": Seen(crosses=True)}, "xla"),  # an encoder's keys, as many by chance
        ("tpu", 256, {"seen": Seen(window=jnp.array(4))}, "xla"),  # a scanned layer's own
        ("tpu", 256, {"seen": Seen(window=np.int32(4))}, "splash"),
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


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_the_backward_pass_computes_no_kernel_again_whose_products_are_kept(monkeypatch, kernel):
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)
    given = [x.astype(jnp.bfloat16) for x in arrays(256)]

    def calls(remat):
        def layer(*arrays):
            return jnp.sum(KERNELS[kernel].attend(*arrays, Seen(is_causal=True), Products()) ** 2)

        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat])
        jaxpr = jax.jit(jax.value_and_grad(layer, argnums=(0, 1, 2))).trace(*given).jaxpr
        return count_flops(jaxpr) / (2 * given[0].size * given[1].shape[1])

    assert round(calls("full"), 1) == 8  # two products forward, again, and four backward
    assert round(calls("products"), 1) == 6


@pytest.mark.parametrize(
    ("seen", "products", "kernel"),
    [
        (Seen(is_causal=True), Products(), "cudnn"),
        (Seen(is_causal=True, window=33), Products(), "xla"),
        (Seen(segments=jnp.ones((BATCH, 256), jnp.int32)), Products(), "xla"),
        (Seen(mask=jnp.ones((BATCH, 1, 1, 256), bool)), Products(), "xla"),
        (Seen(mask=jnp.ones((BATCH, 1, 1, 256), bool), hides_ends=True), Products(), "cudnn"),
        (Seen(), Products(bias=jnp.zeros((1, 4, 256, 256))), "xla"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "cudnn"])
def test_cudnn_has_no_mask_for_members_of_a_sweep(monkeypatch, asked, seen, products, kernel):
    given = [jnp.stack([x, x]).astype(jnp.bfloat16) for x in arrays(256)]
    taken = []

    def member(*arrays):
        what = {"seen": seen, "products": products, "kernel": asked, "platform": "gpu"}
        taken.append(chosen(monkeypatch, *arrays, **what))

    jax.vmap(member, axis_name=MEMBER)(*given)
    assert taken == [kernel]


def test_float32_is_nothing_for_cudnn(monkeypatch):
    assert chosen(monkeypatch, *arrays(256), kernel="auto", platform="gpu") == "xla"
    with pytest.raises(ValueError, match="'cudnn' knows no float32, only bfloat16"):
        attend(*arrays(), kernel="cudnn")


@pytest.mark.parametrize(
    ("capability", "head_dim", "lacking"),
    [
        (None, 128, None),  # a plan, made without a card
        (None, 256, "head_dim of 256 here, only multiples of 8 up to 128"),
        ("8.6", 256, "head_dim of 256 here, only multiples of 8 up to 128"),  # Gemma on an A6000
        ("9.0", 256, None),
        ("9.0", 264, "head_dim of 264 here, only multiples of 8 up to 256"),
        ("10.0", 256, "head_dim of 256 here, only multiples of 8 up to 128"),
        ("9.0", 100, "head_dim of 100 here, only multiples of 8 up to 256"),
        ("7.5", 64, "card like this one, only NVIDIA's from Ampere on"),
        ("gfx942", 64, "card like this one, only NVIDIA's from Ampere on"),
    ],
)
def test_cudnn_has_heads_of_some_sizes_by_the_card(monkeypatch, capability, head_dim, lacking):
    if capability is not None:
        card = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda: [card])
    given = [x.astype(jnp.bfloat16) for x in arrays(256, head_dim=head_dim)]

    if lacking is not None:
        with pytest.raises(ValueError, match=f"'cudnn' knows no {lacking}: say 'xla'"):
            attend(*given, kernel="cudnn")
    kernel = chosen(monkeypatch, *given, kernel="auto", platform="gpu")
    assert kernel == ("cudnn" if lacking is None else "xla")


@pytest.mark.parametrize(
    ("length", "keys", "seen", "kernel"),
    [
        (257, 257, Seen(is_causal=True), "cudnn"),
        (257, 257, Seen(mask=jnp.ones((BATCH, 1, 1, 257), bool)), "xla"),
        (257, 257, Seen(mask=jnp.ones((BATCH, 1, 1, 257), bool), hides_ends=True), "cudnn"),
        (256, 259, Seen(is_causal=True), "xla"),  # behind a prefix
        (256, 258, Seen(is_causal=True), "cudnn"),
        (1, 259, Seen(is_causal=True, first=7), "cudnn"),  # a cache, which has no gradient
        (257, 257, Seen(is_causal=True, window=9), "xla"),
        (257, 257, Seen(is_causal=True, window=257), "cudnn"),  # which hides nothing
    ],
)
def test_cudnn_has_no_mask_of_an_odd_length(monkeypatch, length, keys, seen, kernel):
    given = [x.astype(jnp.bfloat16) for x in arrays(length, keys=keys)]

    assert chosen(monkeypatch, *given, seen=seen, kernel="auto", platform="gpu") == kernel
    assert chosen(monkeypatch, *given, seen=seen, kernel="cudnn") == kernel


PADDED = {  # what is seen beside the mask, and how many keys there are
    "causal": (Seen(is_causal=True), LENGTH),
    "both ways": (Seen(), LENGTH),
    "behind a prefix": (Seen(), LENGTH + 3),
    "of another text": (Seen(crosses=True), LENGTH - 5),
}


@pytest.mark.parametrize("case", PADDED)
def test_cudnn_is_told_of_padding_by_lengths_and_attention_is_the_same(case, monkeypatch):
    """By JAX's own products, that take lengths as cuDNN does."""
    asked, jaxs = [], jax.nn.dot_product_attention

    def by_xla(*args, implementation, **how):
        asked.append((implementation, how["mask"]))
        return jaxs(*args, **how, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    seen, keys = PADDED[case]
    hidden = jnp.array([0, 60])[:, None]
    mask = jnp.arange(keys)[None] < keys - hidden
    seen = dataclasses.replace(seen, mask=mask[:, None, None])
    real = (jnp.arange(LENGTH)[None] < LENGTH - (0 if seen.crosses else hidden))[..., None, None]
    weights = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, 4, 16))
    bias = jax.random.normal(jax.random.key(2), (1, 4, LENGTH, keys))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def compute(function, hides_ends, *arrays):
        def loss(*arrays):
            told = dataclasses.replace(seen, hides_ends=hides_ends)
            y = function(*arrays, told, Products(bias=bias))
            return jnp.sum(jnp.where(real, y * weights, 0)), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    wanted, y = compute(attending.plain.attend, False, *arrays(keys=keys))
    found, y_found = compute(attending.cudnn.attend, True, *arrays(keys=keys))

    assert asked == [("cudnn", None)]
    np.testing.assert_allclose(jnp.where(real, y_found - y, 0), 0, atol=2e-6)
    assert np.isfinite(y_found).all()
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_what_splash_attention_never_has_is_an_error_where_it_is_asked_for():
    with pytest.raises(ValueError, match="'splash' knows no bias of positions"):
        attend(*arrays(), products=Products(bias=jnp.zeros((1, 4, 130, 130))), kernel="splash")
    with pytest.raises(ValueError, match="windows that differ between layers which are scanned or"):
        attend(*arrays(), Seen(window=jnp.array(4)), kernel="splash")


SLIDING, FULL = "sliding_attention", "full_attention"


def windowed(window: int, types: tuple[str, ...], **how):
    """(the gradient of a model with that window in its layers, as a function of params; params)."""
    config = LlamaConfig(
        model_type="qwen3",
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        initializer_range=0.3,
        sliding_window=window,
        layer_types=types,
    )
    model = build(config, task="causal_lm", **how)
    batch = {"input_ids": jax.random.randint(jax.random.key(1), (1, 256), 0, 30)}
    return jax.grad(lambda params: jnp.square(model.apply(params, batch)).mean()), model


@pytest.mark.parametrize(
    ("window", "types", "scan_layers", "remat", "kernel"),
    [
        (100, (SLIDING, SLIDING), True, "none", "splash"),
        (100, (SLIDING, SLIDING), True, "full", "splash"),
        (100, (SLIDING, SLIDING), False, "full", "splash"),
        (100, (SLIDING, FULL), False, "none", "splash"),
        (100, (SLIDING, FULL), True, "none", "xla"),
        (256, (SLIDING, FULL), True, "none", "splash"),  # as many as there are keys: no window
    ],
)
def test_windows_reach_splash_attention_where_layers_are_scanned_and_computed_again(
    window, types, scan_layers, remat, kernel, monkeypatch
):
    taken = set()
    for name, one in KERNELS.items():
        take = lambda query, *_, name=name: (taken.add(name), query)[1]
        monkeypatch.setitem(KERNELS, name, dataclasses.replace(one, attend=take))

    how = {"scan_layers": scan_layers, "remat": remat, "platform": "tpu"}
    gradient, model = windowed(window, types, **how)
    params = model.shapes()  # of which a short text is read
    taken.clear()
    jax.eval_shape(gradient, params)

    assert taken == {kernel}


def test_a_model_with_windows_has_the_same_gradient_by_splash_attention(monkeypatch):
    splash = KERNELS["splash"]
    monkeypatch.setitem(KERNELS, "splash", Kernel(INTERPRETED, splash.lacks, splash.serves))
    how = {"remat": "full", "types": (SLIDING, SLIDING)}
    (plain, model), (fast, _) = (
        windowed(100, **how, attention=kernel, platform="tpu") for kernel in ("xla", "auto")
    )
    params = model.init(jax.random.key(0))

    wanted, found = jax.jit(plain)(params), jax.jit(fast)(params)

    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)  # sums in another order


def test_the_table_and_the_config_name_the_same_kernels():
    assert set(ATTENTIONS) == {"auto", *KERNELS}


@needs_tpu_compiler
def test_a_tpus_compiler_takes_splash_attention_forward_and_backward_on_a_mesh():
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


@needs_gpu_compiler
@pytest.mark.parametrize("members", [None, 2])
def test_a_gpus_compiler_is_given_no_matrix_where_texts_are_padded(members):
    """Nor where a sweep's members, that have their own queries, are given the same texts."""
    card = planning.compiler(planning.parse_target("h100")).devices[0]
    lies = jax.sharding.SingleDeviceSharding(card)
    length, lead = 1024, () if members is None else (members,)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=lies)
    given = [shape((*lead, 4, length, heads, 64)) for heads in (8, 4, 4)]
    mask = jax.ShapeDtypeStruct((4, 1, 1, length), bool, sharding=lies)

    def gradient(mask, *arrays):
        def loss(*arrays):
            seen = Seen(mask=mask, hides_ends=True, is_causal=True)
            y = attend(*arrays, seen, kernel="auto", platform="gpu")
            return jnp.sum(y.astype(jnp.float32) ** 2)

        one = jax.grad(loss, argnums=(0, 1, 2))
        return (one if members is None else jax.vmap(one, axis_name=MEMBER))(*arrays)

    text = jax.jit(gradient).lower(mask, *given).compile().as_text()

    assert text.count("__cudnn$fmhaSoftmax") >= 2  # forward and backward
    assert "1024,1024" not in text


@needs_gpu_compiler
def test_a_gpus_compiler_takes_members_of_a_sweep_whose_rows_have_many_texts():
    card = planning.compiler(planning.parse_target("h100")).devices[0]
    lies = jax.sharding.SingleDeviceSharding(card)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=lies)
    given = [shape((2, 4, 256, heads, 64)) for heads in (8, 4, 4)]
    segments = jax.ShapeDtypeStruct((2, 4, 256), jnp.int32, sharding=lies)

    @functools.partial(jax.vmap, axis_name=MEMBER)
    def gradient(segments, *arrays):
        def loss(*arrays):
            seen = Seen(segments=segments, is_causal=True)
            return jnp.sum(attend(*arrays, seen, kernel="auto", platform="gpu") ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    jax.jit(gradient).lower(segments, *given).compile()
