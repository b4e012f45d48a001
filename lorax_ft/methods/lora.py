"""LoRA: puts low-rank factors round chosen kernels and embeddings of a parameter tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.leaves import Leaf, as_matrix, from_matrix, is_leaf
from lorax_ft.methods import initialization as init
from lorax_ft.methods.dora import DoRA, add_magnitude
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.targets import (
    ALL_LINEAR,
    Targets,
    Uses,
    find,
    input_axes,
    key_of,
    layer_number,
    layer_path,
    pattern_value,
    stack_depth,
)
from lorax_ft.quantization import QuantizationConfig, quantize_array

BIASES = ("none", "lora_only", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which parameters get low-rank factors, how large they are and how they start (Hu et al.
    2021)."""

    targets: Targets = (
        ALL_LINEAR  # "all-linear", a regex over whole paths, or a tuple of module names
    )
    exclude: Targets = ()  # a regex or names to leave out of the targets
    layers: tuple[int, ...] | None = None  # only these layers, counted from 0; None: all
    rank: int = 8
    alpha: float = 16.0  # the update is scaled by alpha / rank
    rslora: bool = False  # ... by alpha / sqrt(rank) (Kalajdzievski 2023)
    dropout: float = 0.0  # share of the inputs of `a` that are dropped in training
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)  # regex to rank
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    initialization: str = "default"  # default, gaussian, pissa, olora, loftq
    loftq_iterations: int = 1
    dora: bool = False  # train the lengths of columns too (Liu et al. 2024)
    bias: str = "none"  # biases trained beside: none, lora_only (of the targets), all
    modules_to_save: tuple[str, ...] = ()  # modules trained whole, such as a new classifier
    dtype: str = "float32"  # of the factors, whatever the base has

    def __post_init__(self):
        if self.rank < 1 or any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError(
                f"LoraConfig.rank must be at least 1, got {self.rank}, {dict(self.rank_pattern)}."
            )
        if not self.alpha > 0:
            raise ValueError(f"LoraConfig.alpha must be positive, got {self.alpha}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoraConfig.dropout must be in [0, 1), got {self.dropout}.")
        starts = (*init.RANDOM, *init.DECOMPOSITIONS, "loftq")
        if self.initialization not in starts:
            raise ValueError(
                f"LoraConfig.initialization is {self.initialization!r}, expected one of {starts}."
            )
        if self.bias not in BIASES:
            raise ValueError(f"LoraConfig.bias is {self.bias!r}, expected one of {BIASES}.")

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def add_lora(
    params: Any,
    config: LoraConfig,
    key: jax.Array,
    uses: Uses = None,
    quantization: QuantizationConfig | None = None,
) -> Any:
    """Puts a `LoRA` (or `DoRA`) leaf around every parameter that `config.targets` names.

    A kernel [*stack, d_in, d_out] becomes base, a [*stack, rank, d_in] and b [*stack, rank, d_out];
    the model computes the same function until it is trained. `uses`, from `inspect`, says which
    axes of a kernel are inputs and which are stacked; without it a kernel is [*stack, d_in, d_out].
    Each parameter's key is folded from its path. Works under `jax.eval_shape` with random starts.

    `quantization` says how LoftQ quantises the targets, which must be float until then. Raises
    ValueError where nothing matches, and for a target that has an adapter already.
    """
    parameters = trees.flatten(params)
    adapted = {}
    for path in find(params, config.targets, config.exclude, uses, field="LoraConfig.targets"):
        ranks, scales = _ranks_and_scales(path, parameters[path], config, uses)
        if ranks.any():
            start = _Start(path, parameters[path], config, uses, quantization, key_of(key, path))
            adapted[path] = start.leaf(ranks, scales)
    if not adapted:
        raise ValueError(f"LoraConfig.layers: {config.layers} leaves no layer of the targets.")
    return trees.with_fields(params, adapted)


def trained_biases(params: Any, config: LoraConfig, uses: Uses = None) -> list[str]:
    """Paths of the biases that are trained beside the factors."""
    biases = [path for path in trees.flatten(params) if path.rsplit("/", 1)[-1] == "bias"]
    if config.bias == "lora_only":
        targets = find(params, config.targets, config.exclude, uses, field="LoraConfig.targets")
        owners = {path.rsplit("/", 1)[0] for path in targets}
        return [path for path in biases if path.rsplit("/", 1)[0] in owners]
    return biases if config.bias == "all" else []


def _ranks_and_scales(
    path: str, value: Any, config: LoraConfig, uses: Uses
) -> tuple[np.ndarray, np.ndarray]:
    """Rank and scale of every layer of a stack; rank 0 for one that `config.layers` leaves out."""
    stack = tuple(value.shape[: stack_depth(path, value, uses)])
    ranks, scales = np.zeros(stack, np.int32), np.zeros(stack, np.float32)
    for index in np.ndindex(stack):
        name = layer_path(path, index)
        layer = index[0] if index else layer_number(name)
        if config.layers is None or layer in config.layers:
            rank = pattern_value(
                name, config.rank_pattern, pattern_value(path, config.rank_pattern, config.rank)
            )
            alpha = pattern_value(
                name, config.alpha_pattern, pattern_value(path, config.alpha_pattern, config.alpha)
            )
            ranks[index], scales[index] = rank, config.scale(rank, alpha)
    return ranks, scales


@dataclasses.dataclass(frozen=True)
class _Start:
    """One parameter on its way to becoming a leaf."""

    path: str
    base: Any
    config: LoraConfig
    uses: Uses
    quantization: QuantizationConfig | None
    key: jax.Array

    def leaf(self, ranks: np.ndarray, scales: np.ndarray) -> LoRA | DoRA:
        """The leaf with factors of the largest rank, padded by zero rows where a layer's is
        lower."""
        factored = isinstance(self.base, Leaf) and "b" in self.base.trainable
        if factored or isinstance(self.base, DoRA):
            raise ValueError(
                f"LoraConfig.targets: {self.path} has a {trees.kind(self.base)} adapter already."
            )
        start = self._random if self.config.initialization in init.RANDOM else self._decomposed
        base, a, b = start(ranks, scales)
        lora = LoRA(
            base=base,
            a=a,
            b=b,
            scale=jnp.asarray(scales),
            rank=jnp.asarray(ranks),
            dropout=jnp.full(ranks.shape, self.config.dropout) if self.config.dropout else None,
            base_in_axes=self.in_axes,
        )
        return add_magnitude(lora) if self.config.dora else lora

    @property
    def in_axes(self) -> tuple[int, ...]:
        return input_axes(self.path, self.base, self.uses)

    @property
    def is_embedding(self) -> bool:
        if self.uses and self.path in self.uses:
            return self.uses[self.path].kind == "embedding"
        return self.path.rsplit("/", 1)[-1] == "embedding"

    def _random(self, ranks: np.ndarray, scales: np.ndarray) -> tuple[Any, Any, Any]:
        core = self.base.shape[ranks.ndim :]
        in_size = math.prod(core[axis] for axis in self.in_axes)
        sizes = (in_size, math.prod(core) // in_size)
        random = init.embedding if self.is_embedding else init.RANDOM[self.config.initialization]
        dtype = jnp.dtype(self.config.dtype)
        pairs = [
            _padded(*random(key, int(rank), *sizes, dtype), int(ranks.max()))
            for key, rank in zip(jax.random.split(self.key, max(1, ranks.size)), ranks.flat)
        ]
        a, b = (
            jnp.stack(factors).reshape(*ranks.shape, ranks.max(), -1) for factors in zip(*pairs)
        )
        return self.base, a, b

    def _decomposed(self, ranks: np.ndarray, scales: np.ndarray) -> tuple[Any, Any, Any]:
        if is_leaf(self.base):
            raise ValueError(
                f"LoraConfig.initialization: {self.config.initialization!r} decomposes floats, but "
                f"{self.path} is a {trees.kind(self.base)} leaf. Add LoRA first, quantise after it."
            )
        weights = np.asarray(self.base, np.float32)
        layers = [
            self._decompose(weights[i], int(ranks[i]), float(scales[i]))
            for i in np.ndindex(ranks.shape)
        ]
        bases, a, b = zip(*layers)
        rows = int(ranks.max())
        a, b = zip(*(_padded(*factors, rows) for factors in zip(a, b)))
        return tuple(_stacked(part, ranks.shape) for part in (bases, a, b))  # type: ignore[return-value]

    def _decompose(self, core: np.ndarray, rank: int, scale: float) -> tuple[Any, Any, Any]:
        """(base, a, b) of one layer's core array."""
        name, dtype = self.config.initialization, jnp.dtype(self.config.dtype)
        matrix = np.asarray(as_matrix(jnp.asarray(core), self.in_axes))
        if rank > min(matrix.shape):
            raise ValueError(
                f"LoraConfig.rank: {rank} is larger than {self.path} allows ({min(matrix.shape)})."
            )
        if rank == 0:
            a, b = np.zeros((0, matrix.shape[0])), np.zeros((0, matrix.shape[1]))
            return jnp.asarray(core, self.base.dtype), jnp.asarray(a, dtype), jnp.asarray(b, dtype)
        if name == "loftq":
            base, a, b = init.loftq(
                matrix, rank, scale, self._quantize, self.config.loftq_iterations
            )
        else:
            rest, a, b = init.DECOMPOSITIONS[name](matrix, rank, scale)
            base = from_matrix(jnp.asarray(rest), core.shape, self.in_axes).astype(self.base.dtype)
        return base, jnp.asarray(a, dtype), jnp.asarray(b, dtype)

    def _quantize(self, matrix: np.ndarray) -> Any:
        if self.quantization is None:
            raise ValueError(
                "LoraConfig.initialization 'loftq' needs a quantisation: pass quantization=…"
            )
        if (
            self.in_axes != (-2,)
            or len(self.base.shape) - stack_depth(self.path, self.base, self.uses) != 2
        ):
            raise ValueError(
                f"LoraConfig.initialization: 'loftq' takes [d_in, d_out] kernels, not {self.path}."
            )
        return quantize_array(matrix, self.quantization, path=self.path)


def _padded(a: Any, b: Any, rows: int) -> tuple[Any, Any]:
    return tuple(jnp.pad(factor, ((0, rows - factor.shape[0]), (0, 0))) for factor in (a, b))  # type: ignore[return-value]


def _stacked(layers: Sequence[Any], stack: tuple[int, ...]) -> Any:
    """Layers of one kind, arrays or leaves, as one with the stack axes in front."""
    if not stack:
        return layers[0]
    return jax.tree.map(
        lambda *fields: jnp.stack(fields).reshape(*stack, *fields[0].shape), *layers
    )
