"""`lift` runs a function on leaves as it would run on the arrays they stand for."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft.leaves import dense, is_leaf
from lorax_ft.lift import lift
from lorax_ft.methods.lora_leaf import LoRA


def random_lora(shape, *, stack=0, in_axes=(-2,), rank=3):
    stack_shape, core = shape[:stack], shape[stack:]
    in_size = int(np.prod([core[i] for i in in_axes]))
    keys = jax.random.split(jax.random.key(0), 3)
    return LoRA(
        base=0.5 * jax.random.normal(keys[0], shape),
        a=0.5 * jax.random.normal(keys[1], (*stack_shape, rank, in_size)),
        b=0.5 * jax.random.normal(keys[2], (*stack_shape, rank, int(np.prod(core)) // in_size)),
        scale=jnp.full(stack_shape, 0.5),
        rank=jnp.full(stack_shape, rank, jnp.int32),
        base_in_axes=in_axes,
    )


def to_dense(params):
    return jax.tree.map(dense, params, is_leaf=is_leaf)


def total(function):
    return lambda *args: jnp.sum(jnp.sin(function(*args)))


def assert_lifted_is_dense(function, params, *inputs):
    """Same values, and the same gradients for every field of the leaves and for the inputs."""

    def on_dense(params, *inputs):
        return function(to_dense(params), *inputs)

    @jax.jit
    def both(params, *inputs):
        argnums = tuple(range(len(inputs) + 1))
        sides = (lift(function), on_dense)
        values = [side(params, *inputs) for side in sides]
        return values, [
            jax.grad(total(side), argnums, allow_int=True)(params, *inputs) for side in sides
        ]

    (value, expected), (gradient, wanted) = both(params, *inputs)
    for got, want in zip(
        jax.tree.leaves((value, gradient)), jax.tree.leaves((expected, wanted)), strict=True
    ):
        if (
            got.dtype != jax.dtypes.float0
        ):  # float32 sums in another order, relative to the largest entry
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, np.abs(want).max()))


x = jax.random.normal(jax.random.key(9), (2, 5, 4))
heads = x.reshape(2, 5, 2, 2)


def layer(carry, kernel):
    return jnp.tanh(carry @ kernel), jnp.sum(carry)


@jax.custom_vjp
def doubled(x):
    return x * 2


doubled.defvjp(
    lambda x: (x * 2, None), lambda _, g: (g * 3,)
)  # a wrong derivative, so that it shows


@jax.custom_vjp
def own_product(x, kernel):
    return x @ kernel


own_product.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda saved, g: (g @ saved[1].T, jnp.einsum("btd,btf->df", saved[0], g)),
)

FUNCTIONS = {
    "dense": (lambda w, x: x @ w, random_lora((4, 6)), x),
    "dense general": (
        lambda w, x: jnp.einsum("btd,dhk->bthk", x, w),
        random_lora((4, 2, 3), in_axes=(-3,)),
        x,
    ),
    "heads to model": (
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w),
        random_lora((2, 2, 6), in_axes=(-3, -2)),
        heads,
    ),
    "contracted axes in another order": (
        lambda w, x: jnp.einsum("bthk,khd->btd", x, w.transpose(1, 0, 2)),
        random_lora((2, 2, 6), in_axes=(-3, -2)),
        heads,
    ),
    "kernel on the left": (lambda w, x: jnp.einsum("df,btd->ftb", w, x), random_lora((4, 6)), x),
    "torch orientation": (lambda w, x: x @ w.T, random_lora((6, 4), in_axes=(-1,)), x),
    "tied head": (
        lambda w, x: jnp.take(w, jnp.array([[0, 2]]), axis=0) @ w.T,
        random_lora((6, 4)),
        x,
    ),
    "reshaped kernel": (
        lambda w, x: jnp.einsum("btd,dhk->bhkt", x, w.reshape(4, 2, 3)),
        random_lora((4, 6)),
        x,
    ),
    "axis of size one": (
        lambda w, x: jnp.einsum("btd,zdf->btf", x, w[None]),
        random_lora((4, 6)),
        x,
    ),
    "batched experts": (
        lambda w, x: jnp.einsum("edf,ebd->ebf", w, x),
        random_lora((2, 4, 6), stack=1),
        x,
    ),
    "every expert": (
        lambda w, x: jnp.einsum("btd,edf->btef", x, w),
        random_lora((2, 4, 6), stack=1),
        x,
    ),
    "two stack axes": (
        lambda w, x: jnp.einsum("btd,gedf->bgetf", x, w),
        random_lora((3, 2, 4, 6), stack=2),
        x,
    ),
    "look-up": (
        lambda w, x: jnp.take(w, jnp.array([[0, 2], [1, 1]]), axis=0) * x[0, 0, 0],
        random_lora((4, 6)),
        x,
    ),
    "scan over layers": (
        lambda w, x: jax.lax.scan(layer, x, w)[0],
        random_lora((3, 4, 4), stack=1),
        x,
    ),
    "reversed, unrolled scan": (
        lambda w, x: jax.lax.scan(layer, x, w, reverse=True, unroll=2)[0],
        random_lora((3, 4, 4), stack=1),
        x,
    ),
    "scan of remat": (
        lambda w, x: jax.lax.scan(jax.checkpoint(layer), x, w)[0],
        random_lora((3, 4, 4), stack=1),
        x,
    ),
    "remat of scan of remat": (
        jax.checkpoint(lambda w, x: jax.lax.scan(jax.checkpoint(layer), x, w)[0]),
        random_lora((3, 4, 4), stack=1),
        x,
    ),
    "scan of scan": (
        lambda w, x: jax.lax.scan(lambda c, w: (jax.lax.scan(layer, c, w)[0], None), x, w)[0],
        random_lora((2, 3, 4, 4), stack=2),
        x,
    ),
    "shared layer": (
        lambda w, x: jax.lax.scan(lambda c, _: layer(c, w), x, None, length=3)[0],
        random_lora((4, 4)),
        x,
    ),
    "map": (lambda w, x: jax.lax.map(lambda row: row @ w, x), random_lora((4, 4)), x),
    "cond": (
        lambda w, x: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: 2 * (x @ w)),
        random_lora((4, 4)),
        x,
    ),
    "static index": (lambda w, x: (x @ w[1]) @ w[0], random_lora((3, 4, 4), stack=1), x),
    "traced index": (
        lambda w, x: x @ jax.lax.dynamic_index_in_dim(w, jnp.int32(2), 0, keepdims=False),
        random_lora((3, 4, 4), stack=1),
        x,
    ),
    "vmap inside": (lambda w, x: jax.vmap(lambda row: row @ w)(x), random_lora((4, 4)), x),
    "jit inside": (
        lambda w, x: jax.jit(lambda x, w: jax.nn.silu(x @ w))(x, w),
        random_lora((4, 4)),
        x,
    ),
    "custom_jvp on activations": (lambda w, x: jax.nn.relu(x @ w), random_lora((4, 4)), x),
    "custom_vjp on activations": (lambda w, x: doubled(x @ w), random_lora((4, 4)), x),
    "custom_vjp on a kernel": (lambda w, x: own_product(x, w), random_lora((4, 4)), x),
    "grad inside": (lambda w, x: jax.grad(total(lambda x: x @ w))(x), random_lora((4, 4)), x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_lifted_function_equals_the_dense_one_in_values_and_gradients(name):
    assert_lifted_is_dense(*FUNCTIONS[name])


def test_while_loops_take_leaves_as_constants():
    kernel = random_lora((4, 4))

    def power(w, x):
        return jax.lax.while_loop(
            lambda c: c[1] < 3, lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0)
        )[0]

    chex.assert_trees_all_close(
        lift(power)(kernel, x), power(dense(kernel), x), rtol=1e-5, atol=1e-5
    )


def test_lift_composes_with_jit_vmap_eval_shape_and_checkpoint():
    kernels = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 2]), random_lora((4, 6)))

    def model(w, x):
        return jnp.tanh(x @ w)

    members = [jax.tree.map(lambda f, i=i: f[i], kernels) for i in range(2)]
    expected = jnp.stack([model(dense(member), x) for member in members])
    mapped = jax.jit(jax.vmap(jax.checkpoint(lift(model)), in_axes=(0, None)))
    chex.assert_trees_all_close(mapped(kernels, x), expected, rtol=2e-5)
    assert jax.eval_shape(lift(model), random_lora((4, 6)), x).shape == (2, 5, 6)


def test_one_trace_serves_every_call_of_one_shape():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(w, x):
        return lift(lambda w, x: x @ w)(w, x)

    kernel = random_lora((4, 6))
    for scale in (1.0, 2.0, 3.0):
        step(jax.tree.map(lambda f: f + f, kernel), x * scale)


def test_lift_keeps_flags_defaults_and_the_structure_of_results():
    def model(params, x, *, train=False, scale=1.0, name="a"):
        assert isinstance(train, bool)
        assert name == "b"
        return {
            "y": x @ params["kernel"] * scale,
            "train": jnp.asarray(train),
            "kernel": params["kernel"],
        }

    kernel = random_lora((4, 6))
    result = lift(model)({"kernel": kernel}, x, train=True, name="b")
    assert result["train"]
    assert set(result) == {"y", "train", "kernel"}
    chex.assert_trees_all_equal(result["kernel"], kernel)


def test_lift_leaves_a_call_without_leaves_alone():
    assert lift(lambda w, x: (w, x))(1, "text") == (1, "text")


def test_bfloat16_compute_reaches_base_and_factors():
    kernel = random_lora((4, 6))
    y = lift(lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))(kernel, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), x @ dense(kernel), rtol=0.05, atol=0.1
    )  # 8 bits of mantissa


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x @ jnp.sin(w),
        lambda w, x: x + w[None, :1],
        lambda w, x: jnp.einsum("btd,de->bde", x, w),
        lambda w, x: jax.lax.scan(lambda c, _: (c + c, None), w, None, length=2)[0],
    ],
)
def test_a_leaf_that_meets_no_rule_raises_with_path_primitive_and_line(function):
    with pytest.raises(TypeError, match=r"(?s)'layer/kernel'.*LoRA leaf.*`\w+` at .*test_lift.py"):
        lift(lambda params, x: function(params["layer"]["kernel"], x))(
            {"layer": {"kernel": random_lora((4, 4))}}, x
        )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((2, 3), name="heads")(nn.LayerNorm(name="norm")(x))
        h = nn.DenseGeneral(4, axis=(-2, -1), name="out")(h)
        return x + nn.Dense(4, name="mlp")(nn.gelu(h)), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 4, name="embed")
        scanned = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return embed.attend(scanned(name="layers")(embed(ids), None)[0])


def test_a_linen_model_with_scan_remat_and_a_tied_head_equals_its_dense_self():
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    params = Linen().init(jax.random.key(0), ids)["params"]
    params["embed"]["embedding"] = random_lora((7, 4))
    layers = params["layers"]
    layers["heads"]["kernel"] = random_lora((3, 4, 2, 3), stack=1, in_axes=(-3,))
    layers["out"]["kernel"] = random_lora((3, 2, 3, 4), stack=1, in_axes=(-3, -2))
    layers["mlp"]["kernel"] = random_lora((3, 4, 4), stack=1)
    assert_lifted_is_dense(lambda p: Linen().apply({"params": p}, ids), params)


def test_an_nnx_model_equals_its_dense_self():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 6, rngs=rngs)
            self.second = nnx.LinearGeneral(6, (2, 2), rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.gelu(self.first(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    params["first"]["kernel"] = random_lora((4, 6))
    params["second"]["kernel"] = random_lora((6, 2, 2), in_axes=(-3,))

    def apply(params, x):
        filled = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(x)

    assert_lifted_is_dense(apply, params, x)


def test_a_sharded_product_equals_the_unsharded_one():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kernel = random_lora((8, 16))
    specs = kernel.partition_specs(jax.sharding.PartitionSpec(None, "tensor"))
    inputs = jax.random.normal(jax.random.key(1), (4, 8))
    placed = jax.tree.map(lambda f, s: jax.device_put(f, jax.NamedSharding(mesh, s)), kernel, specs)
    rows = jax.device_put(inputs, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    y = jax.jit(lift(lambda w, x: x @ w))(placed, rows)
    assert y.sharding.spec[-1] == "tensor" or y.sharding.is_fully_replicated
    np.testing.assert_allclose(y, inputs @ dense(kernel), rtol=1e-5, atol=1e-5)
