"""The plan of a sweep before it trains: its groups, compiles, bytes and time.

Nothing here is guessed but the evaluations' share: bytes are those of the arrays and of the
compiler's own analysis, and a step is timed on slots without members, whose results nobody keeps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from lorax_ft.memory import machine
from lorax_ft.reports import bytes_text
from lorax_ft.sweeps import devices
from lorax_ft.sweeps.groups import Group
from lorax_ft.sweeps.program import Batch, Batches, Program, Source, state_bytes

MOST_SLOTS = 32  # more fill no device better, and wait for each other
SHARE = 0.8  # of the memory that is free which a group may take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a group will take."""

    group: str
    runs: int  # to be trained
    slots: int
    compiles: int  # of the training step: one for each shape of batch
    shared_bytes: int  # of the base, in every memory that has it
    slot_bytes: int  # of each slot: parameters, optimizer state, what is frozen and its own
    temporary_bytes: int  # of all slots' step, as the compiler found
    compile_seconds: float
    step_seconds: float  # of all slots together, on average over an epoch's shapes
    steps: int  # of all runs
    longest: int  # of one run

    @property
    def bytes(self) -> int:
        """All that the group takes of its devices."""
        return self.shared_bytes + self.slots * self.slot_bytes + self.temporary_bytes

    @property
    def seconds(self) -> float:
        """Of training, without compiling and evaluations."""
        return max(self.longest, math.ceil(self.steps / self.slots)) * self.step_seconds


def make_program(
    source: Source,
    group: Group,
    waiting: int,
    *,
    slots: int | None,
    memory: int,
    begun: bool = False,
    vectorized: bool | None = None,
) -> tuple[Program, float]:
    """The group's program on as many slots as there is use and room for, and seconds of compiling.

    `slots` limits them, and is what a group that was `begun` had; else they are as many more as its
    devices share evenly. `memory` are the bytes to fit in, of each memory that the devices have;
    `vectorized` is as `SweepConfig` has it.
    Raises ValueError where there is no room for one.
    """
    most = min(waiting, MOST_SLOTS if slots is None else slots)
    compiled = 0.0
    while True:
        wanted = _even(waiting, most)
        count = wanted if begun else devices.rounded_up(wanted)
        program = Program(source, group, count, vectorized=vectorized)
        fits = _most_of(program, memory, 0)
        if fits < program.slots and slots is None:  # not even the arrays: no need to compile
            most = _fewer(fits, program, memory)
            continue
        start = time.perf_counter()
        temporary = max(_temporary(program, batch) for batch, _ in _one_of_each_shape(program))
        compiled += time.perf_counter() - start
        fits = _most_of(program, memory, temporary)
        if fits >= program.slots or slots is not None:
            return program, compiled
        most = _fewer(fits, program, memory)


def make_plan(program: Program, compile_seconds: float, steps: Sequence[int]) -> Plan:
    """The plan of a compiled program, for runs of so many steps each."""
    shared, each = state_bytes(program)
    batches = _one_of_each_shape(program)
    return Plan(
        group=program.group.name,
        runs=len(steps),
        slots=program.slots,
        compiles=program.compiles,
        shared_bytes=shared,
        slot_bytes=each,
        temporary_bytes=max(_temporary(program, batch) for batch, _ in batches),
        compile_seconds=compile_seconds,
        step_seconds=sum(_time(program, batch) * share for batch, share in batches),
        steps=sum(steps),
        longest=max(steps),
    )


def plan_table(plans: Sequence[Plan]) -> str:
    """The plans as lines of text, a group a line, and what they come to."""
    head = "group,runs,slots,compiles,base,a slot,step,in all,s/step,training"
    rows: list[list[str]] = [[*head.split(",")]]
    for p in plans:
        sizes = (p.shared_bytes, p.slot_bytes, p.temporary_bytes, p.bytes)
        row = [p.group, *map(str, (p.runs, p.slots, p.compiles)), *map(bytes_text, sizes)]
        rows.append([*row, f"{p.step_seconds:.3f}", _duration(p.seconds)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    seconds = sum(p.seconds for p in plans)
    lines.append(
        f"{sum(p.runs for p in plans)} runs in {len(plans)} groups; compiled in "
        f"{_duration(sum(p.compile_seconds for p in plans))}; about {_duration(seconds)} of "
        "training, and evaluations besides"
    )
    return "\n".join(lines)


def free_memory(share: float = 1.0) -> int:
    """The bytes that a group may take of the accelerator, or else of its share of this machine."""
    free = machine.free_memory(share)
    return 2**62 if free is None else int(SHARE * free)  # where there is no telling, all


def _one_of_each_shape(program: Program) -> list[tuple[Batch, float]]:
    """A batch [slots, ...] of each shape in an epoch, with the shape's share."""
    batches = Batches(program.source, program.group.first, program.slots)
    found = []
    for numbers in batches.shapes.values():
        one = batches.get(program.group.first, numbers[0])
        stacked = {name: np.stack([array] * program.slots) for name, array in one.items()}
        found.append((stacked, len(numbers) / batches.per_epoch))
    return found


def _temporary(program: Program, batch: Batch) -> int:
    """Of all devices together."""
    analysis = program.compiled(batch).memory_analysis()
    return 0 if analysis is None else program.mesh.size * int(analysis.temp_size_in_bytes)


def _time(program: Program, batch: Batch) -> float:
    """Seconds of a step, on slots without members; in turn, those of one a device for each size."""
    slots, keys = program.slots, np.stack([program.key_data] * program.slots)
    counts, stack, seconds = np.zeros(slots, np.int32), program.empty(), []
    each = slots // program.mesh.size
    if not program.vectorized:
        weights = batch["weights"].copy()
        weights[np.arange(slots) % each > 0] = 0
        batch = {**batch, "weights": weights}
    for size in range(len(program.sizes)):
        arguments = (keys, np.full(slots, size, np.int32), counts, batch)
        for _ in range(1 if seconds else 2):  # the first touches memory that the others then have
            start = time.perf_counter()
            stack, _ = jax.block_until_ready(program.train(stack, *arguments))
            taken = time.perf_counter() - start
        seconds.append(taken)
    if program.vectorized:
        return seconds[0]
    return each * sum(seconds[size] for size in program.run_sizes) / len(program.run_sizes)


def _most_of(program: Program, limit: int, temporary: int) -> int:
    """How many slots fit; what the step takes grows with those that it computes side by side."""
    shared, each = state_bytes(program)
    free = devices.memories(program.mesh) * limit - shared
    if program.vectorized:
        return int(free / (each + temporary / program.slots))
    return int((free - temporary) / each)


def _fewer(fits: int, program: Program, limit: int) -> int:
    """How many slots to try next, of which `fits` would have room by what this program takes.

    One whose slots take turns says little of the steps of another: at worst half as many are tried.
    """
    if program.slots == 1:
        shared, each = state_bytes(program)
        raise ValueError(
            f"Group {program.group.name}: one run alone takes more than the {bytes_text(limit)} "
            f"there are: {bytes_text(shared)} of base, {bytes_text(each)} of its own, and what its "
            "step takes. Lower data.loader.batch_size, quantise the base, or raise "
            "SweepConfig.memory."
        )
    least = 1 if program.vectorized else program.slots // 2
    return devices.rounded_down(min(max(fits, least), program.slots - 1))


def _even(waiting: int, most: int) -> int:
    """As many slots as make as few rounds as `most`, none of them half empty."""
    rounds = math.ceil(waiting / most)
    return math.ceil(waiting / rounds)


def _duration(seconds: float) -> str:
    """A time in the unit that reads well.

    >>> _duration(3.2), _duration(150), _duration(9000)
    ('3.2 s', '2.5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
