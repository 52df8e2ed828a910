"""The backends of a Transport: torch's process group, or quaver's own NCCL communicator.

Both move bytes between the ranks of one group and return works to wait for. The communicator runs
all messages in the order of one stream and adds FP8; the process group serves any library.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .heartbeat import Heartbeat
from .nccl import Nccl

__all__ = ["NcclBackend", "ProcessGroupBackend", "backend_of"]

CHOICES = ("quaver", "torch")
ABORT_TAG = 0x51756176  # of a message that nobody sends

# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessGroupBackend:
    """torch.distributed's own messages, over whatever backend the group has. Gloo's are aborted on
    a failure of a rank."""

    sums_fp8 = False

    def __init__(self, group: dist.ProcessGroup):
        # Weak: gloo's threads end with the group, and must end before the interpreter does.
        self._group = weakref.ref(group)
        if dist.get_backend(group) == "gloo":
            Heartbeat.of_process().on_failure(self.abort)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError("the process group was destroyed")
        return group

    def abort(self) -> None:
        """Fails all messages of the group; any thread may call it. Gloo has no abort, but closes
        the group's connections when a receive times out, so this runs one that does."""
        group = self._group()
        if group is None:
            return
        peer = (group.rank() + 1) % group.size()
        with contextlib.suppress(RuntimeError):  # of the time-out, or closed already
            group.recv([torch.zeros(1)], peer, ABORT_TAG).wait(timedelta(milliseconds=1))

    def all_gather(self, got: Tensor, sent: Tensor):
        return [_all_gather(got, sent, group=self.group, async_op=True)]

    def broadcast(self, row: Tensor, root: int):
        return [dist.broadcast(row, group=self.group, group_src=root, async_op=True)]

    def all_to_all(self, got: Tensor, sent: Tensor, came: list[int], went: list[int]):
        return [dist.all_to_all_single(got, sent, came, went, self.group, async_op=True)]

    def shift(self, got: Tensor, sent: Tensor, before: int, after: int):
        return dist.batch_isend_irecv([
            dist.P2POp(dist.isend, sent, group=self.group, group_peer=after),
            dist.P2POp(dist.irecv, got, group=self.group, group_peer=before),
        ])  # fmt: skip

    def send(self, x: Tensor, to: int):
        return [dist.isend(x, group=self.group, group_dst=to)]

    def receive(self, x: Tensor, source: int):
        return [dist.irecv(x, group=self.group, group_src=source)]

    def max_(self, values: Tensor):
        return [dist.all_reduce(values, dist.ReduceOp.MAX, self.group, async_op=True)]


class _Passed:
    """A work of which wait() makes the current stream wait and returns at once."""

    def __init__(self, event: torch.cuda.Event):
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class NcclBackend:
    """Messages through quaver's communicator, in a stream of its own, after what the current stream
    holds when they start. Collective, like Nccl; aborted on a failure of a rank.

    Raises RuntimeError where a message cannot start, like a process group.
    """

    def __init__(self, group: dist.ProcessGroup, library: str = "", host: bool = False):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        # Groups of one name with other ranks, or made again, are other communicators.
        store = distributed_c10d._get_default_store()
        name = f"quaver/{group.group_name}/{dist.get_global_rank(group, 0)}"
        made = store.add(f"{name}/{rank}", 1)
        self.rank, self.size = rank, size
        self._nccl = Nccl(store, rank, size, name=f"{name}/{made}", library=library, host=host)
        # Before the products that wait for a multiprocessor, or a message would wait for them all.
        self._stream = None if host else torch.cuda.Stream(priority=-1)
        # FP8 sums are used on all ranks or none. This message also makes the connections, so
        # that one that fails does so at the start.
        unable = torch.tensor(
            [float(not self._nccl.sums_fp8)],
            dtype=torch.float32,
            device="cpu" if host else "cuda",
        )
        self._nccl.max_(unable)
        self.sums_fp8 = unable.item() == 0
        Heartbeat.of_process().on_failure(self._nccl.abort)
        weakref.finalize(group, self._nccl.close)  # or at the end of the process

    def all_gather(self, got: Tensor, sent: Tensor):
        return self._queue(lambda: self._nccl.all_gather(got, sent), got, sent)

    def broadcast(self, row: Tensor, root: int):
        return self._queue(lambda: self._nccl.broadcast(row, root), row)

    def all_to_all(self, got: Tensor, sent: Tensor, came: list[int], went: list[int]):
        return self._queue(lambda: self._nccl.all_to_all(got, sent, came, went), got, sent)

    def shift(self, got: Tensor, sent: Tensor, before: int, after: int):
        return self.all_to_all(
            got, sent, self._only(before, got.numel()), self._only(after, sent.numel())
        )

    def send(self, x: Tensor, to: int):
        return self.all_to_all(x[:0], x, self._only(to, 0), self._only(to, x.numel()))

    def receive(self, x: Tensor, source: int):
        return self.all_to_all(x, x[:0], self._only(source, x.numel()), self._only(source, 0))

    def max_(self, values: Tensor):
        return self._queue(lambda: self._nccl.max_(values), values)

    def sum_(self, values: Tensor):
        return self._queue(lambda: self._nccl.sum_(values), values)

    def _only(self, peer: int, count: int) -> list[int]:
        return [count if rank == peer else 0 for rank in range(self.size)]

    def _queue(self, call: Callable[[], None], *tensors: Tensor):
        try:
            if self._stream is None:
                call()
                return []
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                call()
        except ValueError as error:  # of NCCL, or aborted meanwhile
            raise RuntimeError(str(error)) from error
        for t in tensors:
            t.record_stream(self._stream)
        return [_Passed(self._stream.record_event())]


_backends: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def backend_of(group: dist.ProcessGroup | None):
    """The backend of a group, by default of the default group. All its ranks must call: the first
    call connects them.

    Quaver's communicator where the group's backend is NCCL, else torch's process group.
    QUAVER_COMMUNICATOR, "quaver" or "torch", overrides this, and QUAVER_NCCL_LIBRARY names the
    library that is opened instead of libnccl.so.2. Over another backend than NCCL, whose tensors
    are the host's, that must be a library that moves host memory.

    Raises ValueError for an unknown QUAVER_COMMUNICATOR, or where NCCL does not load or connect.
    """
    group = group or dist.group.WORLD
    on_nccl = dist.get_backend(group) == "nccl"
    choice = os.environ.get("QUAVER_COMMUNICATOR", "quaver" if on_nccl else "torch")
    library = os.environ.get("QUAVER_NCCL_LIBRARY", "")
    if choice not in CHOICES:
        raise ValueError(f"QUAVER_COMMUNICATOR must be one of {CHOICES}, got {choice!r}")
    if choice == "quaver" and not on_nccl and not library:
        raise ValueError(
            "QUAVER_COMMUNICATOR=quaver needs a group over nccl, or a QUAVER_NCCL_LIBRARY that "
            f"moves host memory; this group is over {dist.get_backend(group)}"
        )
    made = _backends.setdefault(group, {})
    if (choice, library) not in made:
        made[choice, library] = (
            ProcessGroupBackend(group)
            if choice == "torch"
            else NcclBackend(group, library, host=not on_nccl)
        )
    return made[choice, library]
