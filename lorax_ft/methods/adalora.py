"""AdaLoRA: updates in the form of an SVD, and a budget of singular values that goes where it
matters.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning". The
update is `scale * (a.T * values) @ b`. While training, each triplet of a singular value and its two
vectors is scored by how sensitive the loss is to it; the values of the lowest are set to zero, more
of them as the budget falls. Numbers as in Hugging Face PEFT 0.21 (`peft/tuners/adalora/layer.py`).

A training step with it, for which `training.allocate_budget` makes one of any optimizer:

    loss = task_loss + config.orthogonality_weight * orthogonality(params)
    train = optax.apply_updates(train, updates)
    train, allocation = allocate(train, gradients, allocation, step, config, total_steps)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lorax_ft import trees
from lorax_ft.leaves import Array, leaf, static_field
from lorax_ft.methods.lora import LoraConfig, add_lora
from lorax_ft.methods.lora_leaf import LoRA
from lorax_ft.methods.targets import ALL_LINEAR, Targets, Uses, find, key_of
from lorax_ft.methods.wrapper import Wrapper
from lorax_ft.quantization import QuantizationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """Which parameters get an update, and how the budget of singular values falls from `rank` to
    `target_rank` for each of them on average."""

    targets: Targets = ALL_LINEAR  # as LoraConfig.targets
    exclude: Targets = ()
    rank: int = 12  # of every update at first
    target_rank: int = 8  # on average in the end
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0
    warmup_steps: int = 0  # with the whole budget
    final_steps: int = 0  # with the last budget, its places fixed
    interval: int = 1  # steps from one allocation to the next
    beta1: float = 0.85  # of the average of sensitivity
    beta2: float = 0.85  # of the average of its uncertainty
    orthogonality_weight: float = 0.5  # of `orthogonality` in the loss
    modules_to_save: tuple[str, ...] = ()  # modules trained whole, such as a new classifier
    dtype: str = "float32"  # of values and vectors

    def __post_init__(self):
        if not 1 <= self.target_rank <= self.rank:
            raise ValueError(
                f"AdaLoraConfig.target_rank must be from 1 to rank, got {self.target_rank} with "
                f"rank {self.rank}."
            )
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(
                    f"AdaLoraConfig.{name} must be in (0, 1), got {getattr(self, name)}."
                )
        if self.interval < 1 or self.warmup_steps < 0 or self.final_steps < 0:
            raise ValueError(
                "AdaLoraConfig: interval must be at least 1 and steps not negative, got "
                f"{self.interval}, {self.warmup_steps}, {self.final_steps}."
            )


@leaf
class AdaLoRA(Wrapper):
    """`base + scale * (a.T * values) @ b`: the update's right vectors in `a` [*stack, r, in_size],
    its left ones in `b` [*stack, r, out_size], its singular values [*stack, r] apart."""

    base: Any  # [*stack, *core] array or leaf
    a: Array
    values: Array
    b: Array
    scale: Array  # [*stack] float32: alpha / rank
    dropout: Array | None = None  # as in LoRA
    key: Array | None = None
    base_in_axes: tuple[int, ...] = static_field(default=(-2,))

    trainable: ClassVar[tuple[str, ...]] = ("a", "values", "b")

    def folded(self) -> LoRA:
        """The LoRA leaf that computes the same, with the singular values in `a`."""
        return LoRA(
            base=self.base,
            a=self.a * self.values[..., None],
            b=self.b,
            scale=self.scale,
            rank=jnp.full(self.stack_shape, self.values.shape[-1], jnp.int32),
            dropout=self.dropout,
            key=self.key,
            base_in_axes=self.base_in_axes,
        )

    @property
    def stack_depth(self) -> int:
        return self.values.ndim - 1

    def linear(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        return self.folded().linear(
            x, precision=precision, preferred_element_type=preferred_element_type
        )

    def linear_transposed(self, x: Array, *, precision=None, preferred_element_type=None) -> Array:
        return self.folded().linear_transposed(
            x, precision=precision, preferred_element_type=preferred_element_type
        )

    def take(self, ids: Array, *, mode: str | None = None) -> Array:
        return self.folded().take(ids, mode=mode)

    def dense(self) -> Array:
        return self.folded().dense()

    def partition_specs(self, spec: PartitionSpec) -> AdaLoRA:
        specs = self.folded().partition_specs(spec)
        return self.replace(
            base=specs.base,
            a=specs.a,
            values=PartitionSpec(*specs.scale, None),
            b=specs.b,
            scale=specs.scale,
            dropout=specs.dropout,
            key=specs.key,
        )


def add_adalora(
    params: Any,
    config: AdaLoraConfig,
    key: jax.Array,
    uses: Uses = None,
    quantization: QuantizationConfig | None = None,
) -> Any:
    """Puts an `AdaLoRA` leaf around every parameter that `config.targets` names.

    Vectors start normal with deviation 0.02 and values at zero, so the model computes the same
    until it is trained. Raises ValueError where nothing matches, and for a target that has an
    adapter already.
    """
    targets = find(params, config.targets, config.exclude, uses, field="AdaLoraConfig.targets")
    lora = LoraConfig(
        targets="|".join(map(re.escape, targets)),
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        dtype=config.dtype,
    )
    before, added = trees.flatten(params), add_lora(params, lora, key, uses, quantization)

    def started(path: str, value: Any) -> Any:
        if not isinstance(value, LoRA) or value is before[path]:
            return value
        return _start(value, key_of(key, path))

    return trees.map_with_path(started, added)


def orthogonality(params: Any) -> Array:
    """How far vectors are from orthonormal: the mean over all `a` and `b` of `||p @ p.T - 1||`.

    Of params or of their trainable half; float32 scalar. Frobenius norms, one for each layer and
    side (equation 4 of the paper squares them; PEFT, which this follows, does not). Raises
    ValueError where there is no AdaLoRA leaf.
    """
    leaves = _adalora_leaves(params).values()
    norms = [_distance(factor).reshape(-1) for leaf in leaves for factor in (leaf.a, leaf.b)]
    return jnp.mean(jnp.concatenate(norms))


# --- The budget -----------------------------------------------------------------------------------


class Triplets(NamedTuple):
    """A float32 number for each trained number of one leaf."""

    a: Array  # [*stack, r, in]
    values: Array  # [*stack, r]
    b: Array  # [*stack, r, out]


class Allocation(NamedTuple):
    """What the allocation remembers between steps; the dictionaries are by parameter path."""

    sensitivity: dict[str, Triplets]  # average of |number * gradient|
    uncertainty: dict[str, Triplets]  # average of the sensitivity's distance from its average
    active: dict[str, Array]  # [*stack, r] bool: singular values that the last allocation kept


def start_allocation(params: Any) -> Allocation:
    """The state before the first step: nothing known, every singular value active.

    Raises ValueError where there is no AdaLoRA leaf.
    """
    leaves = _adalora_leaves(params)

    def zeros(leaf: AdaLoRA) -> Triplets:
        shapes = (leaf.a.shape, leaf.values.shape, leaf.b.shape)
        return Triplets(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    return Allocation(
        sensitivity={path: zeros(leaf) for path, leaf in leaves.items()},
        uncertainty={path: zeros(leaf) for path, leaf in leaves.items()},
        active={path: jnp.ones(leaf.values.shape, bool) for path, leaf in leaves.items()},
    )


def allocate(
    train: Any,
    gradients: Any,
    allocation: Allocation,
    step: Any,
    config: AdaLoraConfig,
    total_steps: int,
) -> tuple[Any, Allocation]:
    """One step's scores, and where it is due the allocation of the budget, after the optimizer's
    update.

    `train` is the trainable half (or the params) with that update in it, `gradients` are those it
    was made from, `step` counts to `total_steps` and may be traced. Values without budget are set
    to zero; until the budget is final they may grow again. Returns the trainable half and the new
    state.
    """
    leaves, slopes = _adalora_leaves(train), _adalora_leaves(gradients)
    end = total_steps - config.final_steps
    step = jnp.asarray(step, jnp.int32)
    averages = {
        path: _averaged(
            _triplets(leaf),
            _triplets(slopes[path]),
            allocation.sensitivity[path],
            allocation.uncertainty[path],
            config,
        )
        for path, leaf in leaves.items()
    }
    learning = step < end
    sensitivity, uncertainty = (
        {path: _chosen(learning, averages[path][i], old[path]) for path in leaves}
        for i, old in enumerate((allocation.sensitivity, allocation.uncertainty))
    )
    due = ((step > config.warmup_steps) & learning & (step % config.interval == 0)) | (step == end)
    scores = {path: _scores(sensitivity[path], uncertainty[path]) for path in leaves}
    count = sum(score.size for score in scores.values())
    budgets = jnp.asarray(budget_schedule(config, count, total_steps))
    threshold = _threshold(scores, budgets[jnp.clip(step, 0, total_steps)])
    active = {
        path: jnp.where(due, scores[path] > threshold, allocation.active[path]) for path in leaves
    }
    applies = due | (step > end)
    changed = {
        path: leaf.replace(
            values=jnp.where(applies & ~active[path], jnp.zeros((), leaf.values.dtype), leaf.values)
        )
        for path, leaf in leaves.items()
    }
    return trees.with_fields(train, changed), Allocation(sensitivity, uncertainty, active)


def budget_schedule(config: AdaLoraConfig, initial: int, total_steps: int) -> np.ndarray:
    """How many singular values of `initial` are kept at steps 0 to `total_steps`, int32.

    Equation 12 of the paper: all until `warmup_steps`, then falling with the cube of what is left,
    to `target_rank / rank` of them for `final_steps`. Raises ValueError where no step is left for
    it to fall in.
    """
    falling = total_steps - config.final_steps - config.warmup_steps
    if falling < 1:
        raise ValueError(
            f"AdaLoraConfig: {config.warmup_steps} warmup_steps and {config.final_steps} "
            f"final_steps leave none of the run's {total_steps} for the budget to fall in."
        )
    target = initial // config.rank * config.target_rank
    steps = np.arange(total_steps + 1, dtype=np.float64)
    left = np.clip(1 - (steps - config.warmup_steps) / falling, 0.0, 1.0)
    return np.floor((initial - target) * left**3 + target).astype(np.int32)


def as_lora(params: Any) -> Any:
    """Params with a LoRA leaf for every AdaLoRA leaf, without the singular values that are zero.

    Each layer keeps its own rank; rows are in the order of the leaf, padded with zeros behind. On
    the host, for saving or combining what was trained.
    """

    def compact(path: str, value: Any) -> Any:
        return _compact(value) if isinstance(value, AdaLoRA) else value

    return trees.map_with_path(compact, params)


def _adalora_leaves(params: Any) -> dict[str, AdaLoRA]:
    leaves = {p: v for p, v in trees.flatten(params).items() if isinstance(v, AdaLoRA)}
    if not leaves:
        raise ValueError("AdaLoRA: the parameters hold no AdaLoRA leaf. See add_adalora.")
    return leaves


def _start(lora: LoRA, key: jax.Array) -> AdaLoRA:
    keys = jax.random.split(key)
    a, b = (
        (0.02 * jax.random.normal(key, factor.shape, jnp.float32)).astype(factor.dtype)
        for key, factor in zip(keys, (lora.a, lora.b))
    )
    return AdaLoRA(
        base=lora.base,
        a=a,
        values=jnp.zeros(a.shape[:-1], a.dtype),
        b=b,
        scale=lora.scale,
        dropout=lora.dropout,
        base_in_axes=lora.base_in_axes,
    )


def _distance(factor: Array) -> Array:
    """Frobenius norms `[*stack]` of `p @ p.T - 1`, whose gradient is zero where the norm is."""
    p = factor.astype(jnp.float32)
    gram = jnp.einsum("...ri,...si->...rs", p, p)
    one = jnp.broadcast_to(jnp.eye(p.shape[-2], dtype=jnp.float32), gram.shape)
    square = jnp.sum(jnp.square(gram - one), axis=(-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _triplets(leaf: AdaLoRA) -> Triplets:
    return Triplets(*(f.astype(jnp.float32) for f in (leaf.a, leaf.values, leaf.b)))


def _averaged(
    numbers: Triplets,
    gradients: Triplets,
    sensitivity: Triplets,
    uncertainty: Triplets,
    config: AdaLoraConfig,
) -> tuple[Triplets, Triplets]:
    """Equations 9 to 11 of the paper: new averages of sensitivity and of uncertainty."""
    beta1, beta2 = config.beta1, config.beta2
    pairs = []
    for number, slope, mean, spread in zip(numbers, gradients, sensitivity, uncertainty):
        now = jnp.abs(number * slope)
        mean = beta1 * mean + (1 - beta1) * now
        pairs.append((mean, beta2 * spread + (1 - beta2) * jnp.abs(now - mean)))
    means, spreads = zip(*pairs)
    return Triplets(*means), Triplets(*spreads)


def _chosen(condition: Array, new: Triplets, old: Triplets) -> Triplets:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _scores(sensitivity: Triplets, uncertainty: Triplets) -> Array:
    """Equation 8 of the paper: scores `[*stack, r]`, of the value and on average of each vector."""
    a, values, b = (s * u for s, u in zip(sensitivity, uncertainty))
    return values + a.mean(axis=-1) + b.mean(axis=-1)


def _threshold(scores: Mapping[str, Array], budget: Array) -> Array:
    """The score that the best `budget` of all are above; -inf where that is all of them."""
    every = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    beyond = every.size - budget
    return jnp.where(beyond > 0, every[jnp.maximum(beyond - 1, 0)], -jnp.inf)


def _compact(leaf: AdaLoRA) -> LoRA:
    folded, values = leaf.folded(), np.asarray(leaf.values)
    kept = values != 0
    ranks = kept.sum(axis=-1).astype(np.int32)
    rows = max(1, int(ranks.max()))
    order = np.argsort(~kept, axis=-1, kind="stable")[..., :rows, None]
    mask = np.take_along_axis(kept[..., None], order, axis=-2)
    a, b = (
        jnp.asarray(np.where(mask, np.take_along_axis(np.asarray(f), order, axis=-2), 0))
        for f in (folded.a, folded.b)
    )
    return folded.replace(a=a, b=b, rank=jnp.asarray(ranks))
