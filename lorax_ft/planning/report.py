"""A plan in words: a table of memory by part, what a step costs, and what else was asked."""

from __future__ import annotations

import dataclasses

from lorax_ft.devices import GPU_SHARE, JAX_SHARE
from lorax_ft.memory import STATE_PARTS
from lorax_ft.planning.plan import STEP_PARTS, Plan
from lorax_ft.planning.search import Largest
from lorax_ft.planning.suggestions import Suggested

LABELS = {**STATE_PARTS, **STEP_PARTS}
GIB = 2**30


def plan_text(plan: Plan) -> str:
    """All of a plan, a line for each part of it."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_costs(plan), "", verdict(plan)])


def verdict(plan: Plan) -> str:
    """Whether it fits, with the numbers."""
    if plan.refused:
        return f"DOES NOT FIT: {plan.refused}."
    if plan.needed is None or plan.usable is None:
        return "Whether it fits cannot be told here."
    left = plan.usable - plan.needed
    numbers = f"{_gib(plan.needed)} of {_gib(plan.usable)} GiB a device"
    if left < 0:
        return f"DOES NOT FIT: {numbers}, {_gib(-left)} too many."
    return f"Fits: {numbers}, {_gib(left)} left.{_fraction(plan)}"


def largest_text(found: Largest) -> str:
    """What `search.largest` found, in a line."""
    unit = {"batch": "rows", "length": "tokens a row"}[found.what]
    if found.plan is None:
        return f"No {found.what} fits: {found.refused} {unit} is too many already."
    peak = "" if found.plan.needed is None else f" ({_gib(found.plan.needed)} GiB)"
    least, beyond = "", f"; {found.refused} do not fit"
    if found.is_last:
        beyond = f", and the model has positions for {found.plan.longest}"
    elif found.refused is None:
        least, beyond = "at least ", "; more were not tried"
    return (
        f"Largest {found.what} that fits: {least}{found.size} {unit}{peak}{beyond} "
        f"[{found.compiles} more compiles]"
    )


def suggestions_text(suggested: Suggested, plan: Plan) -> str:
    """What `suggestions.suggest` tried for a plan, and what could not be."""
    if plan.fits:
        return "It fits as it is: nothing to suggest."
    not_here = [f"  not here: {name}. {why}" for name, why in suggested.impossible.items()]
    if not suggested.trials:
        return "\n".join(["Nothing in the table of suggestions would save memory here.", *not_here])
    lines = ["To make it fit, one after another:"]
    for trial in suggested.trials:
        needed = trial.plan.needed
        peak = "refused" if needed is None else f"{_gib(needed)} GiB"
        word = "fits" if trial.plan.fits else "not yet"
        lines.append(
            f"  {trial.suggestion.name}: {peak}, {word}  {trial.flags}  "
            f"(costs {trial.suggestion.cost})"
        )
    if not suggested.trials[-1].plan.fits:
        lines.append("  It does not fit with all of that.")
    return "\n".join([*lines, *not_here])


def _head(plan: Plan) -> list[str]:
    device = plan.target.device
    title = "CPU" if device is None else device.title
    mesh = ", ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(plan.mesh).items())
    lines = [
        f"target    {plan.target.count} × {title} ({mesh})",
        f"batch     {plan.batch_size} rows of {plan.length} tokens",
        f"compiler  {plan.compiler}",
    ]
    return lines if plan.stands_in is None else [*lines, f"NOTE      {plan.stands_in}"]


def _memory(plan: Plan) -> list[str]:
    total = sum(plan.parts.values())
    rows = [
        (LABELS[name], size, 100 * size / max(total, 1))
        for name, size in plan.parts.items()
        if size
    ]
    width = max(len(label) for label, _, _ in rows)
    lines = [f"{'memory of one device':{width}}        bytes      GiB"]
    lines += [f"{label:{width}}{size:>19,} {_gib(size):>8} {p:5.1f} %" for label, size, p in rows]
    lines.append(f"{'in all':{width}}{total:>19,} {_gib(total):>8}")
    if plan.host:
        lines.append(f"{'of the host, beside':{width}}{plan.host:>19,} {_gib(plan.host):>8}")
    return lines


def _costs(plan: Plan) -> list[str]:
    lines = [
        f"arithmetic     {plan.flops / 1e12:.2f} TFLOP a device and step, attention's of all "
        "queries with all keys"
    ]
    if plan.traffic is not None:
        lines.append(f"memory         {plan.traffic / 1e9:.1f} GB moved")
    elif plan.refused is None:
        lines.append(
            "program        not to be read by this version of JAX, so that traffic, communication "
            "and cycles are not known"
        )
    for row in plan.collectives:
        lines.append(
            f"communication  {row.kind} of {row.dtype}: {row.count:,} times, "
            f"{row.bytes / 1e9:.3f} GB, {row.sent / 1e9:.3f} GB sent"
        )
    if roofline := plan.roofline:
        tokens = plan.batch_size * plan.length / roofline.seconds
        lines.append(
            f"roofline       {roofline.seconds:.3g} s a step if all overlaps, bound by "
            f"{roofline.bound} (arithmetic {roofline.products:.3g} s, memory "
            f"{roofline.memory:.3g} s, communication {roofline.links:.3g} s): {tokens:,.0f} tokens "
            "a second"
        )
    if cycles := plan.cycles:
        clock = plan.target.device.clock if plan.target.device else None
        seconds = "" if clock is None else f", {cycles.total / clock:.3g} s at {clock / 1e9} GHz"
        lines.append(f"cycles         {cycles.total:,} by the compiler's estimate{seconds}")
        unknown = {k: n for k, n in cycles.without.items() if not k.startswith("Sharding")}
        if unknown:
            calls = ", ".join(f"{name} × {times:,}" for name, times in unknown.items())
            lines.append(f"               without an estimate: {calls}")
    return lines


def _fraction(plan: Plan) -> str:
    """What JAX must be told where a card's default share is too little."""
    device = plan.target.device
    if device is None or device.kind != "gpu" or (plan.needed or 0) <= JAX_SHARE * device.memory:
        return ""
    return (
        f" Set XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}: JAX takes no more than {JAX_SHARE} of a "
        "card otherwise."
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
