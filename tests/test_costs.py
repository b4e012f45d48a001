"""Costs: what a compiled program moves, sends and takes is read right from its text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft import planning
from lorax_ft.planning import costs, hlo
from tests.compilers import needs_tpu_compiler

LOOP = """
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%fused (param_1: s32[], param_0: f32[6,4,8]) -> f32[4,8] {
  %param_0 = f32[6,4,8]{2,1,0} parameter(1)
  %param_1 = s32[] parameter(0)
  %zero = s32[] constant(0)
  %cut = f32[1,4,8]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero)
  ROOT %layer = f32[4,8]{1,0} bitcast(%cut)
}

%body (p: (s32[], f32[6,4,8])) -> (s32[], f32[6,4,8]) {
  %p = (s32[], f32[6,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %stack = f32[6,4,8]{2,1,0} get-tuple-element(%p), index=1
  %layer.1 = f32[4,8]{1,0} fusion(%i, %stack), calls=%fused, config={"estimated_cycles":"10"}
  %sum.3 = f32[4,8]{1,0} all-reduce(%layer.1), replica_groups=[2,4]<=[8], to_apply=%add
  %kernel = f32[4,8]{1,0} custom-call(%sum.3), custom_call_target="tpu_custom_call"
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[6,4,8]{2,1,0}) tuple(%next, %stack)
}

%condition (p: (s32[], f32[6,4,8])) -> pred[] {
  %p = (s32[], f32[6,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (arg: f32[6,4,8]) -> f32[6,4,8] {
  %arg = f32[6,4,8]{2,1,0:T(8,128)} parameter(0)
  %start = s32[] constant(0)
  %in = (s32[], f32[6,4,8]{2,1,0}) tuple(%start, %arg)
  %loop = (s32[], /*index=1*/f32[6,4,8]{2,1,0}) while(%in), condition=%condition, body=%body
  %gathered = bf16[64]{0:T(256)} all-gather(bf16[16]{0} %shard), replica_groups={{0,1,2,3}}
  %near = f32[4]{0:T(128)S(1)} copy(%start)
  ROOT %result = f32[6,4,8]{2,1,0} get-tuple-element(%loop), index=1
}
"""


PARTS = """
HloModule jit_f, is_scheduled=true

%start (param_0: u8[4,8]) -> u8[16,8] {
  %param_0 = u8[4,8]{1,0} parameter(0)
  %all-gather.1 = u8[16,8]{1,0} all-gather(%param_0), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %begun = u8[16,8]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (param_0.1: u8[4,8], param_1: f32[2]) -> f32[2] {
  %param_0.1 = u8[4,8]{1,0} parameter(0)
  %param_1 = f32[2]{0} parameter(1)
  %all-gather.2 = u8[16,8]{1,0} all-gather(%param_0.1), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %twice = f32[2]{0} add(%param_1, %param_1)
}

%body (p: (s32[], u8[4,8], f32[2])) -> (s32[], u8[4,8], f32[2]) {
  %p = (s32[], u8[4,8]{1,0}, f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %shard.1 = u8[4,8]{1,0} get-tuple-element(%p), index=1
  %x = f32[2]{0} get-tuple-element(%p), index=2
  %y = f32[2]{0} fusion(%shard.1, %x), kind=kCustom, calls=%beside
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], u8[4,8]{1,0}, f32[2]{0}) tuple(%next, %shard.1, %y)
}

%condition (p.1: (s32[], u8[4,8], f32[2])) -> pred[] {
  %p.1 = (s32[], u8[4,8]{1,0}, f32[2]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %bound = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (shard: u8[4,8], x.1: f32[2]) -> f32[2] {
  %shard = u8[4,8]{1,0} parameter(0)
  %x.1 = f32[2]{0} parameter(1)
  %first = s32[] constant(0)
  %begun.1 = u8[16,8]{1,0} fusion(%shard), kind=kCustom, calls=%start
  %in = (s32[], u8[4,8]{1,0}, f32[2]{0}) tuple(%first, %shard, %x.1)
  %loop = (s32[], u8[4,8]{1,0}, f32[2]{0}) while(%in), condition=%condition, body=%body
  %other = u8[16,8]{1,0} all-gather(%shard), channel_id=8, replica_groups={{0,1,2,3}}
  ROOT %result = f32[2]{0} get-tuple-element(%loop), index=2
}
"""


BESIDE = """
HloModule jit_f, is_scheduled=true

%beside (shard: u8[4,8], all: u8[16,8], x: bf16[3,4], k: bf16[4,5]) -> (bf16[3,5], u8[4,8]) {
  %x = bf16[3,4]{1,0} parameter(2)
  %k = bf16[4,5]{1,0} parameter(3)
  %shard = u8[4,8]{1,0} parameter(0)
  %all = u8[16,8]{1,0} parameter(1)
  %y = bf16[3,5]{1,0} convolution(%x, %k), dim_labels=bf_io->bf
  %gathered = u8[16,8]{1,0} all-gather(%shard), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %both = (bf16[3,5]{1,0}, u8[4,8]{1,0}, u8[16,8]{1,0}) tuple(%y, %shard, %gathered)
}

ENTRY %main (shard.1: u8[4,8], all.1: u8[16,8], x.1: bf16[3,4], k.1: bf16[4,5]) -> bf16[3,5] {
  %shard.1 = u8[4,8]{1,0} parameter(0)
  %all.1 = u8[16,8]{1,0} parameter(1)
  %x.1 = bf16[3,4]{1,0} parameter(2)
  %k.1 = bf16[4,5]{1,0} parameter(3)
  %fusion.1 = (bf16[3,5]{1,0}, u8[4,8]{1,0}, u8[16,8]{1,0}) fusion(%shard.1, %all.1, %x.1, %k.1), \
kind=kOutput, calls=%beside, config={"estimated_cycles":"9223372036854775807"}
  %begun = ((bf16[3,4]{1,0}), bf16[2,4]{1,0}, s32[]{:S(2)}) slice-start(%x.1), slice={[0:2]}, \
config={"estimated_cycles":"7"}
  %cut = bf16[2,4]{1,0} slice-done(%begun)
  %room = u8[16,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %result = bf16[3,5]{1,0} get-tuple-element(%fusion.1), index=0
}
"""


def test_what_is_sent_in_parts_beside_arithmetic_counts_once():
    program = hlo.parse(PARTS)

    (row,) = costs.collectives(program, 4)

    assert (row.kind, row.dtype, row.count, row.bytes) == ("all-gather", "u8", 2, 2 * 128)
    gathers = 2 * (32 + 128)  # each reads a shard and writes the whole, in however many parts
    beside, counting = 2 * 8, 3 * 4
    assert costs.traffic(program) == gathers + 6 * (beside + counting)


def test_what_a_communication_is_sent_beside_takes_what_its_product_takes():
    """A TPU's compiler has no estimate of such a fusion and writes the largest integer, and the
    fusion hands on arrays of the communication, which it does not move."""
    program = hlo.parse(BESIDE)

    product = 2 * 3 * 4 * 5
    assert costs.cycles(program) == costs.Cycles(
        total=7, by_kind={"begun": 7}, without={"fusion": 1}
    )
    assert costs.cycles(program, 4.0) == costs.Cycles(
        total=product // 4 + 7, by_kind={"fusion": product // 4, "begun": 7}, without={}
    )
    x, kernel, y = 2 * 3 * 4, 2 * 4 * 5, 2 * 3 * 5
    cut = 2 * (2 * 2 * 4)  # started by itself: what it takes, and leaves in main memory
    assert costs.traffic(program) == x + kernel + y + (32 + 128) + cut


@pytest.mark.parametrize(("axes", "joined"), [("'axis_1'", 4), ("'axis_0','axis_1'", 8)])
def test_what_joins_some_axes_of_a_mesh_is_sent_among_their_devices_alone(axes, joined):
    groups = f"mesh['axis_0'=2,'axis_1'=4] {{{axes}}}"
    text = LOOP.replace("replica_groups={{0,1,2,3}}", f"replica_groups={groups}")

    (gathered,) = [c for c in costs.collectives(hlo.parse(text), 8) if c.kind == "all-gather"]

    assert gathered.sent == 64 * 2 * (joined - 1) / joined


def test_a_loops_body_counts_as_often_as_it_runs():
    program = hlo.parse(LOOP)

    reduced, gathered = costs.collectives(program, devices=8)

    assert (reduced.kind, reduced.dtype, reduced.count) == ("all-reduce", "f32", 6)
    assert reduced.bytes == 6 * 4 * 8 * 4
    assert reduced.sent == pytest.approx(reduced.bytes * 2 * 3 / 4)  # a ring of four
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 1, 128)
    assert gathered.sent == pytest.approx(128 * 3 / 4)


def test_traffic_counts_the_slice_and_not_the_stack():
    moved = costs.traffic(hlo.parse(LOOP))

    layer, scalar = 4 * 8 * 4, 4
    sliced = 2 * layer + scalar
    by_iteration = sliced + 2 * layer + 2 * layer + 3 * scalar
    condition = 0  # its own few bytes are not worth telling
    gather, near = 128, scalar
    assert moved == 6 * by_iteration + condition + gather + near


def test_a_fusion_that_runs_beside_others_moves_what_it_would_alone():
    line = next(line for line in LOOP.splitlines() if "%layer.1 =" in line)
    started = """
  %begun = ((s32[], f32[6,4,8]{2,1,0}), f32[4,8]{1,0}, u32[]) fusion-start(%i, %stack), calls=%fused
  %layer.1 = f32[4,8]{1,0} fusion-done(%begun)"""

    beside = costs.traffic(hlo.parse(LOOP.replace(line, started)))

    assert beside == costs.traffic(hlo.parse(LOOP))


def test_cycles_are_summed_and_kernels_without_an_estimate_are_named():
    found = costs.cycles(hlo.parse(LOOP))

    assert found is not None
    assert (found.total, found.by_kind) == (60, {"layer": 60})
    assert found.without == {"tpu_custom_call": 6}
    assert costs.cycles(hlo.parse(LOOP.replace("estimated_cycles", "other"))) is None


def test_communication_of_a_real_program_is_counted_by_kind_and_size():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def layers(stack, x):
        def layer(x, w):
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data", None)))
            return jnp.tanh(y), None

        return jax.lax.scan(layer, x, stack)[0]

    stack = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
    lies = (NamedSharding(mesh, P(None, "tensor", None)), NamedSharding(mesh, P("data", "tensor")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    compiled = jax.jit(layers, in_shardings=lies).lower(stack, x).compile()

    found = costs.collectives(hlo.parse(compiled.as_text()), devices=8)

    reduced = next(row for row in found if row.kind == "all-reduce")
    assert reduced.count == 5
    assert reduced.bytes == 5 * 8 * 64 * 4  # of each device's eight rows
    assert costs.traffic(hlo.parse(compiled.as_text())) >= 5 * 16 * 64 * 4  # its share of weights


@needs_tpu_compiler
def test_a_tpu_sends_the_gathered_kernels_and_the_summed_products_and_no_more():
    layers, size, rows = 6, 2048, 4096
    target = planning.parse_target("tpu-v5e:4x4")
    devices = np.array(planning.compiler(target).devices).reshape(4, 4)
    mesh = Mesh(devices, ("fsdp", "tensor"))

    def shape(spec, *sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def layer(x, kernel):
        y = jax.nn.silu(x @ kernel) @ kernel.T
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("fsdp"))), None

    kernels = shape(P(None, "fsdp", "tensor"), layers, size, size)
    step = jax.jit(lambda kernels, x: jax.lax.scan(layer, x, kernels)[0])
    text = step.lower(kernels, shape(P("fsdp"), rows, size)).compile().as_text()

    found = {c.kind: c.sent for c in costs.collectives(hlo.parse(text), 16)}

    gathered = layers * size * (size // 4) * 2  # bytes of the kernels, over fsdp
    summed = layers * (rows // 4) * size * 2  # of the products, over tensor
    assert found == {"all-gather": gathered * 3 / 4, "all-reduce": 2 * summed * 3 / 4}
