"""TPUs that are not there, and what their compiler says that a program's operations cost."""

from __future__ import annotations

import re
from typing import Any

from lorax_ft import planning
from lorax_ft.planning import costs, hlo


def chip(name: str) -> Any:
    """The first device of a TPU by its name, such as "v5p"; it compiles and holds nothing."""
    target = planning.parse_target(f"tpu-{name}")
    planning.prepare_process(target)
    if reason := planning.missing(target):
        raise RuntimeError(reason)
    return planning.compiler(target).devices[0]


def total(text: str) -> int:
    """The cycles of a compiled program, whose `as_text()` this is."""
    found = costs.cycles(hlo.parse(text))
    if found is None:
        raise ValueError("The program has no estimates: was it compiled for a TPU?")
    return found.total


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
