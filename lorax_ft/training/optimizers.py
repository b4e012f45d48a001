"""Optimizers: one config to an optax transformation, with schedules, clipping, decay and LoRA+."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_ft import trees
from lorax_ft.leaves import is_leaf
from lorax_ft.training.blockwise import in_eight_bits
from lorax_ft.training.clipping import clip_by_norm
from lorax_ft.training.paging import page

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, its learning rate over time, and what is done to the gradient."""

    name: str = "adamw"  # adamw, sgd, adafactor or lion
    learning_rate: float = 1e-3  # at the schedule's peak
    schedule: str = (
        "linear"  # constant, linear or cosine; the last two fall to zero at the last step
    )
    warmup_steps: int | None = None  # steps that the rate takes to rise from zero to its peak ...
    warmup_fraction: float | None = None  # ... or the same as a fraction of all steps, rounded up
    weight_decay: float = 0.0  # decoupled: learning rate × decay × parameter, for every optimizer
    no_decay: tuple[str, ...] = ()  # regexes over whole array paths, such as r".*/(bias|scale)"
    clip_norm: float | None = 1.0  # largest global norm of the gradient
    b1: float = 0.9  # adamw, lion; sgd: momentum, 0 for none
    b2: float = 0.999  # adamw, lion (Lion's paper wants 0.99)
    eps: float = 1e-8  # adamw
    lora_plus_ratio: float | None = None  # LoRA's B learns this many times faster than A
    # What adamw, lion and sgd remember of each number: in the parameter's own dtype, or in eight
    # bits ("int8") as bitsandbytes has them, see `blockwise`.
    state_dtype: str = "parameter"
    paged: bool = False  # keep that in the host's memory, and on the device one layer's of it

    def __post_init__(self):
        _check_choice("name", self.name, _SCALINGS)
        _check_choice("schedule", self.schedule, _SHAPES)
        _check_choice("state_dtype", self.state_dtype, _STATE_DTYPES)
        if self.state_dtype != "parameter" and self.name not in ROWWISE:
            raise ValueError(
                f"OptimizerConfig: {self.name} keeps a row and a column of each kernel, so "
                f"state_dtype={self.state_dtype!r} is not for it. Set "
                f'state_dtype="parameter", or another name of {sorted(ROWWISE)}.'
            )
        for field in ("learning_rate", "weight_decay"):
            _check(getattr(self, field) >= 0, field, getattr(self, field), "at least 0")
        for field in ("clip_norm", "lora_plus_ratio"):
            value = getattr(self, field)
            _check(value is None or value > 0, field, value, "above 0, or None for none")
        for field in ("b1", "b2"):
            _check(0 <= getattr(self, field) < 1, field, getattr(self, field), "in [0, 1)")
        _check(self.eps > 0, "eps", self.eps, "above 0")
        steps, fraction = self.warmup_steps, self.warmup_fraction
        _check(steps is None or steps >= 0, "warmup_steps", steps, "at least 0")
        _check(fraction is None or 0 <= fraction < 1, "warmup_fraction", fraction, "in [0, 1)")
        if steps is not None and fraction is not None:
            raise ValueError(
                f"OptimizerConfig has both warmup_steps={steps} and warmup_fraction={fraction}: "
                "give one."
            )


class LearningRateState(NamedTuple):
    """What the last transformation of an optimizer remembers.

    Peak, warm-up and length are state and no constants of the program, as are the numbers of
    `NumberState`: runs that differ in them alone are one program, and a sweep stacks their states.
    """

    count: jax.Array  # updates made so far
    peak: jax.Array
    warmup: jax.Array  # updates that the rate rises
    total: jax.Array  # updates at which it would have fallen to zero
    learning_rate: jax.Array  # of the last update


class NumberState(NamedTuple):
    """The number that one of an optimizer's transformations goes by."""

    value: jax.Array


def build_optimizer(config: OptimizerConfig, total_steps: int) -> Any:
    """The optax transformation of a config, for a run of `total_steps` updates.

    In order: clipping by global norm, the optimizer's own scaling, weight decay, LoRA+'s ratio, the
    learning rate. With `paged` it is a `PagedOptimizer` of the same numbers, for `start_optimizer`
    and `make_train_step`. Its `init` raises ValueError where a pattern of `no_decay` matches
    nothing, and where `lora_plus_ratio` is set but the parameters hold no LoRA leaf; its `update`
    needs the parameters.

    `init` writes the learning rate, warm-up, `total_steps`, weight decay, norm and ratio into the
    state, and `update` reads them there: any optimizer of the same `name`, `schedule`, `no_decay`,
    `b1`, `b2`, `eps` and the same choices of None updates the state of any other.

    >>> tx = build_optimizer(OptimizerConfig(name="sgd", learning_rate=0.5, b1=0.0), total_steps=2)
    >>> params = {"kernel": jnp.array([1.0])}
    >>> updates, state = tx.update({"kernel": jnp.array([0.2])}, tx.init(params), params)
    >>> f"{updates['kernel'][0]:.3f} {learning_rate(state):.2f}"
    '-0.100 0.50'
    """
    scaling = _in_standard_promotion(_SCALINGS[config.name](config))
    each = [_STATE_DTYPES[config.state_dtype](scaling), _add_decay(config)]
    if config.lora_plus_ratio is not None:
        each.append(_scale_lora_b(config.lora_plus_ratio))
    each.append(_scale_by_learning_rate(config, total_steps))
    if config.paged:
        return page(each, rowwise=config.name in ROWWISE, clip_norm=config.clip_norm)
    clip = [] if config.clip_norm is None else [clip_by_norm(config.clip_norm)]
    return optax.chain(*clip, *each)


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate's shape: number of updates made so far to a factor in [0, 1].

    The same numbers as transformers' `get_linear_schedule_with_warmup` and its siblings: zero at
    the first of the warm-up steps, and a fall that would reach zero at `total_steps`. Raises
    ValueError where the warm-up leaves no step after it.
    """
    warmup = jnp.asarray(warmup_steps(config, total_steps), jnp.int32)
    total = jnp.asarray(total_steps, jnp.int32)
    return lambda count: _factor(config.schedule, jnp.asarray(count), warmup, total)


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """How many steps the learning rate rises."""
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
    steps = config.warmup_steps
    if steps is None:
        # Rounded first: 0.07 * 100 is a little above 7, and means 7.
        steps = math.ceil(round(total_steps * (config.warmup_fraction or 0.0), 6))
    if steps and steps >= total_steps:
        raise ValueError(
            f"OptimizerConfig: {steps} warm-up steps leave none of the run's {total_steps} at the "
            "full "
            "learning rate. Lower warmup_steps or warmup_fraction, or train longer."
        )
    return steps


def learning_rate(state: PyTree) -> jax.Array | None:
    """The rate of the last update in the state of an optimizer made here; None for another's."""
    return optax.tree.get(state, "learning_rate", default=None)


def trainable_labels(params: PyTree, trainable: trees.Patterns = ()) -> PyTree:
    """The tree of params, "train" or "freeze" for each array, as `trees.partition` splits it."""
    train, _ = trees.partition(params, trainable)
    trained = set(trees.flatten_arrays(train))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "train" if trees.path_name(path) in trained else "freeze", params
    )


def trainable_only(
    tx: optax.GradientTransformation, labels: PyTree
) -> optax.GradientTransformation:
    """An optimizer over the full tree that applies `tx` to the arrays labelled "train" alone.

    For training loops that keep one tree of parameters; every other array gets a zero update and no
    state. (`optax.masked` by itself would pass frozen arrays' raw gradients through.) Frozen
    gradients are still computed: `trees.partition` saves that too. `labels` come from
    `trainable_labels`. Raises ValueError where nothing is labelled "train".
    """
    if "train" not in jax.tree.leaves(labels):
        raise ValueError(
            'trainable_only: no array is labelled "train", so nothing would be trained.'
        )
    return optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)


def _scale_by_learning_rate(
    config: OptimizerConfig, total_steps: int
) -> optax.GradientTransformation:
    """Multiplies updates by -peak × the schedule's factor."""
    warmup = warmup_steps(config, total_steps)

    def init(params):
        del params
        return LearningRateState(
            count=jnp.zeros((), jnp.int32),
            peak=jnp.asarray(config.learning_rate, jnp.float32),
            warmup=jnp.asarray(warmup, jnp.int32),
            total=jnp.asarray(total_steps, jnp.int32),
            learning_rate=jnp.zeros((), jnp.float32),
        )

    def update(updates, state, params=None):
        del params
        factor = _factor(config.schedule, state.count, state.warmup, state.total)
        rate = state.peak * factor
        updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates)
        return updates, state._replace(count=state.count + 1, learning_rate=rate)

    return optax.GradientTransformation(init, update)


def _factor(name: str, count: jax.Array, warmup: jax.Array, total: jax.Array) -> jax.Array:
    """The share of the peak that the rate of update `count` is."""
    step, rise = count.astype(jnp.float32), warmup.astype(jnp.float32)
    length = jnp.maximum(total.astype(jnp.float32) - rise, 1.0)
    done = jnp.clip((step - rise) / length, 0.0, 1.0)
    return jnp.where(step < rise, step / jnp.maximum(rise, 1.0), _SHAPES[name](done))


def _by_number(
    value: float, update: Callable[[jax.Array, PyTree, PyTree], PyTree], check: Any = None
) -> optax.GradientTransformation:
    """The transformation `update(number, updates, params)` whose number is its state.

    `check(params)` may refuse the parameters at `init`.
    """

    def init(params):
        if check is not None:
            check(params)
        return NumberState(jnp.asarray(value, jnp.float32))

    return optax.GradientTransformation(
        init, lambda updates, state, params=None: (update(state.value, updates, params), state)
    )


def _add_decay(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adds weight decay × parameter, for the arrays that `no_decay` does not name."""

    def check(params):
        if config.weight_decay:
            trees.select(
                trees.flatten_arrays(params), config.no_decay, field="OptimizerConfig.no_decay"
            )

    def update(decay, updates, params):
        if params is None:
            raise ValueError("build_optimizer: update needs the parameters; pass params.")

        def add(path, update, parameter):
            if trees.matches(trees.path_name(path), config.no_decay):
                return update
            decayed = decay.astype(parameter.dtype) * parameter
            return update + decayed.astype(update.dtype)

        return jax.tree_util.tree_map_with_path(add, updates, params)

    return _by_number(config.weight_decay, update, check)


def _scale_lora_b(ratio: float) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al. 2024): updates of each leaf's `b` times `ratio`, decay included."""

    def check(params):
        if not any(_lora_b(*entry) for entry in _arrays_in_leaves(params)):
            raise ValueError(
                f"OptimizerConfig.lora_plus_ratio is {ratio}, but no trainable parameter is the B "
                "factor of a LoRA leaf. Add LoRA to the parameters, or set the ratio to None."
            )

    def update(ratio, updates, params):
        del params

        def scale(parameter):
            return jax.tree_util.tree_map_with_path(
                lambda path, u: u * ratio.astype(u.dtype) if _lora_b(parameter, path) else u,
                parameter,
            )

        return jax.tree.map(scale, updates, is_leaf=is_leaf)

    return _by_number(ratio, update, check)


def _in_standard_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` where mixed dtypes may meet: optax is not written for JAX's strict promotion."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def _arrays_in_leaves(params: PyTree) -> list[tuple[Any, tuple[Any, ...]]]:
    """(parameter, path within it) of every array."""
    parameters = jax.tree.leaves(params, is_leaf=is_leaf)
    return [(p, path) for p in parameters for path, _ in jax.tree_util.tree_leaves_with_path(p)]


def _lora_b(parameter: Any, path: tuple[Any, ...]) -> bool:
    """Whether a path within a parameter leads to a leaf's B; a plain array named `b` is none."""
    return is_leaf(parameter) and trees.path_name(path[-1:]) == "b"


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, but its bias is corrected by factors, where optax divides by scalars.

    XLA makes such a division a product or not by what else is in the program, and a paged step
    would differ from an unpaged one in the last bit.
    """
    b1, b2 = config.b1, config.b2

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, updates, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * g**2 + b2 * v, updates, state.nu)
        first, second = (1.0 / (1.0 - jnp.power(b, count)) for b in (b1, b2))

        def direction(m, v):
            root = jnp.sqrt(v * second.astype(v.dtype))
            return m * first.astype(m.dtype) / (root + config.eps)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _scale_by_sgd(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.trace(decay=config.b1) if config.b1 else optax.identity()


def _scale_by_adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adafactor with the learning rate of the schedule, as transformers' Trainer has it.

    Updates relative to the parameters' size would hardly move LoRA's B, which starts at zero.
    """
    del config
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


_SCALINGS = {
    "adamw": _scale_by_adam,
    "sgd": _scale_by_sgd,
    "adafactor": _scale_by_adafactor,
    "lion": lambda c: optax.scale_by_lion(b1=c.b1, b2=c.b2),
}

ROWWISE = ("adamw", "lion", "sgd")  # have a state of each number, and treat it by itself

_STATE_DTYPES = {"parameter": lambda scaling: scaling, "int8": in_eight_bits}

_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {  # of the share of the fall that is done
    "constant": jnp.ones_like,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
}


def _check(holds: bool, field: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"OptimizerConfig.{field} must be {expected}, got {value!r}.")


def _check_choice(field: str, value: str, choices: dict[str, Any]) -> None:
    if value not in choices:
        near = trees.nearest(str(value), choices, limit=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"OptimizerConfig.{field} is {value!r}, expected one of {sorted(choices)}.{hint}"
        )
