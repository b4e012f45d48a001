"""A mesh's communication: kernels in few bits are gathered as they are stored, layer by layer."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft import methods, planning, training, trees
from lorax_ft.adapted import make_outputs
from lorax_ft.inspection import inspect
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.models import LlamaConfig, build
from lorax_ft.planning import costs, hlo
from lorax_ft.quantization import QuantizationConfig, Quantized, fused, quantize
from tests.compilers import needs_tpu_compiler

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
    dtype: str = "float32"
    fused: bool = False  # each device multiplies its own part, here on CPUs without a kernel


@functools.cache
def run(case: Case) -> tuple[list[float], Any, Any]:
    """(losses of three steps, the step's compiled program, params)."""
    how = {"scan_layers": case.scan_layers, "remat": case.remat}
    model = build(MODEL, task="causal_lm", **how, dtype=case.dtype, param_dtype=case.dtype)
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
    with mock.patch.object(fused, "_runs_kernels", return_value=case.fused):
        traced = step.trace(train, opt_state, frozen, batch, key)
    if mesh is not None:
        assert ("= four_bit_product" in str(traced.jaxpr)) == case.fused
    compiled = traced.lower().compile()
    losses = []
    for _ in range(3):
        train, opt_state, metrics = compiled(train, opt_state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
    return losses, compiled.as_text(), params


def gathered(case: Case) -> dict[str, int]:
    """Bytes of all-gathers in a step, by the type of element."""
    assert case.mesh is not None
    rows = costs.collectives(hlo.parse(run(case)[1]), training.make_mesh(case.mesh).size)
    return {row.dtype: row.bytes for row in rows if row.kind == "all-gather"}


def stored(case: Case) -> int:
    """Bytes of the kernels' codes, on all devices together."""
    leaves = jax.tree.leaves(run(case)[2], is_leaf=lambda x: isinstance(x, Quantized))
    name = "packed" if case.kind == "nf4" else "quantized"
    return sum(getattr(leaf, name).nbytes for leaf in leaves if isinstance(leaf, Quantized))


EIGHT = training.MeshConfig(fsdp=8)
CASES = [
    Case(EIGHT),
    Case(EIGHT, scan_layers=False),
    Case(EIGHT, remat="full"),
    Case(EIGHT, kind="int8"),
    Case(training.MeshConfig(fsdp=4, tensor=2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_gathered_in_the_bits_that_they_are_stored_in(case):
    sent, dtype = gathered(case), "s8" if case.kind == "int8" else "u8"
    whole = stored(case) // case.mesh.tensor
    assert whole <= sent[dtype] <= 2.1 * whole  # forward and backward, absmax's codes among them
    dense = stored(case) * (8 if case.kind == "nf4" else 4)
    assert sent["f32"] < dense / 10  # adapters, the embedding, absmax


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_on_a_mesh_is_that_of_one_device(case):
    alone = dataclasses.replace(case, mesh=None)
    np.testing.assert_allclose(run(case)[0], run(alone)[0], rtol=2e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fused_products_gather_as_little_and_make_the_same_step(remat):
    case = Case(EIGHT, remat=remat, dtype="bfloat16", fused=True)
    by_xla = dataclasses.replace(case, fused=False)
    np.testing.assert_allclose(run(case)[0], run(by_xla)[0], rtol=2**-8)  # of bfloat16
    assert gathered(case)["u8"] == gathered(by_xla)["u8"]


def test_layers_under_a_scan_gather_one_at_a_time():
    text = run(Case(EIGHT))[1]
    sizes = [
        a.bytes
        for i, _, _ in hlo.parse(text).executed()
        for a in i.arrays
        if i.opcode.startswith("all-gather") and a.dtype == "u8"
    ]
    assert max(sizes) == 128 * 256 // 2  # of the largest kernel of one layer


@needs_tpu_compiler
def test_a_tpu_gathers_an_adapters_factors_whole():
    """Left to itself its compiler sends their shards round the devices, a piece of the product
    beside each: hundreds of small communications a layer."""
    target = planning.parse_target("tpu-v5e:4x4")
    planning.prepare_process(target)
    mesh = training.make_mesh(training.MeshConfig(fsdp=16), planning.compiler(target).devices)

    def place(shape, *spec, dtype: Any = jnp.bfloat16) -> Any:
        lies = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=lies)

    size, rank = 2048, 16
    lora = LoRA(
        base=place((size, size), "fsdp"),
        a=place((rank, size), None, "fsdp"),
        b=place((rank, size)),
        scale=place((), dtype=np.float32),
        rank=place((), dtype=np.int32),
    )
    params = training.gathered({"layers": {"up": {"kernel": lora}}}, mesh)
    x = place((16 * 512, size), "fsdp")

    def step(lora, x, dy):
        y, pull = jax.vjp(lambda a, b, x: lora.replace(a=a, b=b).linear(x), lora.a, lora.b, x)
        return y, pull(dy)

    compiled = jax.jit(step).trace(params["layers"]["up"]["kernel"], x, x).lower().compile()

    rows = costs.collectives(hlo.parse(str(compiled.as_text())), mesh.size)
    assert {row.kind for row in rows} == {"all-gather", "all-reduce"}
    assert sum(row.count for row in rows) < 10
