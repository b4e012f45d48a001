"""`inspect` finds out how a model uses its parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lorax_ft.inspection import inspect
from tests.test_lift import Linen


def test_a_scanned_linen_model_with_a_tied_head_is_read_whole():
    ids = jnp.array([[1, 2, 3]])
    params = Linen().init(jax.random.key(0), ids)["params"]
    uses = inspect(lambda p, ids: Linen().apply({"params": p}, ids), params, ids)
    layers = "layers/"
    assert {path: use.kind for path, use in uses.items()} == {
        "embed/embedding": "embedding",
        layers + "norm/scale": "scale",
        layers + "norm/bias": "bias",
        layers + "heads/kernel": "kernel",
        layers + "heads/bias": "bias",
        layers + "out/kernel": "kernel",
        layers + "out/bias": "bias",
        layers + "mlp/kernel": "kernel",
        layers + "mlp/bias": "bias",
    }
    assert uses["embed/embedding"].tied
    assert uses["embed/embedding"].in_axes == (-2,)
    assert uses[layers + "heads/kernel"].in_axes == (-3,)
    assert uses[layers + "out/kernel"].in_axes == (-3, -2)
    assert {uses[path].stack for path in uses if path.startswith(layers)} == {1}
    assert uses[layers + "out/bias"].kernel == layers + "out/kernel"
    assert uses[layers + "norm/bias"].kernel is None
    assert not any(use.is_head for use in uses.values())


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.Dense(4, name="hidden")(x)
        return nn.Dense(3, name="classifier")(jnp.tanh(nn.Dense(4, name="pooler")(x[:, 0])))


def test_the_head_is_the_one_kernel_that_every_result_passes_last():
    x = jnp.ones((2, 5, 4))
    params = jax.eval_shape(Classifier().init, jax.random.key(0), x)["params"]
    uses = inspect(lambda p, x: Classifier().apply({"params": p}, x), params, x)
    assert [path for path, use in uses.items() if use.is_head] == ["classifier/kernel"]


def test_the_torch_orientation_is_seen():
    uses = inspect(
        lambda w, x: x @ w["weight"].T + w["bias"][None],
        {"weight": jnp.ones((3, 4)), "bias": jnp.ones(3), "spare": jnp.ones(1)},
        jnp.ones((2, 4)),
    )
    assert uses["weight"].in_axes == (-1,)
    assert uses["bias"].kernel == "weight"
    assert uses["spare"].kind == "unused"


def test_layers_that_are_indexed_count_as_stacked():
    def model(w, x):
        return jnp.tanh(x @ w[0]) @ w[1]

    use = inspect(model, jnp.ones((2, 4, 4)), jnp.ones((3, 4)))[""]
    assert (use.kind, use.stack, use.in_axes) == ("kernel", 1, (-2,))


def test_experts_batched_by_einsum_count_as_stacked():
    use = inspect(
        lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), jnp.ones((3, 4, 5)), jnp.ones((3, 2, 4))
    )[""]
    assert (use.kind, use.stack, use.in_axes) == ("kernel", 1, (-2,))


@pytest.mark.parametrize("loop", ["while", "cond", "scan"])
def test_kernels_inside_loops_are_found(loop):
    def model(w, x):
        if loop == "while":
            return jax.lax.while_loop(
                lambda c: c[1] < 3, lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0)
            )[0]
        if loop == "cond":
            return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: 2 * (x @ w))
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]

    assert inspect(model, jnp.ones((4, 4)), jnp.ones((2, 4)))[""].kind == "kernel"
