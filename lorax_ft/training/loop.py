"""The training loop: steps, records, evaluations and checkpoints; resumable at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

from lorax_ft.training import checkpoints, flops, locks, processes, records, sharding, signals
from lorax_ft.training.meter import Meter
from lorax_ft.training.progress import (
    Progress,
    TrainConfig,
    check_nonfinite,
    is_due,
    outcome_of,
    score,
    with_evaluation,
)
from lorax_ft.training.shares import share_of

PyTree = Any
Evaluate = Callable[[PyTree, int], Mapping[str, float]]


class Batches(Protocol):
    """An endless iterator over batches of NumPy arrays that can be put back to any position."""

    def __next__(self) -> Mapping[str, Any]: ...
    def get_state(self) -> Any: ...  # anything JSON can hold: where the next batch is
    def set_state(self, state: Any) -> None: ...


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
        processes.check_same(run_directory=checkpoints.steps(store), data=batches.get_state())
        if snapshot := checkpoints.restore(store, train, opt_state, set_aside=True):
            train, opt_state, key = snapshot.train, snapshot.opt_state, snapshot.key
            batches.set_state(snapshot.data)
            progress, saved = Progress(**snapshot.progress), snapshot.step
        key = key if mesh is None else sharding.replicate(key, mesh)
        write = stack.enter_context(_open_records(directory, saved or None, config))
        bar = stack.enter_context(_open_bar(total, progress.step, config))
        stop_asked = stack.enter_context(signals.stop_on_sigterm())
        meter = Meter(
            nonfinite=progress.nonfinite,
            peak_flops=_peak_flops(config, mesh),
            shares=share_of(mesh).count,
        )
        clock = time.perf_counter() - progress.seconds

        while True:
            n = progress.step
            stopped = stop_asked(n)
            due = is_due(config.eval_every, n, total, steps_per_epoch)
            evaluates = evaluate if due and not stopped and progress.evaluated != n else None
            saves = stopped or is_due(config.checkpoint_every, n, total, steps_per_epoch)
            saves = (saves and n > saved) or bool(evaluates and config.best_metric)

            if (n % config.log_every == 0 or evaluates or saves) and not meter.is_empty:
                write("train", n, meter.close())
                progress = dataclasses.replace(progress, nonfinite=meter.nonfinite)
            check_nonfinite(meter.nonfinite, n, config)
            if evaluates:
                found = {name: float(value) for name, value in evaluates(train, n).items()}
                write("eval", n, found)
                _announce(bar, n, found)
                progress = with_evaluation(progress, found, config)
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
                checkpoints.save(store, snapshot, score(progress, config))
                saved = n
            if outcome := outcome_of(stopped, progress, total, config):
                break

            batch = _next(batches, n, total)
            placed = batch if mesh is None else sharding.shard_batch(batch, mesh)
            arguments = (train, opt_state, frozen, placed, jax.random.fold_in(key, n))
            train, opt_state = meter.run(step, arguments, batch)
            progress = dataclasses.replace(progress, step=n + 1)
            _show(bar, meter)
        checkpoints.wait(store)
    return FitResult(outcome=outcome, train=train, opt_state=opt_state, progress=progress)


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
