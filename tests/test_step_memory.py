"""What a compiled step of a language model holds at once: of its logits, a piece."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from lorax_ft import LoraConfig, add_lora, inspect, partition
from lorax_ft.adapted import make_apply, make_outputs
from lorax_ft.models import LlamaConfig, build
from lorax_ft.training import OBJECTIVES, MeshConfig, make_mesh, make_train_step, shard, shard_batch

pytestmark = pytest.mark.usefixtures("optimized_compiles")

TEXTS, TOKENS, PLACES = 16, 16, 4  # places of each text that a piece has
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    num_hidden_layers=1,
)
PIECE = TEXTS * PLACES * CONFIG.vocab_size  # numbers


def language_model(devices=1):
    """A model of whose logits so many devices may hold a piece."""
    return build(CONFIG, task="causal_lm", logits_bytes=4 * PIECE // devices)


def make_params(model):
    params = model.init(jax.random.key(0))
    uses = inspect(model.apply, params, model.input_shapes())
    return add_lora(params, LoraConfig(rank=2), jax.random.key(1), uses)


def make_batch():
    ids = jnp.ones((TEXTS, TOKENS), jnp.int32)
    return {"input_ids": ids, "labels": ids, "weights": jnp.ones(TEXTS)}


def compile_step(apply, params, batch):
    step = make_train_step(apply, OBJECTIVES["causal_lm"], optax.sgd(1.0))
    train, frozen = partition(params)
    state = optax.sgd(1.0).init(train)
    return step.lower(train, state, frozen, batch, jax.random.key(0)).compile()


def largest_array(compiled):
    """How many numbers the largest array of a compiled program has, on each device."""
    shapes = re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_a_compiled_step_holds_a_piece_of_the_logits_and_no_more():
    model, batch = language_model(), make_batch()
    params = make_params(model)

    whole = compile_step(make_apply(model), params, batch)
    pieces = compile_step(make_outputs(model), params, batch)

    assert largest_array(whole) == TOKENS // PLACES * PIECE
    assert largest_array(pieces) == PIECE
    held = [each.memory_analysis().temp_size_in_bytes for each in (whole, pieces)]
    assert held[0] - held[1] >= 4 * (TOKENS // PLACES - 1) * PIECE  # bytes of the other pieces


def test_the_devices_of_a_mesh_hold_shares_of_a_piece():
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    model = language_model(mesh.size)
    params, batch = shard(make_params(model), mesh), shard_batch(make_batch(), mesh)

    compiled = compile_step(make_outputs(model, mesh), params, batch)

    share, head = PIECE // mesh.size, CONFIG.vocab_size * CONFIG.hidden_size
    assert largest_array(compiled) <= max(share, head)
