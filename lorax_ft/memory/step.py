"""What a compiled step takes of one device, as its compiler has laid it out."""

from __future__ import annotations

import dataclasses
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
