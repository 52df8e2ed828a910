"""A run that SIGINT or SIGTERM asks to stop: it ends its step and saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "stop_signals"]


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an Event that SIGINT and SIGTERM set. A second signal acts as it would without us."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may install handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, frame):
        stop.set()
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
