"""Finds the rank that died or stopped, and carries an error of one rank to all.

The ranks form a star: the first to start listens on a socket, and every other connects to it. Both
ends of a connection send a beat twice a second. A connection that closes without a farewell is a
dead rank; one without a beat for TIMEOUT seconds is a stopped rank. The rank that finds a failure
passes it on, so that all ranks end with the same reason.

Only the first failure counts. It runs the callbacks of `on_failure`, which abort messages that
would otherwise wait for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import queue
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .peer import Peer, connect, listen

__all__ = ["Failure", "Heartbeat", "RankFailure"]

PERIOD = 0.5  # seconds between beats
TIMEOUT = float(os.environ.get("QUAVER_HEARTBEAT_TIMEOUT", "30"))  # seconds without a beat
ABORT_DELAY = 1.0  # seconds from a failure to the callbacks: what has been sent may still arrive
REASON_DELAY = 2.5  # seconds from an error of a message to the failure that explains it
KEY = "quaver/heartbeat"


class RankFailure(RuntimeError):
    """Another rank has failed, so that a message cannot arrive; the text names that rank. `usage`:
    whether its flags or files were wrong."""

    def __init__(self, text: str, usage: bool = False):
        super().__init__(text)
        self.usage = usage


@dataclass(frozen=True)
class Failure:
    """The reason why all ranks end: `text` names the rank that failed first; `usage` as in
    RankFailure."""

    text: str
    usage: bool = False


class Heartbeat:
    """The connections of this process and the daemon thread that serves them. Every rank of the
    store must make one; only the constructor uses the store.

    Raises OSError where the listening rank cannot be reached, and what the store raises.
    """

    _of_process: Heartbeat | None = None

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size = rank, size
        self.failure: Failure | None = None
        self._values: dict[int, object] = {}  # of `gather`, by rank
        self._gone: set[int] = set()  # ranks that have ended or died
        self._changed = threading.Condition()  # of the three above
        self._callbacks: list[Callable[[], None]] = []
        self._group: weakref.ref | None = None
        self._farewell: float | None = None  # seconds; of `stop`
        self._posted: queue.SimpleQueue[dict] = queue.SimpleQueue()  # messages of other threads
        self._silence: dict[Peer, int] = {}  # periods since a peer's last message
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._meet(store)
        self._thread = threading.Thread(target=self._run, daemon=True, name="quaver heartbeat")
        self._thread.start()
        atexit.register(self.stop)

    @classmethod
    def of_process(cls) -> Heartbeat:
        """The heartbeat of the default process group, made by the first call."""
        group, current = dist.group.WORLD, cls._of_process
        if current is not None and current._group() is not group:
            current.stop()
        if cls._of_process is None:
            store = distributed_c10d._get_default_store()
            cls(store, dist.get_rank(), dist.get_world_size()).watch(group)
        return cls._of_process

    def watch(self, group: dist.ProcessGroup) -> None:
        """Makes this the heartbeat of the process for as long as `group` is the default group."""
        self._group = weakref.ref(group)
        Heartbeat._of_process = self

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, in the heartbeat's thread, ABORT_DELAY after a failure."""
        self._callbacks.append(callback)

    def report(self, text: str, usage: bool = False) -> None:
        """Makes an error of this rank the failure of all ranks."""
        self._post(failure=[f"rank {self.rank}: {text}", usage])

    def reason(self) -> Failure | None:
        """Waits up to REASON_DELAY for the reason why a message failed; None if no rank is gone."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure, REASON_DELAY)
            if self.failure is None and self._gone:
                return Failure(f"{_have(self._gone)} ended")
            return self.failure

    def result(self, future: Future):
        """The result of `future`. Raises RankFailure where a rank fails before it has one."""
        future.add_done_callback(lambda _: self._notify())
        with self._changed:
            self._changed.wait_for(lambda: self.failure or future.done())
        if not future.done():
            raise RankFailure(self.failure.text, self.failure.usage)
        return future.result()

    def gather(self, value, timeout: float) -> list:
        """The JSON values of all ranks, in rank order. For one call a heartbeat: for what the ranks
        agree on before they have a process group.

        Raises RankFailure where a rank fails, or does not call within `timeout` seconds.
        """
        self._post(value=value)
        listens = self._listener is not None
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure or len(self._values) == self.size,
                timeout if listens else timeout + REASON_DELAY,  # the listener names the missing
            )
            missing = set(range(self.size)) - self._values.keys()
            if not missing:
                return [self._values[rank] for rank in range(self.size)]
        if self.failure is None:
            missing = missing if listens else {self._listening_rank}
            self._post(
                failure=[f"{_have(missing)} not arrived within {round(timeout, 1):g} s", False]
            )
        failure = self.reason()
        raise RankFailure(failure.text, failure.usage)

    def stop(self, farewell: float = 0.0) -> None:
        """Ends the thread and the connections; the other ranks count this one as ended, not dead.
        The listening rank waits up to `farewell` seconds for all others to be gone."""
        atexit.unregister(self.stop)
        if Heartbeat._of_process is self:
            Heartbeat._of_process = None
        self._post(ended=farewell)
        self._thread.join(farewell + 4 * PERIOD)

    def _post(self, **message) -> None:
        """Hands a message of this rank to the heartbeat's thread."""
        self._posted.put({"rank": self.rank, **message})
        with contextlib.suppress(OSError):  # the thread has ended
            self._wake.send(b"x")

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _meet(self, store: dist.Store) -> None:
        """Listens if no other rank does, else connects to the one that does."""
        turn = store.add(f"{KEY}/{self.rank}", 1)  # a store may serve several groups in turn
        listener, hosts = listen(store, self.size)
        listener.setblocking(False)
        own = {"rank": self.rank, "hosts": hosts, "port": listener.getsockname()[1]}
        own["token"] = secrets.token_hex()  # admits only processes that can read the store
        # The first rank sets the key; all get what it set.
        found = store.compare_set(f"{KEY}/listener/{turn}", "", json.dumps(own))
        chosen = json.loads(found)
        self._token, self._listening_rank = chosen["token"], chosen["rank"]
        self._listener = listener if chosen == own else None
        if self._listener is not None:
            self._selector.register(listener, selectors.EVENT_READ)
            return
        listener.close()
        peer = Peer(connect(chosen["hosts"], chosen["port"]), chosen["rank"])
        peer.send({"rank": self.rank, "token": self._token})
        self._add(peer)

    def _add(self, peer: Peer) -> None:
        self._silence[peer] = 0
        self._selector.register(peer, selectors.EVENT_READ)

    def _remove(self, peer: Peer) -> None:
        del self._silence[peer]
        self._selector.unregister(peer)
        peer.close()

    def _run(self) -> None:
        beat_at, abort_at, end_at = 0.0, math.inf, math.inf
        while True:
            now = time.monotonic()
            if now >= beat_at:
                self._beat()
                beat_at = now + PERIOD
            if self.failure is not None:
                abort_at = min(abort_at, now + ABORT_DELAY)
            if now >= abort_at:
                callbacks, self._callbacks = self._callbacks, []
                for callback in callbacks:
                    callback()
            if self._farewell is not None:
                end_at = min(end_at, now + self._farewell)
                if now >= end_at or self._listener is None or len(self._gone) == self.size:
                    break
            for key, _ in self._selector.select(max(0.0, beat_at - now)):
                self._serve(key.fileobj)
        for peer in list(self._silence):
            self._remove(peer)
        for connection in (self._selector, self._listener, self._wake, self._woken):
            if connection is not None:
                connection.close()

    def _beat(self) -> None:
        for peer in list(self._silence):
            peer.send({"rank": self.rank})
            self._silence[peer] += 1
            # Silence is counted in own beats, so that no peer seems silent after this process was
            # stopped.
            if self._silence[peer] * PERIOD > TIMEOUT:
                self._remove(peer)
                if peer.rank is not None:
                    self._fail(f"rank {peer.rank} has not answered for {TIMEOUT:g} s")

    def _serve(self, source) -> None:
        if source is self._woken:
            self._woken.recv(1)
            self._take(self._posted.get())
        elif source is self._listener:
            with contextlib.suppress(OSError):  # the connection is gone again
                self._add(Peer(self._listener.accept()[0]))
        else:
            self._receive(source)

    def _receive(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None:
            self._remove(peer)
            if peer.rank is not None and peer.rank not in self._gone:
                self._gone.add(peer.rank)
                self._fail(f"rank {peer.rank} has died")
            return
        self._silence[peer] = 0
        for message in messages:
            if peer.rank is None:  # its first message
                if message.get("token") != self._token:
                    return self._remove(peer)
                peer.rank = message["rank"]
                if self.failure is not None:
                    peer.send({"failure": [self.failure.text, self.failure.usage]})
            self._take(message, peer)

    def _fail(self, text: str) -> None:
        self._take({"rank": self.rank, "failure": [text, False]})

    def _take(self, message: dict, source: Peer | None = None) -> None:
        """Acts on a message of a peer, or of this rank, and passes on what concerns other ranks."""
        with self._changed:
            if "failure" in message:
                if self.failure is not None:
                    return
                self.failure = Failure(*message["failure"])
            elif "value" in message:
                self._values[message["rank"]] = message["value"]
            elif "values" in message:
                self._values = dict(enumerate(message["values"]))
            elif "ended" in message:
                self._gone.add(message["rank"])
                if source is None:
                    self._farewell = message["ended"]
            else:
                return  # a beat
            self._changed.notify_all()
        if "value" in message and self._listener is not None:
            if len(self._values) < self.size:
                return
            message = {"values": [self._values[rank] for rank in range(self.size)]}
            source = None
        for peer in self._silence:
            if peer is not source and peer.rank is not None:
                peer.send(message)


def _have(ranks: set[int]) -> str:
    names = ", ".join(map(str, sorted(ranks)))
    return f"rank {names} has" if len(ranks) == 1 else f"ranks {names} have"
