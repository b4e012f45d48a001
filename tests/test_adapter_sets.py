"""Many adapters on one base: a mixed batch equals separate runs, and a swap compiles nothing."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_ft import trees
from lorax_ft.inspection import inspect
from lorax_ft.lift import lift
from lorax_ft.methods import (
    LoraConfig,
    adapter_index,
    add_lora,
    index_from_inputs,
    merge,
    mix,
    select,
    set_dropout_key,
    set_index,
    stack_adapters,
)
from lorax_ft.models import hub
from lorax_ft.quantization import QuantizationConfig, quantize
from lorax_ft.training import OBJECTIVES, make_train_step

D, IDS = 8, jax.random.randint(jax.random.key(5), (10, 3), 0, 7)
TARGETS = r".*/(embedding|kernel)"
RANKS = (2, 3, 1, 2, 3, 3, 2, 1)
NAMES = tuple("abcdefgh")
NUMBERS = np.array([3, 0, 1, -1, 7, 2, 6, 5, 4, 3], np.int32)


def base():
    keys = jax.random.split(jax.random.key(1), 5)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape) / np.sqrt(D)
    return {
        "tokens": {"embedding": normal(0, 7, D)},
        "layers": {
            "query": {"kernel": normal(1, 2, D, D), "bias": normal(2, 2, D)},
            "value": {"kernel": normal(3, 2, D, D)},
        },
        "classifier": {"kernel": normal(4, D, 2)},
    }


def layer(x, p):
    rows = jnp.tanh(x.reshape(-1, D) @ p["query"]["kernel"] + p["query"]["bias"][None])
    return x + (rows @ p["value"]["kernel"]).reshape(x.shape), None


def apply(params, ids):
    """Scanned, with remat: ids [batch, length] to [batch, 2]."""
    x = jnp.take(params["tokens"]["embedding"], ids, axis=0)
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return x.mean(axis=1) @ params["classifier"]["kernel"]


def unrolled(params, ids):
    x = jnp.take(params["tokens"]["embedding"], ids, axis=0)
    for name in ("layers_0", "layers_1"):
        x, _ = layer(x, params[name])
    return x.mean(axis=1) @ params["classifier"]["kernel"]


def unrolled_base():
    params = base()
    layers = params.pop("layers")
    return params | {
        f"layers_{i}": jax.tree.map(lambda array, i=i: array[i], layers) for i in range(2)
    }


def trained(params, seed):
    """The params with factors as any training leaves them; padding stays zero."""

    def moved(path, leaf):
        if trees.kind(leaf)[:4] != "LoRA":
            return leaf
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), len(path)))
        a, b = (0.5 * jax.random.normal(k, f.shape) for k, f in zip(keys, (leaf.a, leaf.b)))
        return leaf.replace(a=a, b=b)

    return trees.map_with_path(moved, params)


def adapters(params, ranks=RANKS, **options):
    config = {"targets": TARGETS, "alpha": 1.0, **options}
    return {
        name: trained(add_lora(params, LoraConfig(rank=rank, **config), jax.random.key(0)), seed)
        for seed, (name, rank) in enumerate(zip(NAMES, ranks))
    }


def loss_of(model):
    """Loss, outputs and gradients of the trainable half; the examples count by their place, so
    that no two are alike."""

    def loss(train, frozen, index, own):
        params = trees.combine(train, frozen)
        outputs = lift(model)(params if index is None else set_index(params, index), IDS)
        weights = own * jnp.arange(1.0, 11.0)
        return jnp.sum(jnp.sin(outputs) * weights[:, None]), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def factors(slopes, number=None):
    """Gradients of `a` and `b` by path, of one adapter of a mix or of the only one."""
    return {
        path: tuple(f if number is None else f[..., number, :, :] for f in (leaf.a, leaf.b))
        for path, leaf in trees.flatten(slopes).items()
        if leaf is not None
    }


NF4 = QuantizationConfig(targets=".*/(query|value)/kernel", exclude=())


@pytest.mark.parametrize(
    ("model", "params"),
    [(apply, base()), (unrolled, unrolled_base()), (apply, quantize(base(), NF4))],
    ids=["scan of remat", "unrolled", "NF4"],
)
def test_a_mixed_batch_equals_eight_separate_runs_in_outputs_and_gradients(model, params):
    together = stack_adapters(adapters(params))
    train, frozen = trees.partition(mix(together, NUMBERS))
    (_, outputs), slopes = loss_of(model)(train, frozen, NUMBERS, jnp.ones(10))

    separate = loss_of(model)
    for number, name in enumerate(NAMES):
        mine = np.equal(NUMBERS, number)
        halves = trees.partition(select(together, name))
        (_, alone), expected = separate(*halves, None, jnp.asarray(mine, jnp.float32))
        np.testing.assert_allclose(outputs[mine], alone[mine], rtol=1e-5, atol=1e-5)
        # float32 sums in another order
        chex.assert_trees_all_close(
            factors(slopes, number), factors(expected), rtol=1e-4, atol=1e-5
        )
    assert separate._cache_size() == 1
    plain = model(merge(params), IDS)
    np.testing.assert_allclose(outputs[3], plain[3], rtol=1e-5, atol=1e-5)


def test_swapping_compiles_nothing_and_each_equals_the_adapter_it_was():
    originals = adapters(base())
    together = stack_adapters(originals)
    run = jax.jit(chex.assert_max_traces(lift(apply), n=1))
    for name, params in originals.items():
        chosen = select(together, name)
        np.testing.assert_allclose(
            run(chosen, IDS), apply(merge(params), IDS), rtol=1e-5, atol=1e-5
        )
        assert trees.count(chosen).trainable == trees.count(params).trainable
        assert chosen["layers"]["query"]["kernel"].base is params["layers"]["query"]["kernel"].base


def test_one_program_serves_every_index():
    together = stack_adapters(adapters(base()))
    run = jax.jit(chex.assert_max_traces(lambda i: lift(apply)(mix(together, i), IDS), n=1))
    once = run(jnp.asarray(NUMBERS))
    again = run(jnp.asarray(NUMBERS[::-1].copy()))
    assert not jnp.array_equal(once, again)


def test_fresh_adapters_are_the_identity_bit_for_bit():
    fresh = {
        name: add_lora(base(), LoraConfig(targets=TARGETS, rank=2), jax.random.key(i))
        for i, name in enumerate("ab")
    }
    index = np.array([0, 1] * 5)
    outputs = jax.jit(lift(apply))(mix(stack_adapters(fresh), index), IDS)
    chex.assert_trees_all_equal(outputs, jax.jit(apply)(base(), IDS))


def test_names_make_an_index():
    together = stack_adapters(adapters(base(), ranks=(1, 1)))
    assert adapter_index(together, ["b", None, "a"]).tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match=r"No adapter is named 'z'\. Nearest: a, b"):
        adapter_index(together, ["z"])


def test_adapters_with_dropout_drop_by_key_and_only_then():
    pair = adapters(base(), ranks=(1, 2), dropout=0.5)
    pair["b"] = set_dropout_key(pair["b"], jax.random.key(1))
    together = mix(stack_adapters(pair), np.array([0, 1] * 5))
    keyed = set_dropout_key(together, jax.random.key(2))
    assert keyed["layers"]["query"]["kernel"].key.shape == (2,)
    run = jax.jit(lift(apply))
    assert not jnp.array_equal(run(keyed, IDS), run(together, IDS))
    chex.assert_trees_all_equal(set_dropout_key(keyed, None), together)


def test_heads_of_their_own_are_swapped_and_refused_in_a_mix():
    pair = adapters(base(), ranks=(1, 2), targets=("query",))
    pair["b"] |= {"classifier": {"kernel": jnp.ones((D, 2))}}
    together = stack_adapters(pair)
    for name, params in pair.items():
        chex.assert_trees_all_equal(select(together, name)["classifier"], params["classifier"])
    with pytest.raises(ValueError, match="differ in classifier/kernel"):
        mix(together, np.zeros(10, np.int32))


@pytest.fixture(scope="module")
def bert():
    """A tiny BERT, three adapters on all its linear layers, and a batch that mixes them."""
    folder = pathlib.Path(__file__).parent / "golden" / "models" / "bert_token_classification"
    model, params = hub.load(folder)
    tokens = jax.random.randint(jax.random.key(0), (6, 5), 1, 60)
    inputs = {"input_ids": tokens, "attention_mask": jnp.ones((6, 5), jnp.int32)}
    uses = inspect(model.apply, params, inputs)
    together = stack_adapters(
        {
            name: trained(add_lora(params, LoraConfig(rank=i + 1), jax.random.key(i), uses), i)
            for i, name in enumerate("abc")
        }
    )
    return model, together, inputs, jnp.array([2, 0, 1, -1, 2, 2], jnp.int32)


def test_all_linear_layers_of_bert_take_a_mixed_batch(bert):
    model, together, inputs, index = bert
    apply = jax.jit(lift(model.apply))
    mixed = apply(mix(together, index), inputs)
    for number, name in enumerate(together.names):
        mine = np.equal(index, number)
        alone = apply(select(together, name), inputs)
        np.testing.assert_allclose(mixed[mine], alone[mine], rtol=1e-4, atol=1e-4)


def test_a_training_step_takes_the_index_with_its_batch_and_cuts_both_alike(bert):
    model, together, inputs, index = bert
    lifted = index_from_inputs(lift(model.apply))
    labels = jax.random.randint(jax.random.key(1), (6, 5), 0, 5)
    batch = inputs | {"adapter": index, "labels": labels}
    results = []
    for accumulation in (1, 2):
        step = make_train_step(
            lambda params, inputs, key: lifted(params, inputs),
            OBJECTIVES["token_classification"],
            optax.sgd(0.1),
            accumulation=accumulation,
        )
        train, frozen = trees.partition(jax.tree.map(jnp.copy, together.params))
        results.append(step(train, optax.sgd(0.1).init(train), frozen, batch, jax.random.key(0))[0])
    whole, parts = results
    chex.assert_trees_all_close(whole, parts, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(
        lambda before, after: jnp.max(jnp.abs(after - before)),
        trees.partition(together.params)[0],
        whole,
    )
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_inputs_without_an_index_for_each_example_are_refused():
    run = index_from_inputs(lift(lambda params, inputs: inputs["x"] @ params))
    with pytest.raises(ValueError, match=r"\['x'\] hold no 'adapter'"):
        run(None, {"x": x_of(4)})
    with pytest.raises(ValueError, match=r"x is \[4, 8\] and adapter \[2\]"):
        run(None, {"x": x_of(4), "adapter": jnp.zeros(2, jnp.int32)})


def x_of(rows):
    return jnp.ones((rows, D))


def changed(path, function):
    def change(params):
        return trees.with_fields(params, {path: function(trees.flatten(params)[path])})

    return change


QUERY = "layers/query/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: add_lora(base(), LoraConfig(targets=("query",)), jax.random.key(0)), "targets"),
        (changed(QUERY, lambda v: v.replace(base=v.base + 1)), f"{QUERY} .* two different bases"),
        (changed(QUERY, lambda v: v.replace(a=v.a.astype(jnp.bfloat16))), f"{QUERY} .* bfloat16"),
        (changed("classifier/kernel", lambda v: v.replace(base=jnp.ones((D, 3)))), "classifier/ke"),
        (lambda p: {k: v for k, v in p.items() if k != "tokens"}, "tokens/embedding and 'b' has"),
        (lambda p: p | {"new": jnp.ones(3)}, "'b' has a parameter new and 'a' has none"),
    ],
)
def test_adapters_that_do_not_belong_together_are_refused_by_parameter(change, message):
    first = adapters(base(), ranks=(2,))["a"]
    with pytest.raises(ValueError, match=f"stack_adapters: .*{message}"):
        stack_adapters({"a": first, "b": change(first)})


def test_sets_of_nothing_and_of_other_leaves_are_refused():
    with pytest.raises(ValueError, match="there is no adapter"):
        stack_adapters({})
    with pytest.raises(ValueError, match="'a' holds no LoRA leaf"):
        stack_adapters({"a": base()})
    dora = add_lora(base(), LoraConfig(targets=("query",), dora=True), jax.random.key(0))
    with pytest.raises(ValueError, match=r"layers/query/kernel is a DoRA\(LoRA\) leaf"):
        stack_adapters({"a": dora})


def test_equal_bases_need_not_be_the_same_arrays():
    pair = adapters(base(), ranks=(1,)) | {"b": adapters(base(), ranks=(2,))["a"]}
    assert stack_adapters(pair).names == ("a", "b")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 5], "example 2 has adapter 5; expected 0 to 1, or -1"),
        ([-2, 0], "example 0 has adapter -2"),
        ([0.5], r"got float32 \[1\]"),
        ([[0]], r"got int32 \[1, 1\]"),
    ],
)
def test_an_index_of_no_adapter_raises_before_the_step(index, message):
    together = stack_adapters(adapters(base(), ranks=(1, 1)))
    with pytest.raises(ValueError, match=message):
        mix(together, index)
