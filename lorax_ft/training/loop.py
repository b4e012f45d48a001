"""The training loop: steps, records, evaluations and checkpoints; resumable at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

from lorax_ft.training import checkpoints, flops, locks, records, sharding, signals
from lorax_ft.training.meter import Meter

PyTree = Any
Evaluate = Callable[[PyTree, int], Mapping[str, float]]


class Batches(Protocol):
    """An endless iterator over batches of NumPy arrays that can be put back to any position."""

    def __next__(self) -> Mapping[str, Any]: ...
    def get_state(self) -> Any: ...  # anything JSON can hold: where the next batch is
    def set_state(self, state: Any) -> None: ...


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
    best_mode: str = "max"  # whether more of it ("max") or less of it ("min") is better
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
        self._check("best_mode", self.best_mode in ("max", "min"), '"max" or "min"')
        if self.patience is not None and self.best_metric is None:
            raise ValueError("TrainConfig.patience needs best_metric: better by which number?")
        if self.best_metric is not None and self.keep_best == 0:
            raise ValueError("TrainConfig.best_metric needs keep_best of at least 1.")

    def _check(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"TrainConfig.{field} must be {expected}, got {getattr(self, field)!r}."
            )

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """Where a run ended, and why."""

    outcome: str  # "finished", "stopped_early" or "preempted"
    train: PyTree
    opt_state: PyTree
    progress: Progress


def fit(
    step: Callable[..., Any],
    train: PyTree,
    opt_state: PyTree,
    frozen: PyTree,
    batches: Batches,
    key: jax.Array,
    *,
    config: TrainConfig,
    directory: str | pathlib.Path,
    identity: checkpoints.Identity,
    steps_per_epoch: int,
    evaluate: Evaluate | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> FitResult:
    """Trains from where the directory's last run stopped until the end, early stop or SIGTERM.

    `step` is from `make_train_step`, and donates `train` and `opt_state`. Step n gets the key
    `fold_in(key, n)` and the n-th batch, so a run that was stopped and started again ends in the
    same bits as one that was not. `evaluate(train, step)` returns numbers by name. `directory` then
    holds `checkpoints/`, `metrics.jsonl` and `tensorboard/`, and a lock while it runs.

    Raises FloatingPointError where more than `max_nonfinite` steps had to be skipped, RuntimeError
    where another run has the directory, ValueError where its checkpoints are another run's or the
    batches end too early, OSError where a checkpoint cannot be written.
    """
    if config.best_metric is not None and evaluate is None:
        raise ValueError("TrainConfig.best_metric is set, but there is no evaluation to give it.")
    total = config.total_steps(steps_per_epoch)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(_open_directory(directory, identity, config))
        progress, saved = Progress(), 0
        if snapshot := checkpoints.restore(store, train, opt_state, set_aside=True):
            train, opt_state, key = snapshot.train, snapshot.opt_state, snapshot.key
            batches.set_state(snapshot.data)
            progress, saved = Progress(**snapshot.progress), snapshot.step
        key = key if mesh is None else sharding.replicate(key, mesh)
        write = stack.enter_context(_open_records(directory, saved or None, config))
        bar = stack.enter_context(_open_bar(total, progress.step, config))
        stop_asked = stack.enter_context(signals.stop_on_sigterm())
        meter = Meter(nonfinite=progress.nonfinite, peak_flops=_peak_flops(config, mesh))
        clock = time.perf_counter() - progress.seconds

        while True:
            n = progress.step
            stopped = stop_asked(n)
            due = _is_due(config.eval_every, n, total, steps_per_epoch)
            evaluates = evaluate if due and not stopped and progress.evaluated != n else None
            saves = stopped or _is_due(config.checkpoint_every, n, total, steps_per_epoch)
            saves = (saves and n > saved) or bool(evaluates and config.best_metric)

            if (n % config.log_every == 0 or evaluates or saves) and not meter.is_empty:
                write("train", n, meter.close())
                progress = dataclasses.replace(progress, nonfinite=meter.nonfinite)
            _check_nonfinite(meter.nonfinite, n, config)
            if evaluates:
                found = {name: float(value) for name, value in evaluates(train, n).items()}
                write("eval", n, found)
                _announce(bar, n, found)
                progress = _with_evaluation(progress, found, config)
            progress = dataclasses.replace(progress, seconds=time.perf_counter() - clock)
            if saves:
                snapshot = checkpoints.Snapshot(
                    step=n,
                    train=train,
                    opt_state=opt_state,
                    key=key,
                    data=batches.get_state(),
                    progress=dataclasses.asdict(progress),
                )
                checkpoints.save(store, snapshot, _score(progress, config))
                saved = n
            if outcome := _outcome(stopped, progress, total, config):
                break

            batch = _next(batches, n, total)
            placed = batch if mesh is None else sharding.shard_batch(batch, mesh)
            arguments = (train, opt_state, frozen, placed, jax.random.fold_in(key, n))
            train, opt_state = meter.run(step, arguments, batch)
            progress = dataclasses.replace(progress, step=n + 1)
            _show(bar, meter)
        checkpoints.wait(store)
    return FitResult(outcome=outcome, train=train, opt_state=opt_state, progress=progress)


def _is_due(every: int | None, step: int, total: int, steps_per_epoch: int) -> bool:
    """Whether `every` (None: an epoch; 0: never before the end) falls on this step."""
    every = steps_per_epoch if every is None else every
    return step == total or (step > 0 and every > 0 and step % every == 0)


def _outcome(stopped: bool, progress: Progress, total: int, config: TrainConfig) -> str | None:
    if stopped:
        return "preempted"
    if progress.step == total:
        return "finished"
    if config.patience is not None and progress.without_improvement >= config.patience:
        return "stopped_early"
    return None


def _with_evaluation(progress: Progress, found: dict[str, float], config: TrainConfig) -> Progress:
    progress = dataclasses.replace(progress, evaluated=progress.step, evaluation=found)
    if config.best_metric is None:
        return progress
    if config.best_metric not in found:
        raise ValueError(
            f"TrainConfig.best_metric is {config.best_metric!r}, but the evaluation returned "
            f"{sorted(found)}."
        )
    value, best = found[config.best_metric], progress.best_value
    better = (
        value > best
        if best is not None and config.best_mode == "max"
        else best is None or value < best
    )
    if not better or math.isnan(value):
        return dataclasses.replace(progress, without_improvement=progress.without_improvement + 1)
    return dataclasses.replace(
        progress, best_step=progress.step, best_value=value, without_improvement=0
    )


def _score(progress: Progress, config: TrainConfig) -> float | None:
    """This step's evaluation as a number of which more is better; None where there was none."""
    if config.best_metric is None or progress.evaluation is None:
        return None
    if progress.evaluated != progress.step:
        return None
    value = progress.evaluation[config.best_metric]
    return value if config.best_mode == "max" else -value


def _check_nonfinite(count: int, step: int, config: TrainConfig) -> None:
    if count > config.max_nonfinite:
        raise FloatingPointError(
            f"By step {step} the loss or the gradient of {count} steps was not finite, and "
            f"TrainConfig.max_nonfinite is {config.max_nonfinite}. Those steps changed no "
            "parameter. Lower the "
            "learning rate or optimizer.clip_norm, compute in a wider dtype, or look for bad rows "
            "in the data."
        )


def _next(batches: Batches, step: int, total: int) -> Mapping[str, Any]:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"The batches ended after {step} of {total} steps; `fit` wants an iterator that "
            "begins anew with "
            "each epoch."
        ) from None


@contextlib.contextmanager
def _open_directory(
    directory: str | pathlib.Path, identity: checkpoints.Identity, config: TrainConfig
) -> Iterator[checkpoints.Store]:
    """The run directory's checkpoints, the directory being locked."""
    directory = pathlib.Path(directory)
    lock = locks.run_lock(directory) if jax.process_index() == 0 else contextlib.nullcontext()
    with (
        lock,
        checkpoints.open_store(
            directory / "checkpoints",
            identity,
            keep_last=config.keep_last,
            keep_best=config.keep_best if config.best_metric else 0,
        ) as store,
    ):
        yield store


@contextlib.contextmanager
def _open_records(
    directory: str | pathlib.Path, restored_step: int | None, config: TrainConfig
) -> Iterator[records.Write]:
    """`write(kind, step, values)` of the first process; the others write nothing."""
    if jax.process_index() != 0:
        yield lambda kind, step, values: None
        return
    with records.open_records(directory, restored_step, tensorboard=config.tensorboard) as write:
        yield write


def _open_bar(total: int, step: int, config: TrainConfig):
    from tqdm import tqdm

    shown = config.progress_bar and jax.process_index() == 0
    return tqdm(total=total, initial=step, unit="step", disable=not shown, dynamic_ncols=True)


def _show(bar, meter: Meter) -> None:
    if not bar.disable and meter.last_loss is not None:
        speed = meter.tokens_per_second()
        bar.set_postfix_str(f"loss {meter.last_loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
    bar.update()


def _announce(bar, step: int, found: Mapping[str, float]) -> None:
    if not bar.disable:
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        bar.write(f"step {step}: {numbers}")


def _peak_flops(config: TrainConfig, mesh: jax.sharding.Mesh | None) -> float | None:
    """Of all devices of the run together, where it is known."""
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    peak = config.peak_flops or flops.peak_flops(devices[0])
    return None if peak is None else peak * len(devices)
