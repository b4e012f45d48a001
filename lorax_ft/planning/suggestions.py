"""What may make a run fit that does not: a literal table, tried from its top, each row kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lorax_ft.config import ExperimentConfig, parse, to_dict
from lorax_ft.planning.plan import Plan, on_mesh
from lorax_ft.planning.targets import Target
from lorax_ft.training.optimizers import ROWWISE

Changes = Mapping[str, Any]  # by dotted key of the config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One thing to change: what it costs, and the keys, empty where it does not apply."""

    name: str
    cost: str
    changes: Callable[[ExperimentConfig, Target], Changes]


def _half_precision(config: ExperimentConfig, target: Target) -> Changes:
    compute = config.model.compute
    half = {"model.compute.param_dtype": "bfloat16", "model.compute.dtype": "bfloat16"}
    return half if "float32" in (compute.dtype, compute.param_dtype) else {}


def _scan(config: ExperimentConfig, target: Target) -> Changes:
    return {} if config.model.compute.scan_layers else {"model.compute.scan_layers": True}


def _remat(config: ExperimentConfig, target: Target) -> Changes:
    done = config.model.compute.remat in ("full", "offload")
    return {} if done else {"model.compute.remat": "full"}


def _accumulation(config: ExperimentConfig, target: Target) -> Changes:
    """As many parts as leave each device one row."""
    mesh = on_mesh(config, target).mesh
    rows = config.data.loader.batch_size // mesh.rows
    return {"train.accumulation": rows} if rows > config.train.accumulation else {}


def _fsdp(config: ExperimentConfig, target: Target) -> Changes:
    """Parameters split over all devices: copies over `data` are given up."""
    mesh = on_mesh(config, target).mesh
    if mesh.data == 1:
        return {}
    sizes = dataclasses.asdict(dataclasses.replace(mesh, data=1, fsdp=mesh.rows))
    return {f"mesh.{axis}": size for axis, size in sizes.items()}


def _four_bits(config: ExperimentConfig, target: Target) -> Changes:
    frozen = config.full is None and config.top_layers is None
    return {"quantization.kind": "nf4"} if frozen and config.quantization is None else {}


def _offload(config: ExperimentConfig, target: Target) -> Changes:
    return {} if config.model.compute.remat == "offload" else {"model.compute.remat": "offload"}


def _paged(config: ExperimentConfig, target: Target) -> Changes:
    return {} if config.optimizer.paged else {"optimizer.paged": True}


def _eight_bits(config: ExperimentConfig, target: Target) -> Changes:
    optimizer = config.optimizer
    fits = optimizer.state_dtype == "parameter" and optimizer.name in ROWWISE
    return {"optimizer.state_dtype": "int8"} if fits else {}


def _adafactor(config: ExperimentConfig, target: Target) -> Changes:
    if config.optimizer.name != "adamw":
        return {}
    return {"optimizer.name": "adafactor", "optimizer.state_dtype": "parameter"}


def _half_batch(config: ExperimentConfig, target: Target) -> Changes:
    mesh = on_mesh(config, target).mesh
    rows, least = config.data.loader.batch_size, mesh.rows
    smaller = max(least, rows // 2 // least * least)
    if smaller == rows:
        return {}
    parts = min(config.train.accumulation, smaller // least)
    return {"data.loader.batch_size": smaller, "train.accumulation": parts}


# In the order in which they are tried: what costs nothing first, what changes the result last.
SUGGESTIONS: tuple[Suggestion, ...] = (
    Suggestion(name="scanned layers", cost="nothing but speed on a CPU", changes=_scan),
    Suggestion(name="parameters split over all devices", cost="communication", changes=_fsdp),
    Suggestion(name="remat", cost="a third more arithmetic", changes=_remat),
    Suggestion(name="gradient accumulation", cost="smaller products", changes=_accumulation),
    Suggestion(name="layers' inputs on the host", cost="transfers", changes=_offload),
    Suggestion(name="paged optimizer states", cost="transfers", changes=_paged),
    Suggestion(name="optimizer states in eight bits", cost="rounding", changes=_eight_bits),
    Suggestion(name="half precision", cost="rounding", changes=_half_precision),
    Suggestion(name="a base in four bits", cost="dequantisation, rounding", changes=_four_bits),
    Suggestion(name="Adafactor", cost="another optimizer", changes=_adafactor),
    Suggestion(name="half the batch", cost="another batch", changes=_half_batch),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A suggestion as it was tried, with all those before it."""

    suggestion: Suggestion
    changes: Changes
    config: ExperimentConfig
    plan: Plan

    @property
    def flags(self) -> str:
        """Its changes as the command line takes them."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggested:
    """What was tried, in order, and why what is missing there could not be."""

    trials: tuple[Trial, ...]
    impossible: Mapping[str, str]  # by name of a suggestion


# Raised of a config that cannot be, and by a compiler that has not what it is asked for.
IMPOSSIBLE = (ValueError, TypeError, RuntimeError)


def suggest(
    config: ExperimentConfig, plan: Plan, make: Callable[[ExperimentConfig], Plan]
) -> Suggested:
    """What was tried until the run fits, or until nothing is left; nothing for one that does.

    `make` plans a config on the target of `plan`. What does not save memory is not kept, and what
    the config's methods or the target's compiler do not know is left out.
    """
    trials: list[Trial] = []
    impossible: dict[str, str] = {}
    for suggestion in SUGGESTIONS:
        if plan.fits:
            break
        changes = suggestion.changes(config, plan.target)
        if not changes:
            continue
        try:
            changed = with_changes(config, changes)
            found = make(changed)
        except IMPOSSIBLE as error:
            impossible[suggestion.name] = str(error).strip().partition("\n")[0]
            continue
        if not found.fits and not _saves(found, plan):
            continue
        config, plan = changed, found
        trials.append(Trial(suggestion=suggestion, changes=changes, config=config, plan=plan))
    return Suggested(trials=tuple(trials), impossible=impossible)


def with_changes(config: ExperimentConfig, changes: Changes) -> ExperimentConfig:
    """The config with values by dotted key, sections that it lacks made."""
    values = to_dict(config)
    for key, value in changes.items():
        *names, last = key.split(".")
        section = values
        for name in names:
            section[name] = section.get(name) or {}
            section = section[name]
        section[last] = value
    return parse(values, ExperimentConfig)


def _saves(found: Plan, before: Plan) -> bool:
    if found.needed is None or before.needed is None:
        return before.needed is None
    return found.needed < before.needed
