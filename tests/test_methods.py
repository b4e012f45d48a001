"""Every method on every model: identity at first, true gradients, frozen bases, merges, counts."""

import functools
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import inspection, methods, trees
from lorax_ft.leaves import is_leaf
from lorax_ft.lift import lift
from lorax_ft.models import BertConfig, LlamaConfig, T5Config, build
from lorax_ft.quantization import QuantizationConfig, quantize

KEY = jax.random.key(0)
SMALL = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "bert": BertConfig(**SMALL, intermediate_size=128, max_position_embeddings=16),
    "llama": LlamaConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=128, max_position_embeddings=16
    ),
    "t5": T5Config(
        **{**SMALL, "num_hidden_layers": 1},
        head_dim=16,
        intermediate_size=128,
        num_decoder_layers=2,
    ),
}
TASKS = {"t5": "seq2seq_lm"}  # the others classify sequences
FOUR_BIT = r".*/(query|down)/kernel"
VARIANTS = {"scanned-nf4": (True, True), "unrolled-float32": (False, False)}

METHODS = {  # a config for each row of the table
    "lora": methods.LoraConfig(rank=2),
    "dora": methods.LoraConfig(rank=2, dora=True),
    "adalora": methods.AdaLoraConfig(rank=3, target_rank=2),
    "vera": methods.VeraConfig(rank=8),
    "ia3": methods.IA3Config(),
    "houlsby": methods.AdapterConfig(size=4),
    "pfeiffer": methods.AdapterConfig(kind="pfeiffer", reduction=8.0, activation="gelu"),
    "parallel": methods.AdapterConfig(kind="parallel", size=4, scale=2.0),
    "prompt": methods.PromptConfig(length=3),
    "p_tuning": methods.PTuningConfig(length=3, hidden=8),
    "prefix": methods.PrefixConfig(length=3),
    "prefix behind a net": methods.PrefixConfig(length=3, projection=8),
    "bitfit": methods.BitFitConfig(add_missing=True),
    "norms": methods.NormConfig(),
}
NOT_LINEAR = ("houlsby", "pfeiffer", "parallel")
IN_FRONT = ("prompt", "p_tuning", "prefix", "prefix behind a net")  # seen from the first step


@functools.cache
def base(name, scan, nf4):
    """(plain apply, params, uses, logits) of a tiny model."""
    model = build(CONFIGS[name], task=TASKS.get(name, "sequence_classification"), scan_layers=scan)
    params = jax.tree_util.tree_map_with_path(_perturbed, model.init(jax.random.key(1)))
    uses = inspection.inspect(model.apply, params, inputs(name))
    if nf4:
        params = quantize(params, QuantizationConfig(targets=FOUR_BIT), uses)
    logits = jax.jit(lift(model.apply))(params, inputs(name))
    return jax.jit(model.apply), params, uses, logits


def _perturbed(path, array):
    name = jax.tree_util.keystr(path).encode()
    key = jax.random.fold_in(jax.random.key(2), zlib.crc32(name))
    return array + 0.05 * jax.random.normal(key, array.shape)


def inputs(name="bert"):
    ids = jnp.array([[4, 5, 6, 7, 8, 9], [7, 3, 2, 1, 0, 0]])
    target = {"decoder_input_ids": jnp.array([[0, 5, 8], [0, 9, 2]])} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(jnp.int32)} | target


def trained(params, trainable):
    """The params after their trainable arrays have moved, as any training moves them."""
    train, frozen = trees.partition(params, trainable)
    leaves, tree = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
    return trees.combine(jax.tree.unflatten(tree, moved), frozen)


# Variations of a method are tried on one model alone: the parts that differ know no models. So are
# unrolled layers, but where a method finds its places by their names.
CASES = [
    (method, name, variant)
    for method in METHODS
    for name in CONFIGS
    for variant in VARIANTS
    if method not in ("pfeiffer", "p_tuning", "prefix behind a net")
    or (name, variant) == ("bert", "scanned-nf4")
    if variant != "unrolled-float32" or name == "bert" or method in ("lora", "houlsby", "prefix")
]


@pytest.mark.parametrize(("method", "name", "variant"), CASES)
def test_the_laws_hold_for_every_method_on_every_model(method, name, variant):
    apply, params, uses, before = base(name, *VARIANTS[variant])
    params, trainable = methods.add_methods(params, [METHODS[method]], KEY, uses)
    train, frozen = trees.partition(params, trainable)
    weights = jax.random.normal(jax.random.key(4), before.shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(train):
        logits = lift(apply)(trees.combine(train, frozen), inputs(name))
        return (logits * weights).sum(), logits

    (_, fresh), _ = run(train)
    if method not in IN_FRONT:
        np.testing.assert_allclose(fresh, before, rtol=1e-5, atol=1e-5)

    moved = trained(params, trainable)
    train, frozen_after = trees.partition(moved, trainable)
    chex.assert_trees_all_equal(frozen_after, frozen)
    (_, after), gradient = run(train)
    assert np.abs(after - before).max() > 1e-3
    gradient = trees.flatten_arrays(gradient)
    silent = [path for path, array in gradient.items() if not np.abs(array).max() > 0]
    assert not [path for path in silent if not _has_no_influence(path)]

    if method in NOT_LINEAR or (method == "bitfit" and name != "bert"):
        with pytest.raises(ValueError, match=r"merge: .*layers.*cannot be merged"):
            methods.merge(moved)
        return
    merged = methods.merge(moved)
    assert not any(is_leaf(value) for value in trees.flatten(merged).values())
    np.testing.assert_allclose(apply(merged, inputs(name)), after, rtol=1e-4, atol=1e-5)


def _has_no_influence(path):
    """A bias added to every key alike shifts all scores of a query, which softmax does not see."""
    return path.endswith("attention/key/bias") or "attention/key/kernel/bias" in path


def test_every_method_of_the_table_is_tried_here():
    tried = {type(config) for config in METHODS.values()}
    choices = {methods.FullConfig, methods.HeadConfig, methods.TopLayersConfig}
    assert tried | choices == {method.config for method in methods.METHODS.values()}


def test_methods_compose_on_one_model():
    apply, params, uses, logits = base("bert", True, True)
    configs = [
        methods.LoraConfig(targets=("query", "value"), rank=2),
        methods.IA3Config(outputs=(), inputs=("down",)),
        methods.AdapterConfig(kind="houlsby", size=4),
        methods.NormConfig(),
    ]
    params, trainable = methods.add_methods(params, configs, KEY, uses)
    kinds = {trees.kind(value) for value in trees.flatten(params).values()}
    assert kinds == {"array", "LoRA", "LoRA(NF4)", "IA3(NF4)", "Adapter"}
    logits = lift(apply)(params, inputs())
    np.testing.assert_allclose(
        logits, lift(apply)(base("bert", True, True)[1], inputs()), atol=1e-5
    )
    counts = trees.count(params, trainable)
    lora = 2 * 2 * 2 * (64 + 64)
    adapters = 2 * 2 * (2 * 64 * 4 + 4 + 64)
    assert counts.trainable == lora + 2 * 128 + adapters + (2 * 2 + 1) * 2 * 64


def test_the_last_layers_alone_are_trained():
    _, params, uses, _ = base("bert", False, False)
    config = methods.TopLayersConfig(count=2, modules_to_save=("classifier",))
    _, trainable = methods.add_methods(params, [config], KEY, uses)
    train, _ = trees.partition(params, trainable)
    owners = {path.split("/")[0] for path in trees.flatten_arrays(train)}
    assert owners == {"layers_0", "layers_1", "classifier"}
    _, params, uses, _ = base("t5", False, False)
    _, trainable = methods.add_methods(params, [methods.TopLayersConfig(count=1)], KEY, uses)
    train, _ = trees.partition(params, trainable)
    owners = {"/".join(path.split("/")[:2]) for path in trees.flatten_arrays(train)}
    assert owners == {"encoder/layers_0", "decoder/layers_1"}
    _, stacked, uses, _ = base("bert", True, False)
    with pytest.raises(ValueError, match="scan_layers=False"):
        methods.add_methods(stacked, [config], KEY, uses)


def test_bitfit_trains_the_biases_that_the_targets_name():
    _, params, uses, _ = base("bert", True, False)
    chosen = methods.add_methods(
        params, [methods.BitFitConfig(targets=("query", "up"))], KEY, uses
    )[1]
    assert chosen == (r"layers/attention/query/bias", r"layers/mlp/up/bias")
    for name in ("llama", "t5"):
        _, params, uses, _ = base(name, True, True)
        with pytest.raises(ValueError, match=r"no biases.*add_missing"):
            methods.add_methods(params, [methods.BitFitConfig()], KEY, uses)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: methods.AdapterConfig(kind="serial"), "kind is 'serial', expected one of houlsby"),
        (lambda: methods.AdapterConfig(size=0), "size must be at least 1, got 0"),
        (lambda: methods.AdapterConfig(activation="sine"), "activation is 'sine'"),
        (lambda: methods.VeraConfig(rank=0), "rank must be at least 1"),
        (lambda: methods.PrefixConfig(length=0), "PrefixConfig.length must be at least 1"),
        (lambda: methods.PromptConfig(ids=(1,)), "ids or text, and initialization='ids'"),
        (lambda: methods.TopLayersConfig(count=0), "count must be at least 1"),
        (lambda: methods.IA3Config(outputs=(), inputs=()), "both outputs and inputs are empty"),
        (lambda: methods.IA3Config(outputs=("keys",)), "no module is named 'keys'. Nearest: key"),
        (lambda: methods.AdapterConfig(targets=("dwon",)), "no module is named 'dwon'"),
        (lambda: methods.PrefixConfig(places=("cross",)), r"places: \['cross'\] are not there"),
    ],
)
def test_bad_settings_name_the_field(config, message):
    _, params, uses, _ = base("bert", True, False)
    with pytest.raises(ValueError, match=message):
        methods.add_methods(params, [config()], KEY, uses)


def count(model_config, config, **options):
    """Trainable parameters of a method on a model of which only the shapes are made."""
    model = build(model_config, **options)
    shapes = model.shapes()
    uses = inspection.inspect(model.apply, shapes, model.input_shapes())
    chosen = []

    def add(params):
        params, trainable = methods.add_methods(params, [config], KEY, uses)
        chosen.append(trainable)
        return params

    params = jax.eval_shape(add, shapes)
    return trees.count(params, chosen[0]).trainable


def test_published_counts_are_exact():
    large = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    houlsby = methods.AdapterConfig(size=64, norms=r"layers/.*")
    assert count(large, houlsby, task="encoder") == 6_441_984
    assert count(BertConfig(), methods.BitFitConfig(), task="encoder") == 102_912
    assert count(large, methods.BitFitConfig(), task="encoder") == 272_384
    assert count(LlamaConfig(), methods.IA3Config(), task="causal_lm") == 614_400
    base = T5Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    query_value = methods.LoraConfig(targets=("query", "value"), rank=8)
    assert count(base, query_value, task="seq2seq_lm") == 884_736
    huge = T5Config(hidden_size=4096, num_attention_heads=64, num_hidden_layers=24)
    assert count(huge, methods.PromptConfig(length=5), task="seq2seq_lm") == 20_480
    prefix = methods.PrefixConfig(length=5)  # keys and values of 3 * 12 attentions
    assert count(base, prefix, task="seq2seq_lm") == 3 * 12 * 2 * 5 * 768
    # two kernels a layer, a vector of the rank and one of the width each
    vera = methods.VeraConfig(targets=("query", "value"), rank=1024)
    assert count(BertConfig(), vera, task="encoder") == 2 * 12 * (768 + 1024)


def test_a_prompt_starts_from_words_and_needs_positions():
    apply, params, uses, _ = base("bert", True, False)
    words = methods.PromptConfig(length=5, initialization="ids", ids=(7, 8))
    prompted, _ = methods.add_methods(params, [words], KEY, uses)
    table = params["embeddings"]["word"]["embedding"]
    chex.assert_trees_all_equal(prompted["prompt"]["embedding"], table[jnp.array([7, 8, 7, 8, 7])])
    drawn = methods.PromptConfig(length=3, initialization="vocabulary")
    rows = methods.add_methods(params, [drawn], KEY, uses)[0]["prompt"]["embedding"]
    assert all((np.asarray(table) == np.asarray(row)).all(axis=1).any() for row in rows)
    long, _ = methods.add_methods(params, [methods.PromptConfig(length=12)], KEY, uses)
    with pytest.raises(ValueError, match=r"stand behind 12 trained vectors.*positions for 16"):
        apply(long, inputs())


def test_a_prompt_is_what_its_words_would_be():
    """Llama sees no difference between a prompt of two words' vectors and the words themselves."""
    apply, params, uses, _ = base("llama", False, False)
    words = methods.PromptConfig(length=2, initialization="ids", ids=(7, 8))
    prompted, _ = methods.add_methods(params, [words], KEY, uses)
    ids = inputs()["input_ids"][:1]
    text = jnp.concatenate([jnp.array([[7, 8]]), ids], axis=1)
    np.testing.assert_allclose(
        apply(prompted, {"input_ids": ids}), apply(params, {"input_ids": text}), atol=1e-6
    )
