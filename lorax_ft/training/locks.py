"""A lock on a directory, so that two runs cannot write into one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

BEAT = 5.0  # seconds after which a holder touches its lock again


@contextlib.contextmanager
def run_lock(directory: str | pathlib.Path, *, patience: float = 0.0) -> Iterator[None]:
    """Holds `directory/lock`, which names this process and host, until left.

    The system itself frees the lock of a process that died, so a stale file does not keep anyone
    out. The exception is one left by another host, whose processes cannot be seen from here: it
    counts as a dead one's when it was not touched for `patience` seconds, and never without. All
    who lock a directory must agree on that: with `patience` a holder touches its lock the while,
    and is waited for, twice as long. Raises RuntimeError naming the holder where another run has
    the directory.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    with path.open("a+") as file:
        _take(file, path, patience)
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        try:
            with _beating(path) if patience else contextlib.nullcontext():
                yield
        finally:
            # Emptied, not deleted: a waiting process may have the file open already.
            file.truncate(0)


def _take(file, path: pathlib.Path, patience: float) -> None:
    """Locks the file when its holder lets go of it, or is dead."""
    begun = touched = time.monotonic()
    seen = path.stat().st_mtime_ns
    while True:
        free, now = _is_locked(file), time.monotonic()
        if (time_of_touch := path.stat().st_mtime_ns) != seen:
            seen, touched = time_of_touch, now
        holder = _holder(file)
        if free and holder.get("host") in (None, socket.gethostname()):
            return
        if free and patience and now - touched >= patience:
            return
        if now - begun >= 2 * patience:
            break
        time.sleep(min(0.2, patience / 4))
    if not free:
        raise RuntimeError(
            f"{path.parent} is in use by another run ({holder}). Stop that one, or give this run "
            "another directory."
        )
    raise RuntimeError(
        f"{path.parent} was last in use by a run on another host ({holder}) that did not end "
        f"cleanly, or is still going. If you are sure that it is dead, delete {path}."
    )


def _is_locked(file) -> bool:
    """Whether this process has the file's lock, now if not before."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _beating(path: pathlib.Path) -> Iterator[None]:
    """Touches the lock from a thread: whoever cannot see this process sees that it lives."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a storage that is away for a while
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True, name="lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _holder(file) -> dict[str, object]:
    """Process and host that a lock file names; empty where it names none."""
    file.seek(0)
    try:
        return json.loads(file.read() or "{}")
    except json.JSONDecodeError:
        return {}
