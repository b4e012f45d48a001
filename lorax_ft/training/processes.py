"""Processes: how those of one run find each other, and what is said when one of them is lost.

They are connected by `jax.distributed`, which ends a process by abort as soon as it loses touch
with the others, and so without a word of ours: a witness of few lines outlives it and says what
happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

Cluster = Literal["auto", "slurm", "ompi", "mpi4py", "gcetpu", "gketpu"]  # as jax names them
GO_ON = (
    "Checkpoints are written whole or not at all: the same command, given to all processes, goes "
    "on from the last one."
)
# What XLA, its collectives and its coordination service say when another process is gone.
LOST = re.compile(
    r"\bgloo\b|\bnccl|coordination.?service|barrier|heartbeat|connection (closed|reset)"
    r"|socket closed|broken pipe",
    re.IGNORECASE,
)
WITNESS = """
import signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
word = ""
for word in sys.stdin:
    pass
if word.strip():
    print(word.strip(), file=sys.stderr)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """How the processes of a run find each other: `coordinator`, `count` and `index`, or `cluster`.

    It is no part of what a run is: one of two processes goes on as one of four, or of one.
    """

    coordinator: str | None = None  # host:port that process 0 listens on
    count: int | None = None
    index: int | None = None  # of this process, from 0: all that differs between them
    cluster: Cluster | None = None  # whom jax asks for what is not given; "auto": whom it finds
    start_timeout: int = 300  # seconds in which all must have come
    lost_timeout: int = 100  # seconds without a sign of life after which a process is lost

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [name for name, value in given.items() if value is None]
        if missing and self.cluster is None:
            raise ValueError(
                f"ProcessesConfig.{missing[0]} is missing: give coordinator, count and index, or "
                'cluster, such as "auto".'
            )
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(
                f"ProcessesConfig.coordinator = {self.coordinator!r}: expected host:port, such as "
                "10.0.0.1:4321."
            )
        for name, least in (("count", 1), ("index", 0), ("start_timeout", 1), ("lost_timeout", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"ProcessesConfig.{name} must be at least {least}, got {value}.")
        if self.index is not None and self.count is not None and self.index >= self.count:
            raise ValueError(
                f"ProcessesConfig.index = {self.index}: expected less than count = {self.count}, "
                "since it is from 0."
            )


@contextlib.contextmanager
def together(config: ProcessesConfig | None) -> Iterator[None]:
    """Makes this process one of a run's while left open; without a config, of what it is already.

    Must be entered before JAX computes anything. Within it all but the first process are quiet:
    what they print is dropped, and of `logging` they tell errors alone. Raises ValueError where no
    cluster is found, and ConnectionError where the coordinator cannot be reached and, from within,
    where another process was lost.
    """
    with contextlib.ExitStack() as stack:
        if config is not None and not jax.distributed.is_initialized():
            stack.enter_context(_connected(config))
        if not is_one_of_many():
            yield
            return
        if jax.process_index() != 0:
            stack.enter_context(_quiet())
        from jax.experimental import multihost_utils

        try:
            yield
            multihost_utils.sync_global_devices("the end of a run")  # the first still writes
        except Exception as error:
            if told := _words_of_loss(error):
                raise ConnectionError(
                    f"Process {jax.process_index()} of {jax.process_count()} stops, since another "
                    f"one is gone ({told}). {GO_ON}"
                ) from error
            raise


def is_one_of_many() -> bool:
    """Whether this process is connected to others; asks nothing of the devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def check_same(**values: Any) -> None:
    """Raises ValueError, naming it, where processes differ in what must be the same on all."""
    if not is_one_of_many():
        return
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(str(value).encode()).digest()[:4] for value in values.values()]
    mine = np.frombuffer(b"".join(digests), np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    for name, found in zip(values, everyone.T):
        if others := np.flatnonzero(found != found[0]).tolist():
            raise ValueError(
                f"The processes of a run must have the same {name.replace('_', ' ')}, and "
                f"{others} differ from process 0. Give all the same command, files and versions, "
                "and a run directory on storage that they share."
            )


def check_shared(path: pathlib.Path, *, patience: float = 60.0) -> None:
    """Raises ValueError where other processes do not see what the first has written at `path`.

    `patience` is the seconds in which it must show, which on shared storage may be some.
    """
    if not is_one_of_many():
        return
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("the first has written")
    deadline = time.monotonic() + patience
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    check_same(run_directory=path.exists())


def leave(code: int) -> None:
    """Ends this process at once, without the wait for the others that JAX ends with.

    For one that failed: they learn by it that they cannot go on. Does nothing where there are none.
    """
    if is_one_of_many():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _connected(config: ProcessesConfig) -> Iterator[None]:
    address, count, index, devices = _find(config)
    if count == 1:
        yield
        return
    begun, seconds = time.monotonic(), config.start_timeout
    if index:
        _await_coordinator(address, seconds)
    left = max(1, seconds - int(time.monotonic() - begun))
    with _witness() as say:
        say(
            f"lorax-ft: process {index} of {count} stops: within {seconds} s "
            f"(processes.start_timeout) not all processes came to the coordinator at {address}. "
            "Start as many as processes.count says, each with its own processes.index."
        )
        jax.distributed.initialize(
            address,
            count,
            index,
            devices,
            cluster_detection_method="deactivate",
            initialization_timeout=left,
            heartbeat_timeout_seconds=config.lost_timeout,
        )
        say(
            f"lorax-ft: process {index} of {count} stops, since it was killed or lost the others: "
            f"one of them ended, or gave no sign of life for {config.lost_timeout} s "
            f"(processes.lost_timeout; the coordinator is at {address}). {GO_ON}"
        )
        yield


def _find(config: ProcessesConfig) -> tuple[str, int, int, Any]:
    """Coordinator, count, index and local devices (None: all) of the config or its cluster."""
    found = (config.coordinator, config.count, config.index, None)
    if config.cluster is not None:
        # jax looks them up in public only to connect at once, with no address to name if it cannot
        from jax._src.clusters import ClusterEnv

        method = None if config.cluster == "auto" else config.cluster
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(
                *found, method, config.start_timeout
            )
        except (KeyError, ImportError) as error:
            raise ValueError(
                f"processes.cluster = {config.cluster!r}: this process is not in one: {error} is "
                "missing."
            ) from error
    address, count, index, devices = found
    if address is None or count is None or index is None:
        raise ValueError(
            f"processes.cluster = {config.cluster!r}: jax finds no cluster around this process. "
            "Give processes.coordinator, processes.count and processes.index."
        )
    return address, count, index, devices


def _await_coordinator(address: str, seconds: float) -> None:
    """Returns when something listens there. Raises ConnectionError where nothing does in time."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(
                    f"The coordinator of the processes, {address}, could not be reached for "
                    f"{seconds} s (processes.start_timeout): {error}. Is process 0 running there, "
                    "and is that port open to this machine?"
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def _witness() -> Iterator[Any]:
    """Gives `say(words)`: the last words are printed if this process ends before it leaves here.

    After a ConnectionError too, since XLA may end the process before that is told.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WITNESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # signals to the group of this process are not for it
    )
    assert process.stdin is not None

    def say(words: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the witness itself was killed
            print(words, file=process.stdin, flush=True)

    try:
        yield say
    except ConnectionError:
        raise
    except BaseException:
        say("")
        raise
    say("")
    process.communicate()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lorax_ft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logger.setLevel(level)


def _words_of_loss(error: BaseException) -> str | None:
    """What an error, or one that it came from, says of a lost process; None where it is another."""
    seen: BaseException | None = error
    while seen is not None:
        if LOST.search(str(seen)) and not isinstance(seen, ConnectionError):
            return str(seen).splitlines()[0][:200]
        seen = seen.__cause__ or seen.__context__
    return None
