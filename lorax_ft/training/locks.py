"""A lock on a run directory, so that two runs cannot write into one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def run_lock(directory: str | pathlib.Path) -> Iterator[None]:
    """Holds `directory/lock`, which names this process and host, until left.

    The system itself frees the lock of a process that died, so a stale file does not keep anyone
    out. The exception is one left by another host, whose processes cannot be seen from here. Raises
    RuntimeError naming the holder where another run has the directory.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"{directory} is in use by another run ({_holder(file)}). Stop that one, or give "
                "this run "
                "another directory."
            ) from None
        host = _holder(file).get("host")
        if host not in (None, socket.gethostname()):
            raise RuntimeError(
                f"{directory} was last in use by a run on another host ({_holder(file)}) that did "
                "not end "
                f"cleanly, or is still going. If you are sure that it is dead, delete {path}."
            )
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        try:
            yield
        finally:
            # Emptied, not deleted: a waiting process may have the file open already.
            file.truncate(0)


def _holder(file) -> dict[str, object]:
    """Process and host that a lock file names; empty where it names none."""
    file.seek(0)
    try:
        return json.loads(file.read() or "{}")
    except json.JSONDecodeError:
        return {}
