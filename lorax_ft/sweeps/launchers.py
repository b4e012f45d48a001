"""Launchers: who starts the workers of a sweep, a worker for each group.

    none         this process, group after group
    local:4      so many processes of this machine at a time
    ray          a task for each group, on the cluster that RAY_ADDRESS names or on one started here
    slurm        a job for each group, through submitit

A worker that dies or is stopped is started again and goes on from the group's last checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorax_ft.cluster import RETRIES, Preempted, load_engine, ray_cluster
from lorax_ft.exit_codes import STOPPED
from lorax_ft.sweeps.directory import JOBS
from lorax_ft.sweeps.worker import Task

POLL = 0.2  # seconds between looks at workers
QUEUE_POLL = 10.0  # seconds between questions to Slurm, which all users of a cluster ask
ALL = 0.9  # of an accelerator's memory, for all workers: programs and libraries take some too
WORKER = (
    "import pickle, sys; task, name = pickle.load(sys.stdin.buffer); "
    f"sys.exit({STOPPED} if task(name) == 'preempted' else 0)"
)
# Trains groups by their names, and gives each when it has ended, with what went wrong if it did.
Launch = Callable[[Task, Sequence[str]], Iterator[tuple[str, str | None]]]


@contextlib.contextmanager
def open_launcher(
    launcher: str | None, resources: Mapping[str, Any], directory: pathlib.Path
) -> Iterator[Launch | None]:
    """Gives what trains the groups of the sweep in `directory`; None where this process does.

    Raises ValueError for a launcher or resources that there are not, ImportError where its package
    is missing, ConnectionError where its cluster cannot be reached. What still runs on leaving is
    stopped, also when SIGTERM comes.
    """
    if launcher is None:
        if resources:
            raise ValueError(f"resources {dict(resources)} need a launcher: give --launcher too.")
        yield None
        return
    word, _, argument = launcher.partition(":")
    if word not in LAUNCHERS:
        raise ValueError(f"--launcher={launcher}: expected local:4, ray or slurm.")
    with LAUNCHERS[word](argument, resources, directory) as launch, _exit_on_sigterm():
        yield launch


@contextlib.contextmanager
def open_local(
    argument: str, resources: Mapping[str, Any], directory: pathlib.Path
) -> Iterator[Launch]:
    """Processes of this machine, which share its memory and accelerator.

    Each may take so large a part of an accelerator that all find room, or what
    XLA_PYTHON_CLIENT_MEM_FRACTION says.
    """
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(
            f"--launcher=local needs a number of processes, as local:4; got {argument!r}."
        )
    if resources:
        raise ValueError(f"--launcher=local takes no resources, got {dict(resources)}.")
    count, started = int(argument), []
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    limits = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{ALL / count:.4f}",
    }
    environment = {**limits, **os.environ, "PYTHONPATH": paths}

    def submit(task: Task, name: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, env=environment
        )
        started.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it died already
            pickle.dump((dataclasses.replace(task, share=1 / count), name), process.stdin)
        return process

    def end(process: subprocess.Popen[bytes]) -> End | None:
        code = process.poll()
        if code is None or code == 0:
            return None if code is None else End()
        if code < 0:
            return End(f"its process died of {signal.Signals(-code).name}", again=True)
        return End(f"its process ended with exit code {code}; see above", again=code == STOPPED)

    try:
        yield lambda task, names: _await(functools.partial(submit, task), end, names, count)
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()


@contextlib.contextmanager
def open_ray(
    argument: str, resources: Mapping[str, Any], directory: pathlib.Path
) -> Iterator[Launch]:
    """Tasks of a Ray cluster, which starts those again whose worker or node died."""
    if argument:
        raise ValueError(f"--launcher=ray:{argument}: set RAY_ADDRESS={argument} instead.")
    with ray_cluster() as ray:
        yield _ray_launch(ray, resources)


def _ray_launch(ray: Any, resources: Mapping[str, Any]) -> Launch:
    # A process of its own for each group: it gives its memory back.
    options = {"max_retries": RETRIES, "max_calls": 1, "retry_exceptions": [Preempted]}
    if ray.cluster_resources().get("GPU"):
        options["num_gpus"] = 1  # without it Ray hides them
    try:
        remote = ray.remote(**{**options, **resources})(_train_or_raise)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--launcher=ray: resources {dict(resources)}: {error}") from error

    def launch(task: Task, names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        running = {remote.options(name=name).remote(task, name): name for name in names}
        while running:
            for done in ray.wait(list(running))[0]:
                try:
                    ray.get(done)
                    error = None
                except ray.exceptions.RayError as raised:
                    cause = getattr(raised, "cause", None) or raised
                    error = f"{type(cause).__name__}: {cause}"
                yield running.pop(done), error

    return launch


@contextlib.contextmanager
def open_slurm(
    argument: str, resources: Mapping[str, Any], directory: pathlib.Path
) -> Iterator[Launch]:
    """Jobs of Slurm, or of what else submitit knows by the argument's name: local, debug."""
    submitit = load_engine("submitit", extra="slurm")
    if not argument and shutil.which("sbatch") is None:
        raise ConnectionError(
            "--launcher=slurm: there is no sbatch on this machine. Give the command where jobs of "
            "the cluster are submitted, or --launcher=slurm:local to try it here."
        )
    try:
        executor = submitit.AutoExecutor(
            directory / JOBS, cluster=argument or "slurm", slurm_max_num_timeout=100
        )
        executor.update_parameters(**{"name": "lorax-ft", "timeout_min": 60, **resources})
    except (NameError, AssertionError, ValueError) as error:
        raise ValueError(f"--launcher=slurm: resources {dict(resources)}: {error}") from error
    running, queue = [], SlurmQueue() if executor.cluster == "slurm" else None

    def submit(task: Task, name: str) -> Any:
        job = executor.submit(Requeued(task), name)
        running.append(job)
        if queue is not None:
            queue.ids.add(job.job_id)
        return job

    def end(job: Any) -> End | None:
        is_under_way = not job.done() if queue is None else queue.has(job.job_id)
        if is_under_way:
            return None
        running.remove(job)
        if queue is not None and not job.paths.result_pickle.exists():
            said = f"its job {job.job_id} ended without a result; its log is {job.paths.stderr}"
            return End(said, again=True)
        try:
            return job.result()
        except submitit.core.utils.FailedJobError as error:
            return End(str(error))
        except submitit.core.utils.UncompletedJobError as error:
            return End(str(error), again=True)

    try:
        yield lambda task, names: _await(functools.partial(submit, task), end, names, len(names))
    finally:
        for job in running:
            job.cancel(check=False)


@dataclasses.dataclass
class SlurmQueue:
    """The jobs of this user that wait or run, as squeue tells.

    submitit asks sacct, which tells nothing where a cluster has no accounting, and takes a job for
    ended that has stopped and that Slurm has put back in its queue.
    """

    ids: set[str] = dataclasses.field(default_factory=set)
    asked: float = -math.inf  # when, by the monotonic clock

    def has(self, job: str) -> bool:
        """Whether a job is among them; squeue is asked anew after `QUEUE_POLL` seconds."""
        if time.monotonic() - self.asked >= QUEUE_POLL:
            self.asked = time.monotonic()
            command = ["squeue", "--all", "--noheader", "--format=%A", f"--user={os.getuid()}"]
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode == 0:  # else Slurm is away for a while, and its jobs go on
                self.ids = set(told.stdout.split())
        return job in self.ids


LAUNCHERS = {"local": open_local, "ray": open_ray, "slurm": open_slurm}


@dataclasses.dataclass(frozen=True)
class End:
    """How a worker ended, and whether its group may be given to another."""

    error: str | None = None
    again: bool = False


def _await(
    submit: Callable[[str], Any],
    end: Callable[[Any], End | None],
    names: Sequence[str],
    most: int,
) -> Iterator[tuple[str, str | None]]:
    """Submits groups, `most` at a time, and those that may be once more; gives each that ended."""
    waiting, running = collections.deque(names), {}
    tries = collections.Counter(names)
    while waiting or running:
        while waiting and len(running) < most:
            name = waiting.popleft()
            running[name] = submit(name)
        for name, job in list(running.items()):
            if (ended := end(job)) is None:
                continue
            del running[name]
            if ended.again and tries[name] <= RETRIES:
                print(f"{name}: {ended.error}; it is started again.", flush=True)
                tries[name] += 1
                waiting.append(name)
            else:
                yield name, ended.error
        time.sleep(POLL)


def _train_or_raise(task: Task, name: str) -> None:
    if task(name) == "preempted":
        raise Preempted(name)


@dataclasses.dataclass(frozen=True)
class Requeued:
    """A task that submitit puts back in Slurm's queue when its time is over or it must yield."""

    task: Task

    def __call__(self, name: str) -> End:
        try:
            return End("it was stopped", again=True) if self.task(name) == "preempted" else End()
        except Exception as error:
            traceback.print_exc()  # to the job's log
            return End(f"{type(error).__name__}: {error}")

    def checkpoint(self, name: str) -> Any:
        return load_engine("submitit", extra="slurm").helpers.DelayedSubmission(self, name)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exit that workers are stopped on; in the main thread alone it can be."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(STOPPED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except SystemExit:
        print("Stopped; workers save what they can, and the same command goes on from there.")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
