"""SIGTERM as a question the training loop asks, so that it can save before it stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[int], bool]]:
    """Gives `stop_asked(step)`: whether SIGTERM came.

    Of several processes it may come to any, and all stop at the same step. In a thread that is not
    the main one signals do not arrive, and the answer is always no.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # jax.distributed has taken the signal, and tells every process.
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False
    else:
        asked = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
        try:
            yield lambda step: asked.is_set()
        finally:
            signal.signal(signal.SIGTERM, before)
