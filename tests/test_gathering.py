"""A mesh's communication: kernels in few bits are gathered as they are stored, layer by layer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import methods, training, trees
from lorax_ft.adapted import make_outputs
from lorax_ft.inspection import inspect
from lorax_ft.models import LlamaConfig, build
from lorax_ft.planning import costs, hlo
from lorax_ft.quantization import QuantizationConfig, Quantized, quantize

LAYERS = 2
MODEL = LlamaConfig(
    vocab_size=40,
    hidden_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    max_position_embeddings=16,
)
LORA = methods.LoraConfig(rank=2)


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: training.MeshConfig | None
    kind: str | None = "nf4"
    scan_layers: bool = True
    remat: str = "none"
    lora: bool = True


@functools.cache
def run(case: Case) -> tuple[list[float], Any, Any]:
    """(losses of three steps, the step's compiled program, params)."""
    model = build(MODEL, task="causal_lm", scan_layers=case.scan_layers, remat=case.remat)
    params = model.init(jax.random.key(0))
    ids = np.random.default_rng(1).integers(1, 40, (8, 12)).astype(np.int32)
    batch: Any = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    uses = inspect(model.apply, params, {"input_ids": ids})
    if case.kind:
        params = quantize(params, QuantizationConfig(kind=case.kind), uses)
    params, trained = methods.add_methods(params, [LORA], jax.random.key(2), uses)
    mesh = None if case.mesh is None else training.make_mesh(case.mesh)
    params = params if mesh is None else training.shard(params, mesh)
    train, frozen = trees.partition(params, trained)
    tx = training.build_optimizer(training.OptimizerConfig(learning_rate=1e-2), total_steps=6)
    opt_state, kept, key = tx.init(train), None, jax.random.key(3)
    if mesh is not None:
        opt_state, batch = training.replicate(opt_state, mesh), training.shard_batch(batch, mesh)
        kept, key = training.shardings_of((train, opt_state)), training.replicate(key, mesh)
    step = training.make_train_step(
        make_outputs(model, mesh), training.OBJECTIVES["causal_lm"], tx, out_shardings=kept
    )
    compiled = step.lower(train, opt_state, frozen, batch, key).compile()
    losses = []
    for _ in range(3):
        train, opt_state, metrics = compiled(train, opt_state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
    return losses, compiled.as_text(), params
