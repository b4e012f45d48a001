"""Methods that choose which of the model's own arrays are trained: all, the last layers', a head's,
norms or biases."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from lorax_ft import trees
from lorax_ft.leaves import is_leaf
from lorax_ft.methods.targets import (
    Targets,
    Uses,
    layer_number,
    modules,
    named,
    norms,
    stack_name,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Full fine-tuning: every floating-point array that the targets match."""

    targets: Targets = ".*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Trains whole modules and nothing else: the floor that any other method has to beat."""

    modules: tuple[str, ...] = ("classifier",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig:
    """BitFit (Ben Zaken et al. 2022): every bias, and modules such as a new classifier whole.

    A tuple of targets names the modules whose biases are trained: the paper's smaller set is
    `("query", "up")`, of queries and of the feed-forward net's first layer.
    """

    targets: Targets = r"(.*/)?bias"
    add_missing: bool = False  # give the targets' kernels that have no bias one that starts at zero
    modules_to_save: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Trains the scales and biases of norms (Qi et al. 2022, "Parameter-Efficient Tuning on Layer
    Normalization")."""

    targets: Targets = ".*"
    modules_to_save: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLayersConfig:
    """Trains the last layers whole, of an encoder-decoder those of both halves. They must be
    unrolled: a stacked array is trained or frozen whole."""

    count: int = 1
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"TopLayersConfig.count must be at least 1, got {self.count}.")


def all_arrays(params: Any, config: FullConfig, uses: Uses = None) -> list[str]:
    """Paths of the arrays to train. Raises ValueError where one of them is quantised or adapted."""
    parameters = trees.flatten(params)
    chosen = named(list(parameters), config.targets, field="FullConfig.targets")
    if held := [path for path in chosen if is_leaf(parameters[path])]:
        raise ValueError(
            f"FullConfig.targets: {held[0]} is a {trees.kind(parameters[held[0]])} leaf."
        )
    return [path for path in chosen if jnp.issubdtype(parameters[path].dtype, jnp.floating)]


def head(params: Any, config: HeadConfig, uses: Uses = None) -> list[str]:
    """Paths of the arrays in the named modules."""
    return modules(trees.flatten(params), config.modules, field="HeadConfig.modules")


def biases(params: Any, config: BitFitConfig, uses: Uses = None) -> list[str]:
    """Paths of the biases. A model without biases raises ValueError."""
    own = [path for path in trees.flatten(params) if path.rpartition("/")[2] == "bias"]
    if not own and not config.add_missing:
        raise ValueError(
            "BitFitConfig: the model has no biases. Set add_missing to give every linear layer one "
            "that starts at zero, or train something else."
        )
    patterns = config.targets
    if not isinstance(patterns, str):
        patterns = [rf"(.*/)?{re.escape(name)}/bias" for name in patterns]
    if config.add_missing:
        return [path for path in own if trees.matches(path, patterns)]
    return trees.select(own, patterns, field="BitFitConfig.targets")


def norm_arrays(params: Any, config: NormConfig, uses: Uses = None) -> list[str]:
    """Paths of the norms' scales and biases."""
    return norms(params, config.targets, uses, field="NormConfig.targets")


def top_layers(params: Any, config: TopLayersConfig, uses: Uses = None) -> list[str]:
    """Paths of everything in the last layers. Raises ValueError where the layers are stacked."""
    parameters = trees.flatten(params)
    layers: dict[str, set[int]] = {}  # by what is above them: an encoder-decoder has two stacks
    for path in parameters:
        if (number := layer_number(path)) is not None:
            layers.setdefault(stack_name(path), set()).add(number)
    fewest = min(map(len, layers.values()), default=0)
    if fewest < config.count:
        raise ValueError(
            f"TopLayersConfig.count is {config.count}, but only {fewest} layers have "
            "parameters of their own. Stacked layers are trained together: set scan_layers=False."
        )
    last = {stack: sorted(numbers)[-config.count :] for stack, numbers in layers.items()}
    return [
        path
        for path, value in parameters.items()
        if layer_number(path) in last.get(stack_name(path), ()) and not is_leaf(value)
    ]
