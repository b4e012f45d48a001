"""What a training step takes of memory: of its trees by part, of its compiled program, and here."""

from lorax_ft.memory.accounting import STATE_PARTS, host_bytes, local_bytes, state_parts, tree_bytes
from lorax_ft.memory.machine import check_step, free_memory, memory_line
from lorax_ft.memory.step import StepMemory, step_memory

__all__ = [
    "STATE_PARTS",
    "StepMemory",
    "check_step",
    "free_memory",
    "host_bytes",
    "local_bytes",
    "memory_line",
    "state_parts",
    "step_memory",
    "tree_bytes",
]
