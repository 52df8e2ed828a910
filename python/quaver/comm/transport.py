"""Messages between the ranks of a group, counted by kind.

There are five kinds: gather, exchange, shift along the ring, maximum, and, where the backend
(backend.py) can add FP8, a sum. The others move bytes, so every backend can send FP8. A message
returns at once with a Pending; waiting for it gives the tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .backend import backend_of
from .heartbeat import Heartbeat, RankFailure

__all__ = ["KINDS", "Pending", "Transport", "compare"]

KINDS = ("gradient", "weight", "activation", "scale")


class Pending:
    """A message that has started. `wait` returns what arrived, or raises RankFailure, which names
    the rank that is gone."""

    def __init__(self, works, result: Callable[[], Tensor], fail: Callable[[Exception], NoReturn]):
        self._works, self._result, self._fail = works, result, fail

    def wait(self) -> Tensor:
        for work in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                self._fail(error)
        self._works = ()
        return self._result()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


class Transport:
    """The messages of one process group (default: the default group; without one, a world of one).

    `traffic` counts the bytes that this rank sends, by kind: those of a gather and an exchange once
    for every other rank, those of a maximum and a sum as a ring sends them. `messages` counts the
    operations of the backend that it has started.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if started else 0
        self.size = dist.get_world_size(group) if started else 1
        self.backend = dist.get_backend(group) if started else None
        self.traffic = dict.fromkeys(KINDS, 0)
        self.messages = 0
        self._heartbeat = Heartbeat.of_process() if self.size > 1 else None
        self._backend = backend_of(group) if self.size > 1 else None

    @property
    def is_simulated(self) -> bool:
        """Whether the other ranks are torch's "fake" ones, without values: all have this one's."""
        return self.backend == "fake"

    @property
    def sums_fp8(self) -> bool:
        """Whether `sum` takes FP8."""
        return self.size > 1 and self._backend.sums_fp8

    def _start(self, what: str, *args):
        """Starts a message of the backend. Some backends refuse at once where a peer is gone."""
        self.messages += 1
        try:
            return getattr(self._backend, what)(*args)
        except RuntimeError as error:
            self._fail(what, error)

    def _pending(self, what: str, works, result) -> Pending:
        return Pending(works, result, lambda error: self._fail(what, error))

    def _fail(self, what: str, error: RuntimeError) -> NoReturn:
        failure = self._heartbeat.reason()
        reason = f"a message failed: {error}" if failure is None else failure.text
        usage = failure is not None and failure.usage
        raise RankFailure(f"rank {self.rank}, {what}: {reason}", usage) from error

    def all_gather(self, x: Tensor, kind: str, out: Tensor | None = None) -> Pending:
        """Every rank's x, of one shape: [ranks, *shape], in `out` where that is given, of which
        x may be this rank's row."""
        shape = (self.size, *x.shape)
        if self.size == 1 and out is None:
            return self._pending("all_gather", (), lambda: x.reshape(shape))
        sent = _bytes(x)
        got = sent.new_empty(self.size * sent.numel()) if out is None else _bytes(out)
        self.traffic[kind] += (self.size - 1) * sent.numel()
        works = self._start("all_gather", got, sent)
        return self._pending("all_gather", works, lambda: got.view(x.dtype).reshape(shape))

    def gather_rows(self, rows: list[Tensor], kind: str) -> Pending:
        """Overwrites row r of every rank, bytes of any number, with that of rank r; in place."""
        if self.size == 1:
            return self._pending("gather_rows", (), lambda: rows[0])
        self.traffic[kind] += (self.size - 1) * rows[self.rank].numel()
        works = [
            work
            for root, row in enumerate(rows)
            if row.numel()
            for work in self._start("broadcast", row, root)
        ]
        return self._pending("gather_rows", works, lambda: rows[self.rank])

    def all_to_all(self, x: Tensor, lengths: list[int], kind: str) -> Pending:
        """Cuts x, 1-D, into pieces of `lengths`, the same on every rank; piece r goes to rank r.
        Gives the pieces of all ranks for this one: [ranks, lengths[rank]]."""
        mine = lengths[self.rank]
        if self.size == 1:
            return self._pending("all_to_all", (), lambda: x.reshape(1, mine))
        sent, size = _bytes(x), x.element_size()
        got = sent.new_empty(self.size * mine * size)
        self.traffic[kind] += (x.numel() - mine) * size
        went = [n * size for n in lengths]
        works = self._start("all_to_all", got, sent, [mine * size] * self.size, went)
        return self._pending("all_to_all", works, lambda: got.view(x.dtype).view(self.size, mine))

    def shift(self, x: Tensor, kind: str) -> Pending:
        """x to the next rank of the ring; gives the previous one's."""
        if self.size == 1:
            return self._pending("shift", (), lambda: x)
        sent = _bytes(x)
        got = torch.empty_like(sent)
        self.traffic[kind] += sent.numel()
        before, after = ((self.rank + step) % self.size for step in (-1, 1))
        works = self._start("shift", got, sent, before, after)
        return self._pending("shift", works, lambda: got.view(x.dtype).view(x.shape))

    def send(self, x: Tensor, to: int) -> None:
        """x to one rank, which calls `receive`; waits. Not counted: for checkpoints."""
        sent = _bytes(x)
        self._pending("send", self._start("send", sent, to), lambda: sent).wait()

    def receive(self, x: Tensor, source: int) -> None:
        """Overwrites x, contiguous, with what `source` sends; waits."""
        got = x.view(-1).view(torch.uint8)
        self._pending("receive", self._start("receive", got, source), lambda: got).wait()

    def max(self, x: Tensor, kind: str) -> Pending:
        """The largest of all ranks, element by element, of finite numbers."""
        result = x.clone()
        if self.size == 1:
            return self._pending("max", (), lambda: result)
        self.traffic[kind] += self._ring_bytes(x)
        return self._pending("max", self._start("max_", result), lambda: result)

    def sum(self, x: Tensor, kind: str) -> Pending:
        """Overwrites x, FP8, with the sum over the ranks, rounded and saturated at every addition,
        in the order of the backend. Where `sums_fp8`."""
        self.traffic[kind] += self._ring_bytes(x)
        return self._pending("sum", self._start("sum_", x), lambda: x)

    def _ring_bytes(self, x: Tensor) -> int:
        return math.ceil(2 * (self.size - 1) / self.size * x.numel() * x.element_size())

    def all_gather_object(self, value, device: torch.device | str = "cpu") -> list:
        """The JSON values of all ranks, in rank order. Not counted: for agreements at the start."""
        if self.size == 1 or self.is_simulated:
            return [value] * self.size
        before = dict(self.traffic)
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
        count = torch.tensor([text.numel()], device=device)
        counts = self.all_gather(count, "scale").wait().flatten().tolist()
        padded = text.new_zeros(max(counts))
        padded[: text.numel()] = text
        rows = self.all_gather(padded, "scale").wait().cpu()
        self.traffic = before
        return [json.loads(bytes(r[:n].tolist())) for r, n in zip(rows, counts, strict=True)]

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrites plain tensors with rank 0's. Not counted: for the start."""
        if self.size == 1:
            return
        for t in tensors:
            sent = _bytes(t)
            self._pending("broadcast", self._start("broadcast", sent, 0), lambda: None).wait()
            t.copy_(sent.view(t.dtype).view(t.shape))


def compare(op: str, found: list[dict]) -> None:
    """Raises ValueError naming the first thing in which a rank differs from rank 0."""
    for rank, other in enumerate(found):
        for key in [*found[0], *other]:
            a, b = found[0].get(key, "nothing"), other.get(key, "nothing")
            if a != b:
                raise ValueError(f"{op}: {key} is {a} on rank 0, {b} on rank {rank}")
