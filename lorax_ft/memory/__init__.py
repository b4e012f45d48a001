"""What a training step takes of memory: of its trees by part, of its compiled program, and here."""

from lorax_ft.memory.accounting import STATE_PARTS, host_bytes, local_bytes, state_parts, tree_bytes
from lorax_ft.memory.machine import check_kept, check_step, free_memory, memory_line
from lorax_ft.memory.placement import Placement, place, placed
from lorax_ft.memory.step import Refusal, StepMemory, refusal_of, step_memory

__all__ = [
    "STATE_PARTS",
    "Placement",
    "Refusal",
    "StepMemory",
    "check_kept",
    "check_step",
    "free_memory",
    "host_bytes",
    "local_bytes",
    "memory_line",
    "place",
    "placed",
    "refusal_of",
    "state_parts",
    "step_memory",
    "tree_bytes",
]
