"""How far a run is: what its config asks for, and what is due, best and over at a step."""

from __future__ import annotations

import dataclasses
import math

from lorax_ft import evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run trains, and how often it reports, evaluates and saves."""

    epochs: float = 3.0
    steps: int | None = None  # instead of epochs, where given
    accumulation: int = 1  # parts that a batch is computed in, one after the other
    log_every: int = 10
    eval_every: int | None = None  # steps; None: every epoch, 0: at the end alone
    checkpoint_every: int | None = None  # the same; evaluations for `best_metric` save besides
    keep_last: int = 2  # checkpoints ...
    keep_best: int = 1  # ... and of those with the best `best_metric`
    best_metric: str | None = None  # a name that the evaluation returns
    best_mode: str | None = None  # "max" or "min" of it is better; None: as its name says
    patience: int | None = None  # evaluations without a better `best_metric` that end the run
    max_nonfinite: int = 10  # steps, in all, that may be skipped for a loss that is not finite
    peak_flops: float | None = None  # of one device, for its utilisation; None: known devices only
    progress_bar: bool = True
    tensorboard: bool = True

    def __post_init__(self):
        for field in ("accumulation", "log_every", "keep_last"):
            self._check(field, getattr(self, field) >= 1, "at least 1")
        for field in ("keep_best", "max_nonfinite"):
            self._check(field, getattr(self, field) >= 0, "at least 0")
        for field in ("eval_every", "checkpoint_every"):
            value = getattr(self, field)
            self._check(field, value is None or value >= 0, "at least 0, or None for every epoch")
        for field in ("steps", "patience"):
            value = getattr(self, field)
            self._check(field, value is None or value >= 1, "at least 1, or None")
        self._check("epochs", self.epochs > 0, "above 0")
        modes = (None, *evaluation.MODES)
        self._check("best_mode", self.best_mode in modes, '"max" or "min", or None')
        if self.patience is not None and self.best_metric is None:
            raise ValueError("TrainConfig.patience needs best_metric: better by which number?")
        if self.best_metric is not None and self.keep_best == 0:
            raise ValueError("TrainConfig.best_metric needs keep_best of at least 1.")

    def _check(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"TrainConfig.{field} must be {expected}, got {getattr(self, field)!r}."
            )

    @property
    def best_sign(self) -> int:
        """1 where more of `best_metric` is better, -1 where less is."""
        return evaluation.sign_of(self.best_metric or "", self.best_mode)

    def total_steps(self, steps_per_epoch: int) -> int:
        """How many steps the run takes."""
        return self.steps or max(1, math.ceil(round(self.epochs * steps_per_epoch, 6)))


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the loop keeps count of, and a checkpoint remembers."""

    step: int = 0
    nonfinite: int = 0
    evaluated: int | None = None  # the step of the last evaluation ...
    evaluation: dict[str, float] | None = None  # ... and what it found
    best_step: int | None = None
    best_value: float | None = None
    without_improvement: int = 0  # evaluations since the best
    # Spent in `fit` by all sessions; no two runs have the same, so it says nothing of equality.
    seconds: float = dataclasses.field(default=0.0, compare=False)


def is_due(every: int | None, step: int, total: int, steps_per_epoch: int) -> bool:
    """Whether `every` (None: an epoch; 0: never before the end) falls on this step."""
    every = steps_per_epoch if every is None else every
    return step == total or (step > 0 and every > 0 and step % every == 0)


def first_due(every: int | None, total: int, steps_per_epoch: int) -> int:
    """The first step that `is_due` finds.

    >>> first_due(None, 30, 10), first_due(4, 30, 10), first_due(0, 30, 10), first_due(40, 30, 10)
    (10, 4, 30, 30)
    """
    every = steps_per_epoch if every is None else every
    return min(every, total) if every else total


def outcome_of(stopped: bool, progress: Progress, total: int, config: TrainConfig) -> str | None:
    """How the run ended; None where it goes on."""
    if stopped:
        return "preempted"
    if progress.step == total:
        return "finished"
    if config.patience is not None and progress.without_improvement >= config.patience:
        return "stopped_early"
    return None


def with_evaluation(progress: Progress, found: dict[str, float], config: TrainConfig) -> Progress:
    """Progress after what an evaluation found: whether it is the best, or how long ago that was.

    Raises ValueError where `best_metric` is not among it.
    """
    progress = dataclasses.replace(progress, evaluated=progress.step, evaluation=found)
    if config.best_metric is None:
        return progress
    if config.best_metric not in found:
        raise ValueError(
            f"TrainConfig.best_metric is {config.best_metric!r}, but the evaluation returned "
            f"{sorted(found)}."
        )
    value, best = found[config.best_metric], progress.best_value
    better = best is None or config.best_sign * value > config.best_sign * best
    if not better or math.isnan(value):
        return dataclasses.replace(progress, without_improvement=progress.without_improvement + 1)
    return dataclasses.replace(
        progress, best_step=progress.step, best_value=value, without_improvement=0
    )


def score(progress: Progress, config: TrainConfig) -> float | None:
    """This step's evaluation as a number of which more is better; None where there was none."""
    if config.best_metric is None or progress.evaluation is None:
        return None
    if progress.evaluated != progress.step:
        return None
    return config.best_sign * progress.evaluation[config.best_metric]


def check_nonfinite(count: int, step: int, config: TrainConfig) -> None:
    """Raises FloatingPointError where more steps were skipped than a run may skip."""
    if count > config.max_nonfinite:
        raise FloatingPointError(
            f"By step {step} the loss or the gradient of {count} steps was not finite, and "
            f"TrainConfig.max_nonfinite is {config.max_nonfinite}. Those steps changed no "
            "parameter. Lower the learning rate or optimizer.clip_norm, compute in a wider dtype, "
            "or look for bad rows in the data."
        )
