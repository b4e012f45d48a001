"""What a sweep is: the config of a sweep file, and the runs that it makes of a base config."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorax_ft import evaluation
from lorax_ft.config import ExperimentConfig, flat, key_names, parse, to_dict, unknown_key
from lorax_ft.sweeps.groups import Run
from lorax_ft.sweeps.spaces import Choice, Distribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving: of the runs that came so far, the best go on.

    At step `first`, then at `factor` times as many, and so on, a run is evaluated, and goes on if
    it is among the best 1/`factor` of those that came there before it (Li et al. 2020, "A System
    for Massively Parallel Hyperparameter Tuning": no run waits for another). A run is compared with
    those of its own group alone, and a score that is not finite is below all others.
    """

    first: int
    factor: int = 3

    def __post_init__(self):
        if self.first < 1 or self.factor < 2:
            raise ValueError(
                "Halving: expected first of at least 1 and factor of at least 2, got "
                f"{self.first} and {self.factor}."
            )


SAMPLERS = ("tpe", "random", "grid")
PRUNERS = (None, "median", "halving", "hyperband")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Runs that are proposed one after another, by how those before them did.

    `trials` are those of the whole search. Where its runs are several programs, these groups share
    them evenly, the first ones taking what is over; each is a study of its own, and a run is
    compared with those of its own group alone. With the sampler "grid", for a space of choices
    alone, a group has no more trials than its grid has points: those that are over go to groups
    with larger grids, or are not made.
    A pruner needs a metric of validation, and evaluations before a run's end. It counts in steps:
    `min_resource` and `max_resource` of halving and Hyperband are, unless `pruner_options` say
    otherwise, those of the group's first evaluation and of its longest run's end.
    """

    space: Mapping[str, Distribution]
    trials: int
    sampler: str = "tpe"  # of Optuna: tpe, random, grid
    pruner: str | None = None  # of Optuna: median, halving, hyperband
    pruner_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # by Optuna's names
    seed: int = 0
    storage: str | None = None  # URL of the studies; None: SQLite beside each group

    def __post_init__(self):
        for field, names in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, field) not in names:
                raise ValueError(
                    f"Search.{field} is {getattr(self, field)!r}, expected one of {names}."
                )
        if self.trials < 1 or not self.space:
            raise ValueError(
                "Search: expected at least one trial and one key, got "
                f"{self.trials} and {sorted(self.space)}."
            )
        ranges = [key for key, item in self.space.items() if not isinstance(item, Choice)]
        if self.sampler == "grid" and ranges:
            raise ValueError(
                f"Search.sampler is 'grid', and {', '.join(ranges)} is a range, which has no "
                "points: give a choice, or another sampler."
            )
        if self.pruner_options and self.pruner is None:
            raise ValueError(
                f"Search.pruner_options = {dict(self.pruner_options)!r} are of no pruner: set "
                "Search.pruner."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which runs there are, and how they are run and compared."""

    runs: Sequence[Mapping[str, Any]] = ()  # what each changes of the config
    search: Search | None = None  # proposes runs, each with the changes of every entry of `runs`
    metric: str = "validation.accuracy"  # a split's, by which runs are compared
    mode: str | None = None  # "max" or "min" of it is better; None: as its name says
    slots: int | None = None  # runs at a time, rounded up to fill the devices; None: all that fit
    memory: int | None = None  # bytes that a group may take; None: what the device has free
    vectorized: bool | None = None  # runs side by side or in turn; None: in turn on CPUs alone
    same_order: bool = False  # all runs see the base config's batches, whatever their seeds
    collapse_patience: int | None = 3  # evaluations in a row of one class that end a run
    halving: Halving | None = None  # ends runs early; needs evaluations on the way

    def __post_init__(self):
        if not self.runs and self.search is None:
            raise ValueError("SweepConfig.runs is empty: the sweep would have no run.")
        if self.mode not in (None, *evaluation.MODES):
            raise ValueError(
                f'SweepConfig.mode must be "max" or "min", or None, got {self.mode!r}.'
            )
        if not re.fullmatch(r"(validation|test)\.\w+", self.metric):
            raise ValueError(
                f"SweepConfig.metric is {self.metric!r}, expected a split and one of its metrics, "
                'such as "validation.accuracy".'
            )
        for field in ("slots", "memory", "collapse_patience"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"SweepConfig.{field} must be at least 1, or None, got {value}.")
        if self.halving is not None and self.search is not None:
            raise ValueError("SweepConfig: give halving to `search` as its pruner.")
        prunes = {"halving": self.halving, "search.pruner": self.search and self.search.pruner}
        for field, value in prunes.items():
            if value is not None and not self.metric.startswith("validation."):
                raise ValueError(
                    f"SweepConfig.{field} prunes by the validation split, but metric is "
                    f"{self.metric!r}. Compare by a metric of validation, or set {field} to None."
                )

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return evaluation.sign_of(self.metric, self.mode)


def load_sweep(path: str | pathlib.Path) -> SweepConfig:
    """What `get_sweep()` of a Python file gives: a `SweepConfig`, or a list of changes.

    Arguments for it may stand behind a colon, with or without their names: `ranks.py:loss,seeds=1`
    is `get_sweep("loss", seeds=1)`. Raises FileNotFoundError, or ValueError for a file without it,
    for arguments that it does not take and for another result.
    """
    path, _, arguments = str(path).partition(":")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"--sweep={path}: there is no such file.")
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"--sweep={path}: the file has no get_sweep().")
    found = _call(module.get_sweep, arguments, f"--sweep={path}")
    if isinstance(found, list | tuple):
        found = SweepConfig(runs=tuple(found))
    if not isinstance(found, SweepConfig):
        raise ValueError(
            f"--sweep={path}: get_sweep() gave a {type(found).__name__}; expected a SweepConfig "
            "or a list of changes."
        )
    return found


def _call(get_sweep: Callable[..., Any], arguments: str, where: str) -> Any:
    words, names = [], {}
    for part in filter(None, arguments.split(",")):
        name, is_named, value = part.rpartition("=")
        with contextlib.suppress(ValueError, SyntaxError):  # of a word, which stays one
            value = ast.literal_eval(value)
        if is_named:
            names[name] = value
        else:
            words.append(value)
    signature = inspect.signature(get_sweep)
    try:
        signature.bind(*words, **names)
    except TypeError as error:
        raise ValueError(f"{where}:{arguments}: get_sweep{signature}: {error}.") from None
    return get_sweep(*words, **names)


def make_runs(config: ExperimentConfig, sweep: SweepConfig) -> tuple[Run, ...]:
    """The runs of a sweep that lists them, with names of their own.

    Raises ValueError, naming the run and the key, for what the config does not have or take, and
    for two runs that are the same.
    """
    made = [make_run(config, sweep, i, changes) for i, changes in enumerate(sweep.runs)]
    texts: dict[str, str] = {}
    for run in made:
        text = json.dumps(to_dict(run.config), sort_keys=True)
        if text in texts:
            raise ValueError(f"{run.name} is the same run as {texts[text]}: leave out one of them.")
        texts[text] = run.name
    if sweep.same_order and len({repr(run.config.data) for run in made}) > 1:
        raise ValueError(
            "SweepConfig.same_order: all runs are to see the same batches, but they differ in "
            f"{', '.join(_differing(made))}. Set same_order=False, or make them agree."
        )
    return tuple(made)


def make_run(
    config: ExperimentConfig, sweep: SweepConfig, number: int, changes: Mapping[str, Any]
) -> Run:
    """The run that has some keys of the config changed. Raises as `make_runs` does."""
    where = f"run {number}"
    removed = tuple(f"{key}." for key, value in changes.items() if value is None)
    changes = {key: value for key, value in changes.items() if not key.startswith(removed)}
    if sweep.same_order:
        seed = config.data.loader.seed
        changes = {**changes, "data.loader.seed": config.seed if seed is None else seed}
    try:
        changed = change(config, changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Run(name=_name(number, changes), config=changed, changes=dict(changes))


def change(config: ExperimentConfig, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The config with other values at dotted keys. Raises ValueError as `config.parse` does."""
    values, names = to_dict(config), key_names(ExperimentConfig, "config")
    for key, value in changes.items():
        section, (*parts, last) = values, key.split(".")
        for part in parts:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ValueError(unknown_key(f"config.{key}", value, names))
        section[last] = value
    return parse(values, ExperimentConfig)


def _name(number: int, changes: Mapping[str, Any]) -> str:
    """`003-rank=4-learning_rate=0.001`: what a run changes, in the name of its directory."""
    parts = [f"{number:03d}"]
    for key, value in changes.items():
        if value is None or key == "data.loader.seed":
            continue
        if isinstance(value, Mapping):  # a method's section
            inner = [f"{name}={_short(v)}" for name, v in value.items()]
            parts.append("-".join([key.rpartition(".")[2], *inner]))
        else:
            parts.append(f"{key.rpartition('.')[2]}={_short(value)}")
    return re.sub(r"[^\w.=+-]+", "_", "-".join(parts))[:100]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _differing(made: Sequence[Run]) -> list[str]:
    """The keys of `data` that not all runs have alike."""
    configs = [flat(to_dict(run.config)["data"], "data") for run in made]
    return [key for key in configs[0] if any(c.get(key) != configs[0][key] for c in configs[1:])]
