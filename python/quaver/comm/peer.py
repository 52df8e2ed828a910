"""Socket connections between ranks that carry JSON lines, for the heartbeat.

Python's sockets rather than the store's: a store can stop answering for ever, and torch logs C++
stack traces when it closes.
"""

from __future__ import annotations

import contextlib
import json
import socket

import torch.distributed as dist

__all__ = ["Peer", "connect", "listen", "store_address"]

CONNECT_TIMEOUT = 10.0  # seconds
SEND_TIMEOUT = 5.0  # seconds; only long lines fill a connection
MAX_LINE = 1 << 28  # bytes
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Peer:
    """One end of a connection. `rank` is the rank at the other end, None until it is known."""

    def __init__(self, connection: socket.socket, rank: int | None = None):
        connection.setblocking(False)
        self.connection, self.rank = connection, rank
        self._received = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: dict) -> None:
        """Sends a line. A connection that is closed or full shows when it is read."""
        with contextlib.suppress(OSError):
            self.connection.settimeout(SEND_TIMEOUT)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
            self.connection.setblocking(False)

    def receive(self) -> list[dict] | None:
        """The messages that have arrived; None at the end of the connection, or for other data."""
        try:
            data = self.connection.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > MAX_LINE:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(m, dict) for m in messages) else None

    def close(self) -> None:
        self.connection.close()


def store_address(store: dist.Store) -> tuple[str, int] | None:
    """Host and port of a TCPStore, prefixed or not; None for a store of another kind."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) else None


def listen(store: dist.Store, backlog: int) -> tuple[socket.socket, list[str]]:
    """A listening socket, and the hosts at which other ranks may reach it: this machine's address
    on the way to the store, then the store's host. Over a loopback store it is open to this machine
    alone."""
    host, port = store_address(store) or ("127.0.0.1", 1)
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: chooses the interface
        own = probe.getsockname()[0]
    bound = own if host in LOOPBACK else ""
    return socket.create_server((bound, 0), family=family, backlog=backlog), [own, host]


def connect(hosts: list[str], port: int) -> socket.socket:
    """A connection to the first host that answers. Raises OSError with the last one's reason."""
    for host in hosts:
        try:
            return socket.create_connection((host, port), CONNECT_TIMEOUT)
        except OSError as error:
            reason = error
    raise OSError(f"no connection to {' or '.join(hosts)}, port {port}: {reason}")
