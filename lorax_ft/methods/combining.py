"""One adapter out of several: weighted sums, concatenation, SVD, TIES and DARE.

The methods and their numbers are those of Hugging Face PEFT 0.21 (`LoraModel.add_weighted_adapter`,
`peft/utils/merge_utils.py`). With W_i = s_i a_i.T b_i the update of adapter i and w_i its weight:

- `cat`: factors one after another, so the result is the sum of w_i W_i, exactly.
- `svd`: the best approximation of that sum of a given rank.
- `linear`: sums of the factors themselves, a and b each weighted by sqrt(|w_i| s_i). It is not the
  sum of updates, for it has the cross terms a_i.T b_j too (Ilharco et al. 2022 on whole weights).
- `ties`: small numbers trimmed, a sign elected for each place, and the mean of what has that sign
  (Yadav et al. 2023, "TIES-Merging").
- `dare_linear`, `dare_ties`: numbers dropped at random and the rest scaled up, then summed or put
  together as in `ties` (Yu et al. 2023, "Language Models are Super Mario").
- `magnitude_prune`: small numbers trimmed, then summed.

The last four work on the factors; with `_svd` behind the name they work on the updates, and the
result is approximated in a given rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft import trees
from lorax_ft.methods.agreement import check_agreement
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.targets import key_of

PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("linear", "cat", "svd", *PRUNED, *(f"{name}_svd" for name in PRUNED))
SIGNS = ("total", "frequency")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombinationConfig:
    """How several adapters become one."""

    method: str = "svd"  # one of COMBINATIONS
    density: float | None = None  # share of numbers kept, of the methods that prune
    rank: int | None = None  # of the result of svd methods; None: the largest among the adapters
    sign: str = "total"  # ties elects by the sum of numbers, or by the "frequency" of signs

    def __post_init__(self):
        if self.method not in COMBINATIONS:
            raise ValueError(
                f"CombinationConfig.method is {self.method!r}, expected one of {COMBINATIONS}."
            )
        if self.sign not in SIGNS:
            raise ValueError(f"CombinationConfig.sign is {self.sign!r}, expected one of {SIGNS}.")
        if self.rank is not None and (self.rank < 1 or not self.is_svd):
            raise ValueError(
                f"CombinationConfig.rank is {self.rank} with method {self.method!r}; it must be at "
                "least 1, and only svd methods have a rank to choose."
            )
        if self.prunes != (self.density is not None):
            raise ValueError(
                f"CombinationConfig.density is {self.density} with method {self.method!r}; the "
                f"methods that prune need one, the others take none: {PRUNED}, also with _svd."
            )
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"CombinationConfig.density must be in (0, 1], got {self.density}.")

    @property
    def is_svd(self) -> bool:
        return self.method.endswith("svd")

    @property
    def prunes(self) -> bool:
        return self.method.removesuffix("_svd") in PRUNED

    @property
    def is_random(self) -> bool:
        return self.method.startswith("dare")


def combine_adapters(
    adapters: Mapping[str, Any],
    weights: Sequence[float],
    config: CombinationConfig,
    key: jax.Array | None = None,
) -> Any:
    """The params tree with one LoRA leaf for the several that `adapters`, params trees by name,
    have.

    `weights` has a number for each, negative ones too. The result's scale is 1. Each layer of a
    stack is combined by itself. DARE needs a `key`, from which each tensor's own is folded. Raises
    ValueError where adapters have different targets or bases, naming the parameter; where they
    differ in plain arrays; where ranks differ and the method adds factors; and where a key is
    missing.

    >>> from lorax_ft import LoraConfig, add_lora
    >>> base = {"up": {"kernel": jnp.eye(4)}}
    >>> add = lambda rank: add_lora(base, LoraConfig(targets=("up",), rank=rank), jax.random.key(0))
    >>> pair = {"en": add(2), "de": add(3)}
    >>> combined = combine_adapters(pair, (0.5, 0.5), CombinationConfig(method="cat"))
    >>> combined["up"]["kernel"].a.shape
    (5, 4)
    """
    targets, different = check_agreement(adapters, field="combine_adapters")
    if different:
        raise ValueError(
            f"combine_adapters: the adapters differ in {different[0]}, which is no LoRA leaf."
        )
    if len(weights) != len(adapters):
        raise ValueError(
            f"combine_adapters: {len(weights)} weights for {len(adapters)} adapters; expected one "
            "for each."
        )
    if config.is_random and key is None:
        raise ValueError(f"combine_adapters: {config.method!r} draws at random and needs a key.")
    parameters = [trees.flatten(params) for params in adapters.values()]
    combined = {
        path: _Combination(path, weights, config, key).leaf([p[path] for p in parameters])
        for path in targets
    }
    return trees.with_fields(next(iter(adapters.values())), combined)


# --- Task vectors ---------------------------------------------------------------------------------

# `tensors` are arrays of one shape, one for each adapter; `weights` a number for each.

Tensors = Sequence[np.ndarray]


def weighted_sum(tensors: Tensors, weights: Sequence[float]) -> np.ndarray:
    """Task arithmetic: the sum of `weights[i] * tensors[i]`."""
    return np.sum(_weighted(tensors, weights), axis=0)


def elect_and_merge(tensors: Tensors, weights: Sequence[float], sign: str = "total") -> np.ndarray:
    """TIES after its trimming: in each place, the mean of the weighted numbers that have the
    elected sign.

    As in PEFT the sign is elected by the numbers before they are weighted, a tie counts as
    positive, and the mean is over the numbers, not over their weights.
    """
    stacked = np.stack(tensors)
    ballots = stacked if sign == "total" else np.sign(stacked)
    elected = np.where(ballots.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(stacked) == elected[None]
    total = np.sum(_weighted(tensors, weights) * agrees, axis=0)
    return total / np.maximum(agrees.sum(axis=0), 1).astype(total.dtype)


def keep_largest(tensor: np.ndarray, density: float) -> np.ndarray:
    """The tensor with all but its `int(density * size)` largest magnitudes set to zero."""
    kept = np.zeros(tensor.size, tensor.dtype)
    count = int(density * tensor.size)
    flat = tensor.reshape(-1)
    largest = np.argsort(-np.abs(flat), kind="stable")[:count]
    kept[largest] = flat[largest]
    return kept.reshape(tensor.shape)


def drop_and_rescale(tensor: np.ndarray, density: float, key: jax.Array) -> np.ndarray:
    """DARE: each number is kept with probability `density` and divided by it, or else zero."""
    return np.where(keep_mask(key, density, tensor.shape), tensor / np.float32(density), 0.0)


def keep_mask(key: jax.Array, density: float, shape: tuple[int, ...]) -> np.ndarray:
    """Which numbers DARE keeps."""
    return np.asarray(jax.random.bernoulli(key, density, shape))


def _weighted(tensors: Tensors, weights: Sequence[float]) -> np.ndarray:
    stacked = np.stack(tensors)
    column = np.asarray(weights, np.float32).reshape(-1, *(1,) * (stacked.ndim - 1))
    return stacked * column


# --- Factors --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Factors:
    """One adapter in one layer, without padding: a [rank, in], b [rank, out]."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def update(self) -> np.ndarray:
        return np.float32(self.scale) * (self.a.T @ self.b)


Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Combination:
    """One parameter's combination."""

    path: str
    weights: Sequence[float]
    config: CombinationConfig
    key: jax.Array | None

    def leaf(self, leaves: Sequence[LoRA]) -> LoRA:
        first = leaves[0]
        stack = first.stack_shape
        pairs = [self.layer(number, leaves) for number in range(math.prod(stack))]
        ranks = np.array([a.shape[0] for a, _ in pairs], np.int32)
        rows = max(1, int(ranks.max()))
        a, b = (
            np.stack([np.pad(f, ((0, rows - f.shape[0]), (0, 0))) for f in factors])
            for factors in zip(*pairs)
        )
        return LoRA(
            base=first.base,
            a=jnp.asarray(a.reshape(*stack, *a.shape[1:]), first.a.dtype),
            b=jnp.asarray(b.reshape(*stack, *b.shape[1:]), first.b.dtype),
            scale=jnp.ones(stack, jnp.float32),
            rank=jnp.asarray(ranks.reshape(stack)),
            base_in_axes=first.base_in_axes,
        )

    def layer(self, number: int, leaves: Sequence[LoRA]) -> Pair:
        """(a, b) of the combined adapter in one layer, counted through the stack axes."""
        index = np.unravel_index(number, leaves[0].stack_shape)
        adapters = [_factors(leaf, index) for leaf in leaves]
        method = self.config.method
        if not any(adapter.rank for adapter in adapters):
            return adapters[0].a, adapters[0].b
        if method == "cat":
            return _concatenated(adapters, self.weights)
        if method == "svd":
            return _low_rank(*_concatenated(adapters, self.weights), self._rank(adapters))
        if self.config.is_svd:
            updates = [adapter.update() for adapter in adapters]
            return _svd(self._merged(updates, self.weights, number, 0), self._rank(adapters))
        return self._by_factors(adapters, number)

    def _by_factors(self, adapters: Sequence[_Factors], number: int) -> Pair:
        """`a` and `b` merged each by itself, the weight's root on either side, its sign on `a`."""
        if len({adapter.rank for adapter in adapters}) > 1:
            raise ValueError(
                f"combine_adapters: {self.path} has ranks {[a.rank for a in adapters]}, and "
                f"{self.config.method!r} adds factors of one rank. Use 'cat' or an svd method."
            )
        strengths = [w * adapter.scale for w, adapter in zip(self.weights, adapters)]
        of_b = [math.sqrt(abs(strength)) for strength in strengths]
        of_a = [math.copysign(root, strength) for root, strength in zip(of_b, strengths)]
        return (
            self._merged([adapter.a for adapter in adapters], of_a, number, 0),
            self._merged([adapter.b for adapter in adapters], of_b, number, 1),
        )

    def _merged(
        self, tensors: Tensors, weights: Sequence[float], number: int, part: int
    ) -> np.ndarray:
        """Prunes and adds up the tensors of one layer; `part` is 0 for `a` or the update, 1 for
        `b`."""
        config = self.config
        if config.density is not None:
            tensors = [
                self._pruned(tensor, config.density, (number, part, i))
                for i, tensor in enumerate(tensors)
            ]
        if "ties" in config.method:
            return elect_and_merge(tensors, weights, config.sign)
        return weighted_sum(tensors, weights)

    def _pruned(self, tensor: np.ndarray, density: float, folds: Sequence[int]) -> np.ndarray:
        if not self.config.is_random:
            return keep_largest(tensor, density)
        assert self.key is not None
        key = key_of(self.key, self.path)
        for fold in folds:
            key = jax.random.fold_in(key, fold)
        return drop_and_rescale(tensor, density, key)

    def _rank(self, adapters: Sequence[_Factors]) -> int:
        rank = self.config.rank or max(adapter.rank for adapter in adapters)
        largest = min(adapters[0].a.shape[1], adapters[0].b.shape[1])
        if self.config.rank is not None and rank > largest:
            raise ValueError(
                f"CombinationConfig.rank: {rank} is larger than {self.path} allows ({largest})."
            )
        return min(rank, largest)


def _factors(leaf: LoRA, index: Any) -> _Factors:
    rank = int(leaf.rank[index])
    a, b = (np.asarray(factor[index], np.float32)[:rank] for factor in (leaf.a, leaf.b))
    return _Factors(a, b, float(leaf.scale[index]))


def _concatenated(adapters: Sequence[_Factors], weights: Sequence[float]) -> Pair:
    strengths = [np.float32(w * adapter.scale) for w, adapter in zip(weights, adapters)]
    a = [strength * adapter.a for strength, adapter in zip(strengths, adapters)]
    return np.concatenate(a), np.concatenate([adapter.b for adapter in adapters])


def _svd(update: np.ndarray, rank: int) -> Pair:
    """(a, b) with `a.T @ b` the best approximation of `[in, out]`; the singular values go to b, as
    in PEFT."""
    u, s, vt = np.linalg.svd(update, full_matrices=False)
    return u[:, :rank].T, s[:rank, None] * vt[:rank]


def _low_rank(a: np.ndarray, b: np.ndarray, rank: int) -> Pair:
    """`_svd(a.T @ b, rank)` by way of two QR decompositions: nothing of size [in, out] is made."""
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b.T)
    inner_a, inner_b = _svd(r_a @ r_b.T, rank)
    return inner_a @ q_a.T, inner_b @ q_b.T
