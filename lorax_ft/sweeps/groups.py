"""Groups: which runs of a sweep are one compiled program.

What a program reads as arrays may differ between its members: the numbers of the optimizer, alpha,
dropout rates, seeds, lengths of training, and sizes that zeros can pad. All else, and whether an
optional number is there at all, makes another program.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.config import ExperimentConfig, flat, to_dict
from lorax_ft.experiment import method_names
from lorax_ft.methods.initialization import RANDOM
from lorax_ft.training.progress import first_due

# Keys that are arrays within a program, or that only the host reads.
VALUES = (
    *("seed", "baseline", "data.loader.seed", "data.loader.prefetch"),
    *("lora.alpha", "lora.alpha_pattern", "lora.rslora", "lora.dropout"),
    *("adalora.alpha", "adalora.dropout", "vera.initial", "vera.dropout"),
    *("adapters.scale", "adapters.stddev", "prompt.stddev", "p_tuning.stddev", "prefix.stddev"),
    *("optimizer.learning_rate", "optimizer.weight_decay"),
    *("optimizer.warmup_steps", "optimizer.warmup_fraction"),
    *("train.log_every", "train.eval_every", "train.checkpoint_every"),
    *("train.keep_last", "train.keep_best", "train.best_metric", "train.best_mode"),
    *("train.patience", "train.max_nonfinite", "train.peak_flops"),
    *("train.progress_bar", "train.tensorboard"),
)
LENGTHS = ("train.epochs", "train.steps")
# Sizes whose zeros have gradients of exactly zero, and stay zeros.
SIZES = ("lora.rank", "lora.rank_pattern", "vera.rank", "adapters.size", "adapters.reduction")
# Numbers that the program reads as arrays where they are there.
OPTIONAL = ("optimizer.clip_norm", "optimizer.lora_plus_ratio")
# Optimizers whose update of a number depends on how many others its array has.
SIZE_DEPENDENT = ("adafactor",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a sweep."""

    name: str  # of its directory
    config: ExperimentConfig
    changes: Mapping[str, Any]  # dotted keys of the config to what this run has there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that are one program."""

    name: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> ExperimentConfig:
        """A config that has what all of the group have."""
        return self.runs[0].config

    @property
    def drops(self) -> bool:
        """Whether some run drops inputs of its adapters, so that all need a rate."""
        return any(
            getattr(section, "dropout", 0.0) for run in self.runs for section in run.config.methods
        )


def evaluated(group: Group, steps_per_epoch: int) -> tuple[int | None, int]:
    """The first step of an evaluation before a run's end, if there is any; the longest's end."""
    totals = [run.config.train.total_steps(steps_per_epoch) for run in group.runs]
    firsts = [
        first_due(run.config.train.eval_every, total, steps_per_epoch)
        for run, total in zip(group.runs, totals)
    ]
    on_the_way = [first for first, total in zip(firsts, totals) if first < total]
    return min(on_the_way, default=None), max(totals)


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
    """The runs in groups of one program each, in the order that they first appear in."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(structure(run.config), []).append(run)
    names = _names([members[0].config for members in found.values()])
    return tuple(
        Group(name=name, runs=tuple(members)) for name, members in zip(names, found.values())
    )


def structure(config: ExperimentConfig) -> str:
    """What of a config makes its program, as text: two configs with the same text are one."""
    free = set(VALUES)
    if config.adalora is None:  # whose budget is made for a length of training
        free |= set(LENGTHS)
    in_blocks = config.optimizer.state_dtype == "int8"  # in which tensors, depends on their sizes
    if config.optimizer.name not in SIZE_DEPENDENT and not in_blocks:
        free |= set(SIZES)
    values = {key.removeprefix("config."): v for key, v in flat(to_dict(config)).items()}
    kept = {key: v for key, v in values.items() if not _is_among(key, free)}
    kept |= {key: kept[key] is None for key in OPTIONAL if key in kept}
    if kept.get("lora.initialization") in RANDOM:
        kept["lora.initialization"] = "random"
    return json.dumps(kept, sort_keys=True)


def _is_among(key: str, names: set[str]) -> bool:
    """Whether a dotted key is one of the names, or lies within one that is a mapping."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _names(configs: Sequence[ExperimentConfig]) -> list[str]:
    """A short name for each group: its methods, and a number where several have the same."""
    plain = [method_names(config).replace(" on ", "-").replace(" + ", "+") for config in configs]
    return [
        name if plain.count(name) == 1 else f"{name}-{plain[:i].count(name) + 1}"
        for i, name in enumerate(plain)
    ]
