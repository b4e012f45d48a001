"""On a mesh every method and every family of models trains as on one device."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import methods, training, trees
from lorax_ft.adapted import make_outputs
from lorax_ft.inspection import inspect
from lorax_ft.models import BertConfig, Gpt2Config, LlamaConfig, T5Config, build

MESH = training.MeshConfig(data=2, fsdp=2, tensor=2)
SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[Any, str]] = {
    "bert": (BertConfig(**SIZES, intermediate_size=64), "sequence_classification"),
    "gpt2": (Gpt2Config(**SIZES, max_position_embeddings=16), "causal_lm"),
    "llama": (LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2), "causal_lm"),
    "t5": (T5Config(**SIZES, intermediate_size=64, head_dim=8), "seq2seq_lm"),
}
METHODS = {  # each row of the table on a model that has places for it
    "lora": ("llama", methods.LoraConfig(rank=4)),
    "dora": ("llama", methods.LoraConfig(rank=4, dora=True)),
    "adalora": ("llama", methods.AdaLoraConfig(rank=4, target_rank=2)),
    "vera": ("llama", methods.VeraConfig(rank=8)),
    "ia3": ("llama", methods.IA3Config()),
    "adapters": ("llama", methods.AdapterConfig(size=4)),
    "prompt": ("llama", methods.PromptConfig(length=3)),
    "p_tuning": ("llama", methods.PTuningConfig(length=3, hidden=8)),
    "prefix": ("llama", methods.PrefixConfig(length=3, projection=8)),
    "bitfit": ("bert", methods.BitFitConfig()),
    "norms": ("llama", methods.NormConfig()),
    "top_layers": ("bert", methods.TopLayersConfig(count=1)),
    "head": ("bert", methods.HeadConfig()),
    "full": ("llama", methods.FullConfig()),
}
FAMILIES = {name: (name, methods.LoraConfig(rank=4)) for name in MODELS if name != "llama"}


@functools.cache
def base(family: str, scan_layers: bool):
    """(model, its parameters, what it does with each)."""
    config, task = MODELS[family]
    model = build(config, task=task, scan_layers=scan_layers)
    params = model.init(jax.random.key(0))
    return model, params, inspect(model.apply, params, model.input_shapes())


def batch_of(family: str) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(1).integers(1, 48, (8, 8)).astype(np.int32)
    mask = (np.arange(8) < np.arange(1, 9)[:, None]).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask, "weights": np.ones(8, np.float32)}
    if family == "bert":
        return {**batch, "labels": ids[:, 0] % 2}
    return {**batch, "labels": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})


def train_on(mesh: Any, family: str, model: Any, params: Any, trained: Any):
    """(losses of two steps, the trained half)."""
    params = jax.tree.map(jnp.copy, params)  # a step takes what it trains
    params = params if mesh is None else training.shard(params, mesh)
    train, frozen = trees.partition(params, trained)
    config = training.OptimizerConfig(name="sgd", learning_rate=0.1)
    tx = training.build_optimizer(config, total_steps=4)
    batch, opt_state, key, kept = batch_of(family), tx.init(train), jax.random.key(3), None
    if mesh is not None:
        opt_state, key = training.replicate(opt_state, mesh), training.replicate(key, mesh)
        batch, kept = training.shard_batch(batch, mesh), training.shardings_of((train, opt_state))
    step = training.make_train_step(
        make_outputs(model, mesh), training.OBJECTIVES[model.task], tx, out_shardings=kept
    )
    losses = []
    for _ in range(2):
        train, opt_state, metrics = step(train, opt_state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
    if mesh is not None:
        ends = zip(jax.tree.leaves((train, opt_state)), jax.tree.leaves(kept), strict=True)
        assert all(x.sharding.is_equivalent_to(lay, x.ndim) for x, lay in ends)
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))
    return losses, jax.device_get(train)


@pytest.mark.parametrize("case", [*METHODS, *FAMILIES])
def test_methods_and_families_train_on_a_mesh_as_on_one_device(case):
    family, section = (METHODS | FAMILIES)[case]
    model, params, uses = base(family, scan_layers=case != "top_layers")
    params, trained = methods.add_methods(params, [section], jax.random.key(2), uses)

    one = train_on(None, family, model, params, trained)
    eight = train_on(training.make_mesh(MESH), family, model, params, trained)

    assert one[0][1] != one[0][0]
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    chex.assert_trees_all_close(eight[1], one[1], rtol=1e-4, atol=1e-5)  # sums in another order


def test_every_method_of_the_table_is_tried_here():
    tried = {type(section) for _, section in METHODS.values()}

    assert tried == {method.config for method in methods.METHODS.values()}
