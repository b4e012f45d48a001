"""This machine's memory, and whether a run fits in it: told before anything is there, and again
before the first step is taken."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from typing import Any

import jax

from lorax_ft.memory.accounting import STATE_PARTS, host_bytes, state_parts
from lorax_ft.memory.placement import Placement
from lorax_ft.memory.step import StepMemory, refusal_of, step_memory
from lorax_ft.reports import bytes_text
from lorax_ft.training import host_memory

LESS = (
    "Lower data.loader.batch_size or its longest bucket, raise train.accumulation, or say "
    "model.compute.remat='full'"
)
PLAN = "lorax-ft plan --suggest tries what helps."


def free_memory(share: float = 1.0) -> int | None:
    """The bytes that this process may still take of its accelerator, or else of this machine.

    `share` is this process's part of the machine; an accelerator's allocator knows its own limit.
    None where there is no telling.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"]) - int(statistics.get("bytes_in_use", 0))
    available = host_memory.available()
    return None if available is None else int(share * available)


def _give_back() -> None:
    """Has glibc return the memory that was freed, of which it keeps much for the next to ask."""
    with contextlib.suppress(OSError, AttributeError):  # of another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def check_kept(kept: Placement, *, free: int | None = None) -> None:
    """Raises ValueError, with the numbers, where what a run keeps between its steps does not fit.

    To be asked before any of it is there. `free` is as of `check_step`. Raises MemoryError where a
    host has no room for the optimizer states that are kept there.
    """
    parts = state_parts(kept.train, kept.frozen, kept.opt_state)
    on_host, devices = host_bytes(kept.opt_state), _addressable(kept.train)
    on_device = sum(parts.values())
    shared = on_host if devices[0].platform == "cpu" else 0  # a CPU's memory is its host's
    free = free_memory() if free is None else free
    if free is not None and (on_device + shared) * _sharing(kept.train) > free:
        states = f", {bytes_text(shared)} of optimizer states beside" if shared else ""
        raise ValueError(
            f"This run does not fit: before its first step it takes {bytes_text(on_device)} a "
            f"device ({_listed(parts)}){states}, and {bytes_text(free)} are free. Keep the base in "
            "few bits with quantization.kind='nf4', train less of it, or split it over more "
            f"devices with mesh.fsdp; {PLAN}"
        )
    host_memory.check_room(on_host * len(devices), "The paged states of the optimizer")


def check_step(step: Any, arguments: tuple[Any, ...], *, free: int | None = None) -> str:
    """A line on the memory of a jitted step: `step(train, opt_state, frozen, batch, key)`.

    The arguments are there already; `free` is what else there is, as `free_memory` says where it is
    None. Compiles the step, which the first call then finds compiled, and gives back to the system
    what that and all before it has left. Raises ValueError, with the numbers, where the step cannot
    fit, as by this count or by the compiler's own.
    """
    train, opt_state, frozen, *others = arguments
    memory = step_memory(_compiled(step, arguments))
    _give_back()
    parts = state_parts(train, frozen, opt_state, *others)
    if memory is None:
        return memory_line(parts)
    free = free_memory() if free is None else free
    if free is not None and memory.added * _sharing(train) > free:
        raise ValueError(
            f"This run does not fit: a step takes {bytes_text(memory.added)} a device beside the "
            f"{bytes_text(memory.arguments)} of its arguments ({_listed(parts)}), and "
            f"{bytes_text(free)} are free. {LESS}; {PLAN}"
        )
    return memory_line(parts, memory, free)


def memory_line(
    parts: Mapping[str, int], memory: StepMemory | None = None, free: int | None = None
) -> str:
    """`parts` and what a step adds, in one line."""
    if memory is None:
        return f"{_listed(parts)}; what a step takes beside is not known here"
    room = "" if free is None else f"; {bytes_text(free)} are free for the last"
    return (
        f"{bytes_text(memory.peak)} a device: {_listed(parts)}, a step {bytes_text(memory.added)}"
        f"{room}"
    )


def _compiled(step: Any, arguments: tuple[Any, ...]) -> Any:
    """The compiled step. Raises ValueError where its compiler has no memory for it."""
    lowered = step.lower(*arguments)
    try:
        return lowered.compile()
    except Exception as error:  # of a type that JAX does not export everywhere
        refusal = refusal_of(error)
        if refusal is None:
            raise
        raise ValueError(f"This run does not fit: {refusal.words}. {LESS}; {PLAN}") from error


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(
        f"{STATE_PARTS[name]} {bytes_text(count)}" for name, count in parts.items() if count
    )


def _sharing(tree: Any) -> int:
    """How many of an array's devices here have one memory together: all of a CPU's."""
    devices = _addressable(tree)
    return len(devices) if devices[0].platform == "cpu" else 1


def _addressable(tree: Any) -> list[Any]:
    """The devices here that a tree's arrays lie on."""
    return list(jax.tree.leaves(tree)[0].sharding.addressable_devices)
