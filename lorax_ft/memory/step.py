"""What a compiled step takes of one device, as its compiler has laid it out or why it refuses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on each device. What is donated comes out where it went in: `aliased`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host: int = 0  # in the host's memory, for each device

    @property
    def added(self) -> int:
        """What a step takes while it runs beside its arguments."""
        return self.outputs - self.aliased + self.temporaries + self.code

    @property
    def peak(self) -> int:
        """The most that is in use at once."""
        return self.arguments + self.added


def step_memory(compiled: Any) -> StepMemory | None:
    """The memory of a compiled function; None where its compiler does not tell."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return StepMemory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        host=found.host_argument_size_in_bytes
        + found.host_output_size_in_bytes
        - found.host_alias_size_in_bytes
        + found.host_temp_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A compiler's saying that a program does not fit."""

    needed: int | None
    available: int | None
    words: str


def refusal_of(error: BaseException) -> Refusal | None:
    """What a compiler's error says of main memory; None where it is about something else.

    >>> refusal_of(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory "
    ...     "required for HLO temporaries (22.04G) exceeds available HBM (15.75G).")).words
    'the compiler refuses the step: it would need 22.04 GiB, and 15.75 GiB are there'
    """
    text = str(error)
    is_memory = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    if not is_memory or re.search(r"memory space (?!hbm)\w+", text):  # of a core's scratch
        return None
    found = re.search(r"([\d.]+)([KMGT])\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT])", text)
    if found is None:
        first = text.strip().partition("\n")[0]
        return Refusal(None, None, f"the compiler refuses the step: {first}")
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, available = (int(float(found.group(i)) * unit[found.group(i + 1)]) for i in (1, 3))
    return Refusal(
        needed,
        available,
        f"the compiler refuses the step: it would need {needed / 2**30:.2f} GiB, and "
        f"{available / 2**30:.2f} GiB are there",
    )
