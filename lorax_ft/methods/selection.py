"""Methods that add nothing and choose which of the model's own arrays are trained: all, biases, or
a head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from lorax_ft import trees
from lorax_ft.leaves import is_leaf
from lorax_ft.methods.targets import Targets, Uses, modules, named


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
    """BitFit (Ben Zaken et al. 2022): every bias, and modules such as a new classifier whole."""

    targets: Targets = r"(.*/)?bias"
    modules_to_save: tuple[str, ...] = ()


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
    paths = list(trees.flatten(params))
    chosen = set(named(paths, config.targets, field="BitFitConfig.targets"))
    chosen.update(modules(paths, config.modules_to_save, field="BitFitConfig.modules_to_save"))
    return [path for path in paths if path in chosen]
