"""Optuna's samplers and pruners, as a search asks for them."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from lorax_ft.sweeps.spaces import Choice, Distribution
from lorax_ft.sweeps.specification import Search
from lorax_ft.trees import nearest


def load_optuna() -> Any:
    """The module, silent but for warnings. Raises ImportError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ImportError(
            "A search needs Optuna: pip install 'lorax_ft[search]'. Sweeps that list their runs do "
            "without."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def make_sampler(
    search: Search, space: Mapping[str, Distribution], *, field: int, number: int
) -> Any:
    """The sampler of one trial, whose draws depend on its number and on what is known by then."""
    samplers = load_optuna().samplers
    order = search.seed * 1009 + field
    if search.sampler == "grid":  # in one order for all trials, each taking the place of its number
        assert all(isinstance(item, Choice) for item in space.values())
        points = {key: numbers(item) for key, item in space.items() if isinstance(item, Choice)}
        return samplers.GridSampler(points, seed=order % 2**32)
    seed = (order * 100003 + number) % 2**32
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls constant_liar experimental
        return samplers.TPESampler(seed=seed, constant_liar=True)


def suggest(trial: Any, key: str, item: Distribution) -> Any:
    """The value that a trial has of a distribution, or now gets."""
    if not isinstance(item, Choice):
        return trial.suggest_float(key, item.low, item.high, log=item.log)
    # by number, for a value may be what no study can hold, such as a method's section
    return item.values[trial.suggest_categorical(key, numbers(item))]


def numbers(item: Choice) -> list[int]:
    """What a study knows the values of a choice by."""
    return list(range(len(item.values)))


def check_pruner(search: Search) -> None:
    """Raises ValueError for options that the search's pruner does not take."""
    make_pruner(search, first=1, last=sys.maxsize)


def make_pruner(search: Search, *, first: int, last: int) -> Any:
    """The pruner of runs that are evaluated from step `first` on and end at `last`.

    These are the least and the most that successive halving and Hyperband grant a run, where
    `search.pruner_options` do not say otherwise: what Optuna guesses instead it takes from the
    first run that is finished, before which none is pruned. Raises ValueError for options that the
    pruner does not have or take.
    """
    pruners = load_optuna().pruners
    if search.pruner is None:
        return pruners.NopPruner()
    kind = {
        "median": pruners.MedianPruner,
        "halving": pruners.SuccessiveHalvingPruner,
        "hyperband": pruners.HyperbandPruner,
    }[search.pruner]
    names = list(inspect.signature(kind).parameters)
    for name, value in search.pruner_options.items():
        if name not in names:
            near = nearest(name, names) or names
            raise ValueError(
                f"Search.pruner_options has {name} = {value!r}, which Optuna's {kind.__name__} "
                f"does not take; nearest: {', '.join(near)}."
            )
    resources = {"min_resource": first, "max_resource": last}
    options = {name: resources[name] for name in names if name in resources}
    options |= search.pruner_options
    given = f"Search.pruner_options = {dict(search.pruner_options)!r}"
    least, most = options.get("min_resource"), options.get("max_resource", last)
    if isinstance(least, int) and isinstance(most, int) and least >= most:
        raise ValueError(
            f"{given}: no run would be pruned between step {least}, the least that one is granted, "
            f"and {most}, the most. Set min_resource to a step on the way."
        )
    try:
        if search.pruner == "hyperband":  # which makes these when it prunes, and then checks them
            brackets = {name: value for name, value in options.items() if name != "max_resource"}
            pruners.SuccessiveHalvingPruner(**brackets)
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{given}: {error}") from error
