"""`plan`: memory, time and fit of a run, asked of the compiler that would compile it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lorax_ft.config import ExperimentConfig
from lorax_ft.jaxprs import inner
from lorax_ft.memory import (
    Refusal,
    StepMemory,
    free_memory,
    host_bytes,
    local_bytes,
    refusal_of,
    state_parts,
    step_memory,
)
from lorax_ft.planning import costs, hlo, shapes, targets
from lorax_ft.planning.targets import Compiler, Target
from lorax_ft.training import MeshConfig
from lorax_ft.training.flops import count_flops

# What a step has beside its arguments, in the order in which it is told.
STEP_PARTS: Mapping[str, str] = {
    "padding": "padding of the target's layouts",
    "gradients": "gradients",
    "logits": "logits",
    "activations": "activations and workspace",
    "code": "program",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least seconds that a step takes of each of a device's resources."""

    products: float  # more than the least where a kernel leaves out keys that no query sees
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """Of a step whose parts overlap wholly."""
        return max(self.products, self.memory, self.links)

    @property
    def bound(self) -> str:
        """What the step waits for."""
        names = {"products": "arithmetic", "memory": "memory bandwidth", "links": "communication"}
        return names[max(names, key=lambda name: getattr(self, name))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes of each device of a target."""

    target: Target
    compiler: str
    stands_in: str | None  # why it is not the target's own compiler that answers
    mesh: MeshConfig
    batch_size: int
    length: int
    longest: int | None  # that the model has positions for; None where they end nowhere
    parts: Mapping[str, int]  # bytes, by STATE_PARTS and STEP_PARTS; they add up to the peak
    host: int  # bytes of the host, beside, for each device: paged states, activations kept there
    memory: StepMemory | None  # None where the compiler refused
    refused: str | None  # in our words
    needed: int | None  # bytes, by the compiler; None where it refused without saying
    usable: int | None  # bytes that a program can have; None where there is no telling
    flops: float  # of one device, by `training.flops`
    traffic: int | None  # bytes of its memory; None where there is no program to be read
    collectives: tuple[costs.Collective, ...]
    cycles: costs.Cycles | None
    roofline: Roofline | None  # None for CPUs, and where the compiler refused

    @property
    def fits(self) -> bool:
        """Whether the compiler took it, and what it takes is there."""
        if self.refused is not None:
            return False
        return self.needed is None or self.usable is None or self.needed <= self.usable


def make_plan(config: ExperimentConfig, target: Target, compiler: Compiler | None = None) -> Plan:
    """The plan of a config's run on a target; of the model only its config.json is read.

    A mesh of one device, the default, becomes `fsdp` over all of several. Raises ValueError where
    the mesh is not of so many devices, or does not divide the batch or a parameter; and as
    `targets.compiler` does.
    """
    compiler = targets.compiler(target) if compiler is None else compiler
    config = on_mesh(config, target)
    step = shapes.make_step(config, shapes.describe(config), compiler.devices)
    traced = step.function.trace(*step.arguments)
    try:
        compiled, refusal = traced.lower().compile(), None
    except Exception as error:  # of a type that JAX does not export everywhere
        compiled, refusal = None, refusal_of(error)
        if refusal is None:
            raise
    memory = None if compiled is None else step_memory(compiled)
    parts = _parts(step, traced.jaxpr, memory, refusal, config.train.accumulation)
    # JAX's descriptions of GPUs have no memory of a host, and what is paged is compiled as if it
    # lay on the device. It does not: pages go to and fro, one at a time, in place.
    parts["optimizer"] -= step.misplaced
    host = max(host_bytes(step.arguments), memory.host if memory else 0) + step.misplaced
    shared = host if target.device is None else 0  # a CPU's memory is its host's
    flops = count_flops(traced.jaxpr) / target.count
    flops_per_cycle = None if target.device is None else target.device.flops_per_cycle
    program = None if compiled is None else _program(compiled)
    moved = None if program is None else costs.traffic(program)
    sent = () if program is None else costs.collectives(program, target.count)
    return Plan(
        target=target,
        compiler=compiler.name,
        stands_in=compiler.stands_in,
        mesh=config.mesh,
        batch_size=config.data.loader.batch_size,
        length=config.data.loader.buckets[-1],
        longest=step.longest,
        parts=parts,
        host=host,
        memory=memory,
        refused=refusal and refusal.words,
        needed=sum(parts.values()) + shared if refusal is None else refusal.needed,
        usable=usable_bytes(target, refusal),
        flops=flops,
        traffic=moved,
        collectives=sent,
        cycles=None if program is None else costs.cycles(program, flops_per_cycle),
        roofline=_roofline(target, flops, moved, sent),
    )


def on_mesh(config: ExperimentConfig, target: Target) -> ExperimentConfig:
    """The config on a mesh of all the target's devices.

    Raises ValueError for a mesh that is not of so many.
    """
    sizes = dataclasses.asdict(config.mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed == 1 and -1 not in sizes.values():
        sizes["fsdp"] = -1
    rest, left = divmod(target.count, fixed)
    sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
    mesh = MeshConfig(**sizes)
    if left or mesh.size != target.count:
        raise ValueError(
            f"--mesh: {', '.join(f'{a}={n}' for a, n in dataclasses.asdict(config.mesh).items())} "
            f"is not a mesh of the {target.count} devices of {target.name}. Their product must be "
            "that; one may be -1, for all that are left."
        )
    return dataclasses.replace(config, mesh=mesh)


def usable_bytes(target: Target, refusal: Refusal | None = None) -> int | None:
    """What a program can have of one device; of CPUs each has its share of this machine's."""
    if refusal is not None and refusal.available is not None:
        return refusal.available
    if target.device is not None:
        return target.device.usable
    free = free_memory()
    return None if free is None else free // target.count


def largest_logits(jaxpr: Any, vocabulary: int) -> tuple[int, ...] | None:
    """The shape of the largest array of a step, over all devices, whose last axis is as long as the
    vocabulary, but for the parameters themselves; None where there is none."""
    shapes_found = [
        atom.aval.shape
        for equation in _equations(jaxpr)
        if equation.primitive.name == "dot_general"
        for atom in equation.outvars
        if atom.aval.shape[-1:] == (vocabulary,)
    ]
    return max(shapes_found, key=math.prod, default=None)


def _parts(
    step: shapes.Step,
    jaxpr: Any,
    memory: StepMemory | None,
    refusal: Refusal | None,
    accumulation: int,
) -> dict[str, int]:
    """Bytes of one device by part.

    Arguments that the program does not read lie there all the same. Of what it takes beside them,
    gradients and logits are reckoned from shapes, and the rest is called activations; where the
    compiler refused, its figure is taken, and where that lacks too, what is known.
    """
    parts = state_parts(step.train, step.frozen, step.opt_state, step.batch, step.key)
    arguments = sum(parts.values())
    known = {"gradients": _gradient_bytes(step.train, accumulation), "logits": 0}
    if logits := largest_logits(jaxpr, step.vocabulary):
        known["logits"] = 4 * math.prod(logits) // step.mesh.size
    padding = code = 0
    if memory is not None:
        padding, code = max(0, memory.arguments - arguments), memory.code
        beside = memory.added - code
    elif refusal is not None and refusal.needed is not None:
        beside = max(0, refusal.needed - arguments)
    else:
        beside = sum(known.values())
    known["gradients"] = min(known["gradients"], beside)
    known["logits"] = min(known["logits"], beside - known["gradients"])
    rest = beside - sum(known.values())
    return {**parts, "padding": padding, **known, "activations": rest, "code": code}


def _gradient_bytes(train: Any, accumulation: int) -> int:
    """Of the trained arrays' gradients; those of accumulated batches are summed in float32."""
    arrays = jax.tree.leaves(train)
    if accumulation == 1:
        return sum(map(local_bytes, arrays))
    return sum(local_bytes(array) * 4 // array.dtype.itemsize for array in arrays)


def _program(compiled: Any) -> hlo.Program | None:
    """The compiled program; None where this version of JAX cannot read what a newer compiler wrote,
    which is so of some programs by libtpu 0.0.42 under JAX 0.10."""
    try:
        return hlo.parse(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return None


def _roofline(
    target: Target, flops: float, moved: int | None, sent: tuple[costs.Collective, ...]
) -> Roofline | None:
    device = target.device
    if device is None or moved is None:
        return None
    return Roofline(
        products=flops / device.flops,
        memory=moved / device.bandwidth,
        links=sum(row.sent for row in sent) / device.link,
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in inner(jaxpr)[0].eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(item, "jaxpr", item), "eqns"):
                    yield from _equations(item)
