"""A loss is the same whether its logits are there at once or a piece at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_ft import QuantizationConfig, inspect, partition, quantize_array
from lorax_ft.adapted import make_apply, make_outputs
from lorax_ft.logits import Logits
from lorax_ft.methods import LoraConfig, add_lora, set_dropout_key
from lorax_ft.models import ComputeConfig, LlamaConfig, build
from lorax_ft.training import OBJECTIVES, MeshConfig, make_mesh, make_train_step, shard, shard_batch
from lorax_ft.training.cross_entropy import cross_entropy
from lorax_ft.training.flops import count_flops

BATCH, LENGTH, SIZE, WORDS = 2, 7, 64, 96
KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.normal(KEYS[0], (BATCH, LENGTH, SIZE))
KERNEL = jax.random.normal(KEYS[1], (SIZE, WORDS))
BIAS = jax.random.normal(KEYS[2], (WORDS,))
TARGETS = jax.random.randint(KEYS[3], (BATCH, LENGTH), 0, WORDS)
WEIGHTS = jax.random.uniform(KEYS[4], (BATCH, LENGTH)).at[0, :3].set(0)
PLACE = 4 * BATCH * WORDS  # bytes of the logits of one place of each text


def with_lora(kernel, rate=0.0):
    config = LoraConfig(targets=".*", rank=2, dropout=rate)
    leaf = add_lora({"head": {"kernel": kernel}}, config, KEYS[5])["head"]["kernel"]
    return leaf.replace(b=jax.random.normal(KEYS[5], leaf.b.shape))


def heads():
    """Kernels in every form that a head may have."""
    nf4 = quantize_array(KERNEL, QuantizationConfig())
    return {
        "kernel": {"kernel": KERNEL},
        "kernel, bias and softcap": {"kernel": KERNEL, "bias": BIAS, "softcap": 5.0},
        "table and bias": {"kernel": KERNEL.T, "bias": BIAS, "is_table": True},
        "lora": {"kernel": with_lora(KERNEL)},
        "lora on a table": {"kernel": with_lora(KERNEL.T), "is_table": True},
        "lora on nf4": {"kernel": with_lora(nf4)},
        "nf4": {"kernel": nf4},
    }


def loss(arrays, head, places=LENGTH):
    """Of float arrays of x, head and weights, the others being in `head`; (loss, predictions)."""
    x, fields, weights = arrays
    head = jax.tree.map(lambda new, old: old if new is None else new, fields, head, is_leaf=none)
    return cross_entropy(
        dataclasses.replace(head, x=x, most_bytes=places * PLACE), TARGETS, weights
    )


def none(value):
    return value is None


def floats(tree):
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)


def close(got, want, rtol=1e-4, atol=1e-5):
    """Float32 sums in another order."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", heads())
def test_pieces_give_the_loss_and_gradients_of_the_whole(name):
    head = Logits(x=None, **heads()[name])
    arrays = (X, floats(head), WEIGHTS)
    find = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)

    (want, predictions), gradient = find(arrays, head, LENGTH)

    (got, found), pieces = find(arrays, head, 2)

    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(found, predictions)
    close(pieces, gradient)


def test_pieces_of_less_than_a_place_and_without_a_gradient_give_the_same_loss():
    head = Logits(x=None, kernel=KERNEL)

    want, got = (loss((X, None, WEIGHTS), head, places) for places in (LENGTH, 0.1))

    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_array_equal(got[1], want[1])


def test_pieces_of_bfloat16_are_the_whole_within_its_rounding():
    head = Logits(x=None, kernel=KERNEL.astype(jnp.bfloat16))
    arrays = (X.astype(jnp.bfloat16), floats(head), WEIGHTS)
    find = jax.value_and_grad(loss, has_aux=True)

    (want, _), gradient = find(arrays, head)
    (got, _), pieces = find(arrays, head, 2)

    np.testing.assert_allclose(got, want, rtol=1e-6)  # logits are float32
    # bfloat16 has 8 bits; the head's gradient is summed in float32, the whole's rounded once
    close(pieces, gradient, rtol=2**-7, atol=2**-6)


def test_without_any_weight_loss_and_gradient_are_zero():
    find = jax.value_and_grad(lambda arrays: loss(arrays, Logits(x=None, kernel=KERNEL), 2)[0])

    total, gradient = find((X, Logits(x=None, kernel=KERNEL), jnp.zeros_like(WEIGHTS)))

    assert total == 0
    assert not gradient[0].any()
    assert not gradient[1].kernel.any()


def test_the_head_is_met_once_on_the_way_there_and_once_on_the_way_back():
    head = Logits(x=None, kernel=KERNEL)

    jaxpr = jax.make_jaxpr(jax.grad(lambda x: loss((x, None, WEIGHTS), head, 2)[0]))(X)

    product = 2 * BATCH * 8 * SIZE * WORDS  # of seven places, cut into pieces of two
    assert count_flops(jaxpr) == 2 * product  # logits, and their gradient by x


@pytest.mark.parametrize("each", [jax.vmap, lambda f: lambda stack: jax.lax.map(f, stack)])
def test_members_of_a_sweep_have_the_loss_and_gradient_that_they_have_alone(each):
    head = Logits(x=None, **heads()["lora"])

    def one(a, x, places=LENGTH):
        kernel = dataclasses.replace(head, kernel=head.kernel.replace(a=a))
        return loss((x, None, WEIGHTS), kernel, places)[0]

    find, a = jax.value_and_grad(one, argnums=(0, 1)), head.kernel.a
    stack = (jnp.stack([a, -a]), jnp.stack([X, 2 * X]))

    got = each(lambda pair: find(*pair, 2))(stack)

    for i, want in enumerate((find(a, X), find(-a, 2 * X))):
        close(jax.tree.map(lambda array, i=i: array[i], got), want)


def test_each_piece_drops_for_itself():
    ones = jnp.ones_like(X)
    head = {"head": with_lora(jnp.zeros_like(KERNEL), rate=0.5)}
    kernel = set_dropout_key(head, KEYS[0])["head"]
    x = jax.grad(lambda x: loss((x, None, WEIGHTS), Logits(x=None, kernel=kernel), 1)[0])(ones)

    kept = np.asarray(x != 0)[1]  # by x, of inputs that were kept alone

    assert 0.35 < kept.mean() < 0.65
    assert len({place.tobytes() for place in kept}) == LENGTH


# --- A language model -----------------------------------------------------------------------------

TEXTS, TOKENS, VOCABULARY = 8, 16, 96
SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
PLACES = 4  # that a piece has of each text
BYTES = 4 * TEXTS * PLACES * VOCABULARY


def language_model(**fields):
    config = LlamaConfig(**SIZES, intermediate_size=32, vocab_size=VOCABULARY, **fields)
    return build(config, task="causal_lm", logits_bytes=BYTES)


def adapted(model):
    params = model.init(KEYS[0])
    uses = inspect(model.apply, params, model.input_shapes())
    config = LoraConfig(targets=".*(kernel|embedding)", rank=2)  # the head's too
    params = add_lora(params, config, KEYS[1], uses)
    return jax.tree.map(lambda x: x + 0.01 if x.dtype == jnp.float32 else x, params)


def tokens():
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (TEXTS, TOKENS)).astype(np.int32)
    labels = np.where(np.arange(TOKENS) < 3, -100, ids).astype(np.int32)
    return {"input_ids": ids, "labels": labels, "weights": (np.arange(TEXTS) < 7) * np.float32(1)}


def step_of(apply, **options):
    return make_train_step(apply, OBJECTIVES["causal_lm"], optax.sgd(1.0), **options)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_is_the_same_in_pieces_in_parts_and_on_a_mesh(tied):
    model = language_model(tie_word_embeddings=tied, model_type="gemma2" if tied else "llama")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params, batch = adapted(model), tokens()

    def run(step, params, batch):
        train, frozen = partition(params)
        train, state = jax.tree.map(jnp.copy, (train, optax.sgd(1.0).init(train)))
        train, _, metrics = step(train, state, frozen, batch, jax.random.key(0))
        return train, metrics["loss"], metrics["gradient_norm"]

    want = run(step_of(make_apply(model)), params, batch)
    alone = run(step_of(make_outputs(model)), params, batch)
    parts = run(step_of(make_outputs(model), accumulation=2), params, batch)
    # a device may hold as much as all of them did, so that all of them cut as before
    each = dataclasses.replace(model, compute=ComputeConfig(logits_bytes=BYTES // mesh.size))
    shards = run(step_of(make_outputs(each, mesh)), shard(params, mesh), shard_batch(batch, mesh))

    for got in (alone, parts, shards):
        close(got, want)


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"logits_bytes must be at least 1, got 0"):
        ComputeConfig(logits_bytes=0)
