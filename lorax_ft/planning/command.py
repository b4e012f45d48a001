"""What `lorax-ft plan` does: one plan, and on request the largest size, suggestions, a picture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from lorax_ft.config import ExperimentConfig, parse
from lorax_ft.planning.figure import plot_plans
from lorax_ft.planning.plan import make_plan
from lorax_ft.planning.report import largest_text, plan_text, suggestions_text
from lorax_ft.planning.search import largest
from lorax_ft.planning.suggestions import suggest
from lorax_ft.planning.targets import compiler, parse_target, prepare_process
from lorax_ft.training import MeshConfig


def run(
    read_config: Callable[[], ExperimentConfig],
    *,
    device: str,
    mesh: str | None = None,
    find_largest: str = "none",
    suggests: bool = False,
    plot: str | None = None,
) -> None:
    """Prints the plan of a config for a device, and what else is asked for.

    `device` and `mesh` are as on the command line; `find_largest` is "batch", "length" or "none".
    The config is read last: by then JAX knows that it needs no accelerator.
    """
    target = parse_target(device)
    prepare_process(target)
    config = read_config()
    if mesh is not None:
        config = dataclasses.replace(config, mesh=parse_mesh(mesh))
    make = functools.partial(make_plan, target=target, compiler=compiler(target))
    plan = make(config)
    plans = {f"{plan.batch_size} × {plan.length}": plan}
    print(plan_text(plan), flush=True)
    if find_largest != "none":
        found = largest(config, plan, find_largest, make)
        print(largest_text(found), flush=True)
        if found.plan is not None:
            plans[f"{found.plan.batch_size} × {found.plan.length}"] = found.plan
    if suggests:
        suggested = suggest(config, plan, make)
        print(suggestions_text(suggested, plan), flush=True)
        plans |= {f"+ {trial.suggestion.name}": trial.plan for trial in suggested.trials}
    if plot is not None:
        plot_plans(plans, plot)


def parse_mesh(text: str) -> MeshConfig:
    """The mesh that `--mesh` names. Raises ValueError for another axis and for what is no number.

    >>> parse_mesh("data=1,fsdp=8,tensor=2")
    MeshConfig(data=1, fsdp=8, sequence=1, tensor=2)
    """
    sizes = {}
    for item in text.split(","):
        axis, _, size = item.partition("=")
        try:
            sizes[axis.strip()] = int(size)
        except ValueError:
            raise ValueError(
                f"--mesh={text}: expected AXIS=SIZE, as in data=1,fsdp=8,tensor=2, got {item!r}."
            ) from None
    return parse(sizes, MeshConfig, "--mesh")
