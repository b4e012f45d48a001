"""The loop of a group: its slots step together, and each goes on, is evaluated and ends by itself.

A slot holds one run at a time. At a tick those whose next batch has the commonest shape make a
step, and the others wait: a run sees its own batches in its own order, whoever is beside it. A run
that is over is written as an ordinary run directory, and its slot is given to the next that waits.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lorax_ft import experiment, runs
from lorax_ft.prediction import Evaluation
from lorax_ft.sweeps import devices, members
from lorax_ft.sweeps.directory import write_member
from lorax_ft.sweeps.evaluation import evaluate_slots
from lorax_ft.sweeps.groups import Run
from lorax_ft.sweeps.members import Stack
from lorax_ft.sweeps.program import Batches, Member, Program
from lorax_ft.sweeps.queue import Queue
from lorax_ft.training import checkpoints, signals
from lorax_ft.training.progress import Progress, TrainConfig, is_due, outcome_of, with_evaluation
from lorax_ft.training.records import open_records
from lorax_ft.training.step import signature
from lorax_ft.training.tally import Tally

PyTree = Any
LAG = 2  # ticks after which a tick's metrics are read: the device never waits for the host
DIVERGED, COLLAPSED, PRUNED = "diverged", "collapsed", "pruned"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is done about runs that go wrong, and who is told what."""

    command: str = ""  # that their cards say they were made by
    collapse_patience: int | None = 3  # evaluations in a row of one class that end a run
    tick: Callable[[Mapping[int, Slot]], None] = lambda slots: None  # called at each
    end: Callable[[Slot], None] = lambda slot: None  # called when a run is over


@dataclasses.dataclass(kw_only=True)
class Slot:
    """A run on its way."""

    run: Run
    member: Member
    directory: pathlib.Path
    total: int
    progress: Progress
    write: Callable[[str, int, Mapping[str, float | None]], None]
    tally: Tally
    closing: contextlib.ExitStack  # closes its records
    collapsed: int = 0  # evaluations in a row that found one class
    evaluation: Evaluation | None = None  # of validation, at the present step

    @property
    def config(self) -> TrainConfig:
        return self.run.config.train


@dataclasses.dataclass(kw_only=True)
class State:
    """Where a group is."""

    stack: Stack
    best: PyTree | None  # the trainable halves as they were best; None where no run asks for it
    keys: np.ndarray  # [slots, ...]
    slots: dict[int, Slot]  # by number; those that are free are not there
    ticks: int = 0
    unread: collections.deque = dataclasses.field(default_factory=collections.deque)


def train_group(
    program: Program,
    queue: Queue,
    directory: pathlib.Path,
    runs_directory: pathlib.Path,
    *,
    watch: Watch = Watch(),
) -> str:
    """Trains the runs of a group; "finished", or "preempted" where SIGTERM came and all is saved.

    `directory` holds the group's checkpoints while it runs, and goes on from the last. Each run
    that ends is written to `runs_directory`/NAME, with an outcome that may also be "diverged",
    "collapsed" or "pruned".
    """
    config, source = program.group.first, program.source
    batches = Batches(source, config, program.slots)
    per_epoch = source.steps_per_epoch(config)
    with contextlib.ExitStack() as closing:
        identity = checkpoints.Identity(config=_identity(program), base=source.fingerprint(config))
        store = closing.enter_context(checkpoints.open_store(directory / "checkpoints", identity))
        writers = closing.enter_context(contextlib.ExitStack())
        stop_asked = closing.enter_context(signals.stop_on_sigterm())
        state = _restore(store, program, queue, runs_directory, writers)
        if state.ticks:
            said = f"{program.group.name} goes on from its checkpoint of tick {state.ticks}."
            print(said, flush=True)
        saved, clock = state.ticks, time.perf_counter()
        while True:
            _fill(state, program, queue, runs_directory, writers)
            if not state.slots:
                return "finished"
            if stop_asked(state.ticks):
                if state.ticks > saved:
                    _save(store, state)
                checkpoints.wait(store)
                return "preempted"
            stepped = _tick(state, program, batches)
            clock = _share_time(state, clock)
            due = _due(stepped, program, queue, per_epoch)
            _record(state, stepped, due)
            _evaluate(state, program, due)
            watch.tick(state.slots)
            if ending := _ending(state, stepped, queue, watch):
                _finish(state, program, ending, queue, watch)
            if is_due(config.train.checkpoint_every, state.ticks, -1, per_epoch):
                _save(store, state)
                saved = state.ticks


# --- A tick ---------------------------------------------------------------------------------------


def _tick(state: State, program: Program, batches: Batches) -> list[Slot]:
    """One step of the slots whose next batch has the commonest shape; which they are."""
    wanted = {
        i: batches.get(slot.run.config, slot.progress.step) for i, slot in state.slots.items()
    }
    shapes = collections.Counter(signature(batch) for batch in wanted.values())
    shape = max(shapes, key=lambda s: (shapes[s], s))
    chosen = {i: batch for i, batch in wanted.items() if signature(batch) == shape}
    counts, sizes = np.zeros((2, program.slots), np.int32)
    for i, slot in state.slots.items():
        counts[i], sizes[i] = slot.progress.step, slot.member.size
    batch = _stacked(chosen, program.slots)
    state.stack, metrics = program.train(state.stack, state.keys, sizes, counts, batch)
    state.ticks += 1
    state.unread.append((metrics, [(i, state.slots[i].tally) for i in chosen]))
    while len(state.unread) > LAG:
        _read(state)
    stepped = [state.slots[i] for i in chosen]
    for slot in stepped:
        slot.progress = dataclasses.replace(slot.progress, step=slot.progress.step + 1)
        slot.evaluation = None
    return stepped


def _stacked(chosen: Mapping[int, Mapping[str, np.ndarray]], slots: int) -> dict[str, np.ndarray]:
    """The batches of slots as [slots, ...]; those of others have weight zero."""
    any_batch = next(iter(chosen.values()))
    idle = {**any_batch, "weights": np.zeros_like(any_batch["weights"])}
    rows = [chosen.get(i, idle) for i in range(slots)]
    return {name: np.stack([row[name] for row in rows]) for name in any_batch}


def _read(state: State) -> None:
    metrics, tallies = state.unread.popleft()
    metrics = jax.device_get(metrics)
    for i, tally in tallies:
        tally.add({name: float(values[i]) for name, values in metrics.items()})


def _share_time(state: State, clock: float) -> float:
    """Counts the time since `clock` to the runs, in equal shares."""
    now = time.perf_counter()
    for slot in state.slots.values():
        seconds = slot.progress.seconds + (now - clock) / len(state.slots)
        slot.progress = dataclasses.replace(slot.progress, seconds=seconds)
    return now


def _record(state: State, stepped: list[Slot], due: Mapping[str, bool]) -> None:
    """Writes what the steps since a slot's last record were like, where it is evaluated or due."""
    recorded = [
        s for s in stepped if s.run.name in due or s.progress.step % s.config.log_every == 0
    ]
    if recorded:
        _read_all(state)
    for slot in recorded:
        _write_tally(slot)


def _read_all(state: State) -> None:
    while state.unread:
        _read(state)
    for slot in state.slots.values():
        slot.progress = dataclasses.replace(slot.progress, nonfinite=slot.tally.nonfinite)


def _write_tally(slot: Slot) -> None:
    if not slot.tally.is_empty:
        slot.write("train", slot.progress.step, slot.tally.close())


# --- Evaluations and ends -------------------------------------------------------------------------


def _due(stepped: list[Slot], program: Program, queue: Queue, per_epoch: int) -> dict[str, bool]:
    """The runs to be evaluated on the validation split, and whether their configs say so."""
    if not program.source.dataset.validation:
        return {}
    found = {}
    for slot in stepped:
        own = is_due(slot.config.eval_every, slot.progress.step, slot.total, per_epoch)
        if own or queue.asks(slot.run, slot.progress.step):
            found[slot.run.name] = own
    return found


def _evaluate(state: State, program: Program, due: Mapping[str, bool]) -> None:
    """Evaluates the runs that are due, and keeps what is best.

    An evaluation that only the queue asks for counts neither for the best nor for patience: a run
    that goes on is the run that it would have been alone.
    """
    slots = {i: slot for i, slot in state.slots.items() if slot.run.name in due}
    found = evaluate_slots(program, state.stack.train, state.stack.own, list(slots), "validation")
    better = np.zeros(program.slots, bool)
    for i, slot in slots.items():
        slot.evaluation = found[i]
        slot.write("eval", slot.progress.step, found[i].metrics)
        if due[slot.run.name]:
            slot.collapsed = slot.collapsed + 1 if found[i].warning else 0
            slot.progress = with_evaluation(slot.progress, found[i].metrics, slot.config)
            better[i] = slot.progress.best_step == slot.progress.step
    if state.best is not None and better.any():
        state.best = program.choose(better, state.stack.train, state.best)


def _ending(
    state: State, stepped: list[Slot], queue: Queue, watch: Watch
) -> dict[int, tuple[Slot, str]]:
    """The slots whose runs are over, and why."""
    for slot in stepped:
        if slot.evaluation is not None:
            queue.report(slot.run, slot.progress.step, slot.evaluation.metrics)
    outcomes = {i: _outcome(s, queue, watch) for i, s in state.slots.items() if s in stepped}
    return {i: (state.slots[i], outcome) for i, outcome in outcomes.items() if outcome}


def _outcome(slot: Slot, queue: Queue, watch: Watch) -> str | None:
    pruned = slot.evaluation is not None and queue.prunes(slot.run, slot.progress.step)
    if outcome := outcome_of(False, slot.progress, slot.total, slot.config):
        return outcome
    if slot.tally.nonfinite > slot.config.max_nonfinite:
        return DIVERGED
    if watch.collapse_patience is not None and slot.collapsed >= watch.collapse_patience:
        return COLLAPSED
    return PRUNED if pruned else None


def _finish(
    state: State,
    program: Program,
    ending: Mapping[int, tuple[Slot, str]],
    queue: Queue,
    watch: Watch,
) -> None:
    """Evaluates runs that are over, writes their directories and frees their slots.

    What was just evaluated is not again, and the test split is not for a run that was pruned.
    """
    _read_all(state)
    train = state.stack.train
    mask = np.zeros(program.slots, bool)
    if state.best is not None:
        for i, (slot, _) in ending.items():
            mask[i] = slot.progress.best_step not in (None, slot.progress.step)
        train = program.choose(mask, state.best, train)
    known = {i: s.evaluation for i, (s, _) in ending.items() if s.evaluation and not mask[i]}
    parts = experiment.evaluated_parts(next(iter(ending.values()))[0].member.experiment)
    found: dict[int, dict[str, Evaluation]] = {i: {} for i in ending}
    for part in parts:
        given = known if part == "validation" else {}
        asked = [i for i, (_, end) in ending.items() if part == "validation" or end != PRUNED]
        left = [i for i in asked if i not in given]
        given = given | evaluate_slots(program, train, state.stack.own, left, part)
        for i, evaluation in given.items():
            found[i][part] = evaluation
    for i, (slot, outcome) in ending.items():
        _write_tally(slot)
        one = members.unpad(program.take(train, i), slot.member.experiment.train)
        results = experiment.finish(
            slot.member.experiment,
            slot.directory,
            one,
            outcome=outcome,
            progress=slot.progress,
            evaluations=found[i],
            command=watch.command,
        )
        slot.closing.close()
        queue.finish(slot.run, results)
        watch.end(slot)
        del state.slots[i]


# --- Filling, saving, restoring -------------------------------------------------------------------


def _fill(
    state: State,
    program: Program,
    queue: Queue,
    directory: pathlib.Path,
    writers: contextlib.ExitStack,
) -> None:
    """Gives free slots to runs that wait."""
    for i in devices.in_turns(program.mesh, program.slots):
        if i in state.slots:
            continue
        if (run := queue.next()) is None:
            return
        slot = _slot(program, run, directory, Progress(), writers)
        state.stack = program.put(state.stack, i, slot.member.stack)
        state.keys[i] = slot.member.key
        state.slots[i] = slot


def _slot(
    program: Program,
    run: Run,
    directory: pathlib.Path,
    progress: Progress,
    writers: contextlib.ExitStack,
) -> Slot:
    path = directory / run.name
    runs.start_run(path, run.config)
    write_member(path, run, program.group.name)
    closing = writers.enter_context(contextlib.ExitStack())
    write = closing.enter_context(
        open_records(path, progress.step or None, tensorboard=run.config.train.tensorboard)
    )
    return Slot(
        run=run,
        member=program.start(run.config),
        directory=path,
        total=program.source.total_steps(run.config),
        progress=progress,
        write=write,
        tally=Tally(nonfinite=progress.nonfinite),
        closing=closing,
    )


def _save(store: checkpoints.Store, state: State) -> None:
    """Starts writing a checkpoint of all slots."""
    _read_all(state)
    for slot in state.slots.values():
        _write_tally(slot)
    described = [
        {
            "slot": i,
            "run": slot.run.name,
            "collapsed": slot.collapsed,
            "progress": dataclasses.asdict(slot.progress),
        }
        for i, slot in state.slots.items()
    ]
    snapshot = checkpoints.Snapshot(
        step=state.ticks,
        train={"train": state.stack.train, "best": state.best},
        opt_state=state.stack.opt_state,
        key=jax.random.key(0),  # each run has its own, which its seed makes again
        data=None,  # each run's position is its step
        progress={"slots": described},
    )
    checkpoints.save(store, snapshot)


def _restore(
    store: checkpoints.Store,
    program: Program,
    queue: Queue,
    directory: pathlib.Path,
    writers: contextlib.ExitStack,
) -> State:
    """The state of the last checkpoint, or one whose slots are all free."""
    stack = program.empty()
    keys = np.zeros((program.slots, *program.key_data.shape), np.uint32)
    best = program.empty().train if program.keeps_best else None
    state = State(stack=stack, best=best, keys=keys, slots={})
    snapshot = checkpoints.restore(
        store, {"train": stack.train, "best": best}, stack.opt_state, set_aside=True
    )
    if snapshot is None:
        return state
    state.ticks = snapshot.step
    state.best = snapshot.train["best"]
    state.stack = Stack(snapshot.train["train"], snapshot.opt_state, stack.own)
    for saved in snapshot.progress["slots"]:
        if runs.read_results(directory / saved["run"]):  # it ended after this checkpoint
            continue
        run, i = queue.known(saved["run"]), saved["slot"]
        queue.resumed(run)
        slot = _slot(program, run, directory, Progress(**saved["progress"]), writers)
        slot.collapsed = saved["collapsed"]
        own = program.put(state.stack.own, i, slot.member.stack.own)
        state.stack = state.stack._replace(own=own)
        state.keys[i] = slot.member.key
        state.slots[i] = slot
    return state


def _identity(program: Program) -> str:
    """What a checkpoint of the group must be of, as text."""
    lines = [f"slots: {program.slots}"]
    lines += [f"{run.name}: {runs.config_text(run.config)}" for run in program.group.runs]
    return "\n".join(lines)
