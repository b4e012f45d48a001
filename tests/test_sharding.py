"""Sharding: eight devices compute what one does, and every parameter lies where a rule says."""

import functools
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lorax_ft import methods, trees
from lorax_ft.inspection import inspect
from lorax_ft.leaves import Leaf, leaf
from lorax_ft.lift import lift
from lorax_ft.models import BertConfig, LlamaConfig, build
from lorax_ft.quantization import QuantizationConfig, quantize
from lorax_ft.training.objectives import OBJECTIVES
from lorax_ft.training.optimizers import OptimizerConfig, build_optimizer
from lorax_ft.training.sharding import (
    RULES,
    MeshConfig,
    Rule,
    make_mesh,
    replicate,
    shard,
    shard_batch,
    shardings,
    shardings_of,
)
from lorax_ft.training.step import make_train_step

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
WIDTH, HEADS, INNER, LAYERS, VOCABULARY = 16, 4, 32, 2, 24


@leaf
class Packed(Leaf):
    """A stored kernel with one constant to each block of 8 inputs, and factors of rank 2."""

    stored: Any  # [*stack, in, out]
    constants: Any  # [*stack, in / 8, out]
    a: Any  # [*stack, 2, in]

    trainable: ClassVar[tuple[str, ...]] = ("a",)
    in_axes = (-2,)
    astype = linear = linear_transposed = take = dense = None

    @property
    def stack_shape(self):
        return self.stored.shape[:-2]

    @property
    def core_shape(self):
        return self.stored.shape[-2:]

    @property
    def dtype(self):
        return self.stored.dtype

    def partition_specs(self, spec):
        return Packed(stored=spec, constants=spec, a=P(*spec[:-2], None, spec[-2]))


def packed(*stack: int, size: int = 32, out: int = 16) -> Packed:
    return Packed(
        stored=jnp.ones((*stack, size, out)),
        constants=jnp.ones((*stack, size // 8, out)),
        a=jnp.ones((*stack, 2, size)),
    )


def bert_like_params():
    """A small encoder with the names of the models here."""
    key = functools.partial(jax.random.fold_in, jax.random.key(0))

    def kernel(n, *shape):
        bias = jnp.zeros(shape[:-2] + shape[-1:])
        return {"kernel": jax.random.normal(key(n), shape) / 4, "bias": bias}

    names = ("query", "key", "value", "output")
    return {
        "embeddings": {
            "word": {"embedding": jax.random.normal(key(0), (VOCABULARY, WIDTH))},
            "norm": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
        },
        "layers": {
            "attention": {name: kernel(i, LAYERS, WIDTH, WIDTH) for i, name in enumerate(names, 1)},
            "mlp": {
                "up": kernel(5, LAYERS, WIDTH, INNER),
                "down": kernel(6, LAYERS, INNER, WIDTH),
            },
        },
        "classifier": kernel(7, WIDTH, 3),
    }


def apply(params, inputs, key):
    del key
    x = params["embeddings"]["word"]["embedding"][inputs["input_ids"]]

    def dense(p, x):
        return jnp.einsum("bti,io->bto", x, p["kernel"]) + p["bias"].reshape(1, 1, -1)

    def layer(x, p):
        q, k, v = (
            dense(p["attention"][name], x).reshape(*x.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        x = x + dense(
            p["attention"]["output"], jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        )
        return x + dense(p["mlp"]["down"], jnp.tanh(dense(p["mlp"]["up"], x))), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    norm = params["embeddings"]["norm"]
    x = x * norm["scale"].reshape(1, 1, -1) + norm["bias"].reshape(1, 1, -1)
    return dense(params["classifier"], x)[:, 0]


def batch_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (8, 5)).astype(np.int32),
        "labels": rng.integers(0, 3, 8).astype(np.int32),
        "weights": np.linspace(0, 1, 8, dtype=np.float32),
    }


@functools.cache
def run(mesh_config: MeshConfig | None, accumulation: int = 1):
    """Three steps, on a mesh or on none: (train, metrics of each step, compiles)."""
    params = bert_like_params()
    mesh = None if mesh_config is None else make_mesh(mesh_config)
    params = params if mesh is None else shard(params, mesh)
    train, frozen = trees.partition(params, (r"layers/.*/kernel", "classifier/.*"))
    tx = build_optimizer(OptimizerConfig(learning_rate=0.01, weight_decay=0.1), total_steps=5)
    opt_state, kept = tx.init(train), None
    if mesh is not None:
        opt_state = replicate(opt_state, mesh)
        kept = shardings_of((train, opt_state))
    step = make_train_step(
        apply,
        OBJECTIVES["sequence_classification"],
        tx,
        accumulation=accumulation,
        out_shardings=kept,
    )
    found = []
    for n in range(3):
        batch = batch_of(n) if mesh is None else shard_batch(batch_of(n), mesh)
        key = jax.random.key(n) if mesh is None else replicate(jax.random.key(n), mesh)
        train, opt_state, metrics = step(train, opt_state, frozen, batch, key)
        found.append(jax.device_get(metrics))
    if mesh is not None:
        assert shardings_of((train, opt_state)) == kept
    return jax.device_get(train), found, step._cache_size()


EIGHTS = [
    MeshConfig(data=data, fsdp=fsdp, tensor=8 // (data * fsdp))
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
]
ACCUMULATED = [MESH, MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8)]


@pytest.mark.parametrize(
    ("config", "accumulation"),
    [*((config, 1) for config in EIGHTS), *((config, 2) for config in ACCUMULATED)],
    ids=str,
)
def test_training_on_eight_devices_of_any_shape_equals_one(config, accumulation):
    one, eight = run(None, accumulation), run(config, accumulation)

    # sums over devices add in another order, and Adam's first steps divide small gradients
    chex.assert_trees_all_close(eight[1], one[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(eight[0], one[0], rtol=1e-4, atol=1e-5)


REAL = {
    "bert": BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
    ),
    "llama": LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=16,
    ),
}
SECTIONS = [
    methods.LoraConfig(rank=4),
    methods.PrefixConfig(length=3),
    methods.NormConfig(),
]


@functools.cache  # what one device ends in is asked for by each mesh
def train_real(name, config):
    """(trained half, losses) of three steps of several methods together, on a base in four bits."""
    model = build(REAL[name], task="sequence_classification")
    params = model.init(jax.random.key(0))
    random = np.random.default_rng(1)
    ids = random.integers(1, 50, (8, 12)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 0] % 2}
    uses = inspect(model.apply, params, {"input_ids": ids})
    params = quantize(params, QuantizationConfig(), uses)
    params, trained = methods.add_methods(params, SECTIONS, jax.random.key(2), uses)
    mesh = None if config is None else make_mesh(config)
    params = params if mesh is None else shard(params, mesh)
    train, frozen = trees.partition(params, trained)
    tx = build_optimizer(OptimizerConfig(learning_rate=1e-2), total_steps=6)
    opt_state, kept, key = tx.init(train), None, jax.random.key(3)
    if mesh is not None:
        opt_state, batch = replicate(opt_state, mesh), shard_batch(batch, mesh)
        kept, key = shardings_of((train, opt_state)), replicate(key, mesh)
    objective = OBJECTIVES["sequence_classification"]
    apply = lift(model.apply)
    step = make_train_step(
        lambda params, inputs, key: apply(params, inputs), objective, tx, out_shardings=kept
    )
    losses = []
    for _ in range(3):
        train, opt_state, metrics = step(train, opt_state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
    return jax.device_get(train), losses


@pytest.mark.parametrize(
    ("name", "config"),
    [("bert", MESH), ("llama", MESH), ("llama", MeshConfig(fsdp=2, sequence=2, tensor=2))],
)
def test_a_real_model_trains_on_eight_devices_as_on_one(name, config):
    one, eight = train_real(name, None), train_real(name, config)

    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5)
    assert one[1][-1] < one[1][0]
    chex.assert_trees_all_close(eight[0], one[0], rtol=1e-3, atol=1e-4)


def test_a_sharded_step_compiles_once():
    assert run(MESH)[2] == 1


def test_optimizer_state_lies_as_its_parameters():
    mesh = make_mesh(MESH)
    train, _ = trees.partition(shard(bert_like_params(), mesh), ".*/up/kernel")
    tx = build_optimizer(OptimizerConfig(), total_steps=2)

    state = replicate(tx.init(train), mesh)

    specs = {path: x.sharding.spec for path, x in trees.flatten_arrays(state).items()}
    kernels = {path: spec for path, spec in specs.items() if path.endswith("up/kernel")}
    assert len(kernels) == 2  # Adam's two moments
    assert all(spec == P(None, "fsdp", "tensor") for spec in kernels.values())
    assert all(spec == P() for path, spec in specs.items() if path not in kernels)


@pytest.mark.parametrize(("path", "shape", "spec"), [
    ("layers/attention/query/kernel", (2, 8, 8), P(None, "fsdp", "tensor")),
    ("layers_0/attention/value/kernel", (8, 8), P("fsdp", "tensor")),
    ("layers/attention/qkv/kernel", (2, 8, 24), P(None, "fsdp", "tensor")),
    ("layers/mlp/gate/kernel", (2, 8, 8), P(None, "fsdp", "tensor")),
    ("layers/attention/output/kernel", (2, 8, 8), P(None, "tensor", "fsdp")),
    ("layers/mlp/down/kernel", (2, 8, 8), P(None, "tensor", "fsdp")),
    ("layers/attention_norm/scale", (2, 8), P(None, None)),
    ("layers/mlp/up/bias", (2, 8), P(None, None)),
    ("norm/scale", (8,), P(None)),
    ("embeddings/word/embedding", (24, 8), P("tensor", "fsdp")),
    ("embeddings/word/embedding", (25, 8), P(None, "fsdp")),  # an odd vocabulary
    ("embeddings/position/embedding", (24, 8), P(None, "fsdp")),
    ("lm_head/kernel", (8, 25), P("fsdp", None)),
    ("pooler/kernel", (8, 8), P("fsdp", None)),
    ("classifier/kernel", (8, 2), P("fsdp", None)),
    ("classifier/bias", (3,), P(None)),
])  # fmt: skip
def test_the_rules_know_the_names_of_every_family(path, shape, spec):
    params: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path.split("/")):
        params = {name: params}

    (found,) = jax.tree.leaves(shardings(params, make_mesh(MESH)))

    assert found.spec == spec


def test_fields_of_a_leaf_lie_as_the_kernel_they_stand_for():
    params = {"layers": {"up": {"kernel": packed(3)}}}

    found = jax.tree.map(lambda s: s.spec, shardings(params, make_mesh(MESH)))
    placed = shard(params, make_mesh(MESH))["layers"]["up"]["kernel"]

    kernel = found["layers"]["up"]["kernel"]
    assert kernel.stored == kernel.constants == P(None, "fsdp", "tensor")
    assert kernel.a == P(None, None, "fsdp")
    assert placed.stored.addressable_shards[0].data.shape == (3, 16, 8)


def test_a_field_too_small_to_split_is_replicated_along_that_axis():
    params = {"layers": {"up": {"kernel": packed(size=24)}}}  # three blocks over two devices

    kernel = shardings(params, make_mesh(MESH))["layers"]["up"]["kernel"]

    assert kernel.stored.spec == P("fsdp", "tensor")
    assert kernel.constants.spec == P(None, "tensor")


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"No sharding rule covers layers/router/gate \[4, 8\]"):
        shardings({"layers": {"router": {"gate": jnp.ones((4, 8))}}}, make_mesh(MESH))


def test_a_rule_of_ones_own_goes_before_the_others():
    rules = (Rule(pattern=".*/router/gate", spec=P("tensor")), *RULES)

    found = shardings({"x": {"router": {"gate": jnp.ones((4, 8))}}}, make_mesh(MESH), rules)

    assert found["x"]["router"]["gate"].spec == P(None, "tensor")


def test_a_rule_that_holds_for_no_parameter_is_an_error_but_for_the_built_in_ones():
    params = {"x": {"router": {"gate": jnp.ones((4, 8))}, "up": {"kernel": jnp.ones((4, 8))}}}
    gate = Rule(pattern=".*/gate", spec=P("tensor"))

    with pytest.raises(ValueError, match=r"Rule.pattern.*x/router/gates.*x/router/gate"):
        shardings(params, make_mesh(MESH), (Rule(pattern="x/router/gates", spec=P()), gate, *RULES))
    late = Rule(pattern=".*/kernel", spec=P())
    with pytest.raises(ValueError, match=r"before it cover all .* such as x/up/kernel\. Put"):
        shardings(params, make_mesh(MESH), (gate, *RULES, late))


def test_a_kernel_that_does_not_divide_is_an_error_unless_its_rule_allows_it():
    params = {"mlp": {"up": {"kernel": jnp.ones((8, 7))}}}
    rule = Rule(pattern=".*/up/kernel", spec=P("fsdp", "tensor"), uneven="replicate")

    with pytest.raises(ValueError, match=r"mlp/up/kernel \[8, 7\] cannot be split"):
        shardings(params, make_mesh(MESH))
    found = shardings(params, make_mesh(MESH), (rule, *RULES))

    assert found["mlp"]["up"]["kernel"].spec == P("fsdp", None)


@pytest.mark.parametrize(("config", "shape"), [
    (MeshConfig(), (1, 1, 1, 1)),
    (MeshConfig(fsdp=-1), (1, 8, 1, 1)),
    (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 1, 2)),
    (MeshConfig(sequence=2, tensor=4), (1, 1, 2, 4)),
])  # fmt: skip
def test_meshes_have_the_axes_asked_for(config, shape):
    axes = ("data", "fsdp", "sequence", "tensor")
    assert tuple(make_mesh(config).shape.items()) == tuple(zip(axes, shape))


@pytest.mark.parametrize(("fields", "message"), [
    ({"data": 0}, "MeshConfig.data must be at least 1"),
    ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
])  # fmt: skip
def test_meshes_that_make_no_sense_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**fields)


@pytest.mark.parametrize(("config", "message"), [
    (MeshConfig(data=16), "wants 16 devices, but there are 8"),
    (MeshConfig(data=3, fsdp=-1), "does not divide the 8 devices"),
])  # fmt: skip
def test_meshes_that_the_machine_has_not_are_errors(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_a_batch_is_split_over_data_and_fsdp_and_keeps_its_rows():
    batch = batch_of(0)

    found = shard_batch(batch, make_mesh(MESH))

    assert found["input_ids"].addressable_shards[0].data.shape == (2, 5)
    assert all(np.array_equal(found[name], batch[name]) for name in batch)


def test_texts_are_split_over_sequence():
    batch = {"input_ids": np.arange(48, dtype=np.int32).reshape(8, 6), "weights": np.ones(8)}

    found = shard_batch(batch, make_mesh(MeshConfig(data=2, sequence=2, tensor=2)))

    assert found["input_ids"].addressable_shards[0].data.shape == (4, 3)
    assert found["weights"].addressable_shards[0].data.shape == (4,)
    assert all(np.array_equal(found[name], batch[name]) for name in batch)


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"batch of 6 rows .* 4 devices"):
        shard_batch({"labels": np.zeros(6, np.int32)}, make_mesh(MESH))
    with pytest.raises(ValueError, match=r"Rows of 5 places .* sequence = 2"):
        shard_batch(batch_of(0), make_mesh(MeshConfig(sequence=2)))
