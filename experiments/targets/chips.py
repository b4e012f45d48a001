"""TPUs that are not there, and what their compiler says that a program's operations cost.

It writes an estimate of cycles beside each operation but kernels written in Pallas. Of those it can
be asked for their schedule, instruction by instruction, which is counted here.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import tempfile
from typing import Any

from lorax_ft import planning
from lorax_ft.devices import find_device
from lorax_ft.planning import costs, hlo

_FOLDER = tempfile.TemporaryDirectory(prefix="schedules")
_SCHEDULES = pathlib.Path(_FOLDER.name)


def chip(name: str) -> Any:
    """The first device of a TPU by its name, such as "v5p"; it compiles and holds nothing."""
    asked = {"to": _SCHEDULES, "llo_text": "true", "llo_pass_label_regex": "final_bundles"}
    words = (f"--xla_jf_dump_{name}={value}" for name, value in asked.items())
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(words)  # read when the compiler is loaded
    target = planning.parse_target(f"tpu-{name}")
    planning.prepare_process(target)
    if reason := planning.missing(target):
        raise RuntimeError(reason)
    return planning.compiler(target).devices[0]


def total(text: str, name: str) -> int:
    """The cycles on a chip of the program that was last compiled for it, whose `as_text()` this is.

    A kernel that tells its arithmetic takes as many cycles as its schedule has instructions, or as
    that arithmetic does at the chip's peak, if those are more or its schedule is not known.
    """
    program = hlo.parse(text)
    per_cycle = find_device(f"tpu-{name}").flops_per_cycle
    found = costs.cycles(program, per_cycle)
    if found is None or per_cycle is None:
        raise ValueError("The program has no estimates: was it compiled for a TPU?")
    beyond = 0
    for instruction, flops, times in costs.kernels(program):
        if flops is not None:
            beyond += max(0, scheduled(instruction.name) - round(flops / per_cycle)) * times
    return found.total + beyond


def scheduled(kernel: str) -> int:
    """The instructions that one of a chip's cores runs of a kernel, by the schedule of its last
    compilation: those of a loop as often as its bound says. Nothing waits for memory. 0 where none
    was written, as of a kernel that is the same as another of its program."""
    files = sorted(
        file
        for file in _SCHEDULES.glob(f"*-{kernel}-*-final_bundles.txt")
        if "analysis" not in file.name
    )
    return count_instructions(files[-1].read_text()) if files else 0


@dataclasses.dataclass
class _Loop:
    depth: int
    instructions: int = 0
    bound: int = 1


def count_instructions(schedule: str) -> int:
    """Of a schedule's text, each line `0x17 LB: > { ... }`: its address, what begins there, a `>`
    for each loop that it is in. Both ways of a branch count."""
    loops = [_Loop(0)]

    def leave(depth: int) -> None:
        while loops[-1].depth > depth:
            inner = loops.pop()
            loops[-1].instructions += inner.instructions * inner.bound

    for address in re.finditer(r"^ *(?:0x[0-9a-f]+|0) +(\w\w)? *: ([> ]*)\{(.*)", schedule, re.M):
        begins, nesting, instruction = address.groups()
        if instruction.startswith("}"):  # an empty one does not say what it is in
            loops[-1].instructions += 1
            continue
        depth = nesting.count(">")
        leave(depth - 1 if begins == "LB" else depth)
        if depth > loops[-1].depth:
            loops.append(_Loop(depth))
        loops[-1].instructions += 1
        if bound := re.search(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit", instruction):
            loops[-1].bound = int(bound.group(1))
    leave(0)
    return loops[0].instructions


def listing(text: str, count: int = 20) -> str:
    """What costs a compiled program most, operation by operation."""
    found = sorted(costs.estimates(hlo.parse(text)), key=lambda row: -row[1] * row[2])
    whole = sum(cycles * times for _, cycles, times in found)
    lines = [f"{whole:>16,} cycles"]
    for instruction, cycles, times in found[:count]:
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        lines.append(
            f"{cycles * times:>16,} {cycles * times / max(whole, 1):6.1%} x{times:<4} "
            f"{instruction.name:40} {source.group(1)[-90:] if source else ''}"
        )
    return "\n".join(lines)
