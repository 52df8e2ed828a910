"""The rendezvous by which the processes of torchrun connect to each other, within a deadline."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from datetime import timedelta

import torch.distributed as dist

from ..errors import UsageError
from .heartbeat import Heartbeat

__all__ = ["Rendezvous", "in_thread"]

CONNECT_TIMEOUT = 5.0  # seconds; torch tries twice
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Rendezvous:
    """This rank's place among the ranks, and the store at MASTER_ADDR:MASTER_PORT.

    torch's own rendezvous is not used: it waits twice its time-out for a store that is not there,
    without end for one that accepts and does not answer, and logs C++ stack traces.
    """

    used = False  # whether this process has joined others

    def __init__(self, rank: int, size: int, host: str, port: int, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        self.store: dist.Store | None = None
        self._host, self._port = host, port
        self._deadline = time.monotonic() + timeout

    @classmethod
    def of_environment(cls, timeout: float) -> Rendezvous:
        """Raises UsageError naming a variable that is missing or wrong."""
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise UsageError(f"{', '.join(missing)} not set: start the ranks with torchrun")
        rank, size, host, port = (os.environ[name] for name in VARIABLES)
        numbers = [int(text) if text.isdecimal() else -1 for text in (rank, size, port)]
        if not (0 <= numbers[0] < numbers[1] and 0 < numbers[2] < 1 << 16):
            raise UsageError(
                f"wanted RANK in [0, WORLD_SIZE) and a port in MASTER_PORT, got RANK={rank}, "
                f"WORLD_SIZE={size}, MASTER_PORT={port}"
            )
        return cls(numbers[0], numbers[1], host, numbers[2], timeout)

    def seconds_left(self) -> float:
        return max(1.0, self._deadline - time.monotonic())

    def join(self) -> Heartbeat:
        """Opens the store, and starts the heartbeat over it. Raises UsageError with its address."""
        Rendezvous.used = True
        try:
            return in_thread(self._join).result(self.seconds_left())
        except (OSError, RuntimeError, TimeoutError) as error:  # torch's errors are RuntimeErrors
            reason = (str(error) or "it accepts connections and does not answer").splitlines()[0]
            raise UsageError(
                f"rank {self.rank} did not reach the store at {self._host}:{self._port} "
                f"(MASTER_ADDR, MASTER_PORT) within {self.timeout:g} s: {reason}"
            ) from None

    def _join(self) -> Heartbeat:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun hosts it
        hosts = self.rank == 0 and not agent
        if not hosts:
            self._await_store()
        self.store = dist.TCPStore(
            self._host,
            self._port,
            self.size,
            is_master=hosts,
            timeout=timedelta(seconds=CONNECT_TIMEOUT),
            wait_for_workers=False,
            multi_tenant=True,  # a second group of this process shares the port
        )
        return Heartbeat(self.store, self.rank, self.size)

    def _await_store(self) -> None:
        while True:
            try:
                with socket.create_connection((self._host, self._port), self.seconds_left()):
                    return
            except OSError:
                if time.monotonic() > self._deadline - 1.0:
                    raise
            time.sleep(0.1)


def in_thread(action: Callable) -> Future:
    """Starts action() in a daemon thread: torch has calls that no time-out interrupts."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="quaver start").start()
    return future
