"""Which rank is gone? A backend only says that a connection closed.

Every process counts up a key of the store twice a second. When a message fails, the ranks whose
counts stand still are the dead ones; the first to find out leaves the answer in the store, because
those that hear of it later also miss the ranks that ended in between. Every beat looks for it,
since the store may end with its process. Where messages to a dead rank never fail by themselves, as
with NCCL, whoever carries them asks to be told of silence.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["Heartbeat", "RankFailure"]

PERIOD = 0.5  # seconds between beats
PATIENCE = 2.5  # without one, a rank is dead
SILENCE = 20.0  # seconds; of that which nobody has asked about: a process may be busy
FOUND = "found"


class RankFailure(RuntimeError):
    """A message that cannot arrive; the text names the rank that is gone."""


class Heartbeat:
    """The beats of this process, in a daemon thread, over its own connection to the store."""

    _of_process: Heartbeat | None = None

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size = rank, size
        self.address = _address(store)
        self._store = dist.PrefixStore("quaver/beat", store.clone())
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listeners: list[Callable[[], None]] = []
        self._found: str | None = None
        self._store.set(str(rank), "0")
        self._thread = threading.Thread(target=self._run, daemon=True, name="quaver heartbeat")
        self._thread.start()

    @classmethod
    def of_process(cls) -> Heartbeat:
        """The one of this process, over the default group's store."""
        store = distributed_c10d._get_default_store()
        beat = cls._of_process
        if beat is None or beat._default is not store:
            if beat is not None:
                beat.stop()
            beat = cls._of_process = cls(store, dist.get_rank(), dist.get_world_size())
            beat._default = store
            atexit.register(beat.stop)
        return beat

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(PERIOD + 1)

    def on_silence(self, listener: Callable[[], None]) -> None:
        """Calls it from this thread, once, when another rank has been silent for SILENCE to twice
        SILENCE seconds, or the store does not answer: because it has died, or has ended."""
        self._listeners.append(listener)

    def _run(self) -> None:
        count, looked, seen = 0, time.monotonic(), {}
        while not self._stop.wait(PERIOD):
            count += 1
            silent = False
            try:
                with self._lock:
                    self._store.set(str(self.rank), str(count))
                    if self._found is None and self._store.check([FOUND]):
                        self._found = self._store.get(FOUND).decode()
                if self._listeners and time.monotonic() - looked > SILENCE:
                    counts = self._counts()
                    silent = any(counts[r] == seen.get(r) for r in counts if r != self.rank)
                    looked, seen = time.monotonic(), counts
            except RuntimeError:  # the store ended with its process
                self._tell()
                return
            if silent:
                self._tell()

    def _tell(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener()

    def _counts(self) -> dict[int, bytes]:
        with self._lock:
            there = [r for r in range(self.size) if self._store.check([str(r)])]
            return dict(zip(there, self._store.multi_get([str(r) for r in there]), strict=True))

    def culprit(self) -> str | None:
        """ "rank 2 has died", from whoever found out first; None where every rank is alive."""
        try:
            before, began = self._counts(), time.monotonic()
            while time.monotonic() - began < PATIENCE:
                if self._found is not None:
                    return self._found
                time.sleep(PERIOD / 5)
            after = self._counts()
            dead = [r for r in range(self.size) if before.get(r) == after.get(r)]
            dead = [r for r in dead if r != self.rank and r in before]
            if not dead:
                return None
            names = ("rank " if len(dead) == 1 else "ranks ") + ", ".join(map(str, dead))
            with self._lock:  # sets it only if nobody has
                found = self._store.compare_set(FOUND, "", f"{names} has died").decode()
            if self.rank == 0:  # with which the store may end, before the others' next beat
                time.sleep(3 * PERIOD)
            return found
        except RuntimeError:
            return self._found or f"rank 0 has died, and with it the store at {self.address}"


def _address(store: dist.Store) -> str:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return f"{store.host}:{store.port}" if isinstance(store, dist.TCPStore) else str(store)
