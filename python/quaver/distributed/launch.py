"""The ranks of a run: how they join, agree, and end together."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from ..comm.heartbeat import Heartbeat, RankFailure
from ..comm.rendezvous import Rendezvous, in_thread
from ..comm.together import together
from ..comm.transport import Transport, compare
from ..errors import UsageError

__all__ = ["World", "announce", "init", "joined"]

START_TIMEOUT = float(os.environ.get("QUAVER_START_TIMEOUT", "40"))  # seconds
END_TIMEOUT = 10.0  # seconds from a failure of a rank to the end of every process of a command
FAREWELL = 5.0  # seconds that the ranks wait for each other at the end


def init(
    device: str = "cpu",
    timeout: float = START_TIMEOUT,
    message_timeout: float = 1800.0,
    settings: dict | None = None,
) -> None:
    """torch.distributed.init_process_group from torchrun's environment: gloo for "cpu", nccl for
    "cuda", whose device becomes LOCAL_RANK's. Does nothing where that group exists already.

    Args:
        timeout: seconds that all ranks have to arrive.
        message_timeout: seconds after which a message that does not arrive is an error.
        settings: JSON values by name, which must be the same on all ranks.

    Raises:
        UsageError: not started by torchrun; a store that does not answer, with its address; another
            group than the environment's exists; the setting in which a rank differs from rank 0.
        RankFailure: a rank that died, failed, or did not arrive in time.
    """
    backend = "nccl" if device == "cuda" else "gloo"
    rendezvous = Rendezvous.of_environment(timeout)
    if dist.is_initialized():
        found = (dist.get_backend(), dist.get_rank(), dist.get_world_size())
        wanted = (backend, rendezvous.rank, rendezvous.size)
        if found != wanted:
            raise UsageError(
                f"init: wanted a group of (backend, rank, size) {wanted}, and {found} exists "
                "already: torch.distributed.destroy_process_group() first"
            )
        return
    # Imported before there is a group: its functions have the default group as a default argument.
    # One that they took would live, with its threads, until the interpreter ends, and abort it.
    import torch.distributed.nn.functional

    heartbeat = rendezvous.join()
    # A rank that has yet to start finds the reason of a failure here, and nothing once this ends.
    with _shared_errors(heartbeat, farewell=rendezvous.seconds_left):
        _agree(heartbeat.gather(settings or {}, rendezvous.seconds_left()))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        options = {"rank": rendezvous.rank, "world_size": rendezvous.size}
        options["store"] = rendezvous.store
        if backend == "nccl":  # connects with the first message
            dist.init_process_group("nccl", timeout=timedelta(seconds=message_timeout), **options)
        else:
            options["timeout"] = timedelta(seconds=timeout)  # of connecting
            connected = in_thread(lambda: dist.init_process_group("gloo", **options))
            heartbeat.result(connected)
            distributed_c10d._set_pg_timeout(timedelta(seconds=message_timeout))
        heartbeat.watch(dist.group.WORLD)


def announce(text: str) -> None:
    """Ends the other ranks of a command that this rank cannot start, because of `text`. Does
    nothing without other ranks, or after `init`, which reports its own errors to them."""
    if Rendezvous.used or int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return
    try:
        rendezvous = Rendezvous.of_environment(START_TIMEOUT)
        heartbeat = rendezvous.join()
    except UsageError:  # no other rank came
        return
    heartbeat.report(text, usage=True)
    heartbeat.stop(rendezvous.seconds_left())


@contextmanager
def joined(device: torch.device, tensor: int = 1, settings: dict | None = None) -> Iterator[World]:
    """The World of a command that torchrun started on every rank, from `init` to the end of the
    group. An error of one rank ends the block on all ranks, by RankFailure on the others; a process
    that cannot leave the block within END_TIMEOUT is ended."""
    init(device.type, settings=settings)
    heartbeat = Heartbeat.of_process()
    guard = threading.Timer(END_TIMEOUT, _end_process, [heartbeat])
    guard.daemon = True
    heartbeat.on_failure(guard.start)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        with _shared_errors(heartbeat):
            yield World(device, tensor)
        _leave()
        heartbeat.stop(FAREWELL)
    finally:
        guard.cancel()


@contextmanager
def _shared_errors(
    heartbeat: Heartbeat, farewell: Callable[[], float] = lambda: FAREWELL
) -> Iterator[None]:
    """Makes an error of the block one of all ranks, and an error that another rank's failure has
    caused a RankFailure. `farewell` gives the seconds that the other ranks then have to hear of
    it."""
    try:
        yield
    except BaseException as error:
        # Torch's own collectives raise RuntimeError where another rank is gone.
        caused = isinstance(error, RuntimeError) and not isinstance(error, RankFailure)
        failure = heartbeat.reason() if caused else heartbeat.failure
        if failure is None:
            heartbeat.report(str(error) or type(error).__name__, isinstance(error, UsageError))
        heartbeat.stop(farewell())
        if caused and failure is not None:
            raise RankFailure(f"rank {heartbeat.rank}: {failure.text}", failure.usage) from error
        raise


def _leave() -> None:
    """Ends the groups and their threads: one that outlives the interpreter can abort the process.
    A group lives as long as anything refers to it."""
    dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:  # its caches refer to meshes, and those to groups
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    gc.collect()


def _end_process(heartbeat: Heartbeat) -> None:
    failure = heartbeat.failure
    print(
        f"quaver train: error: rank {heartbeat.rank}: {failure.text}", file=sys.stderr, flush=True
    )
    os._exit(2 if failure.usage else 1)


def _agree(settings: list[dict]) -> None:
    """Raises UsageError naming the first setting in which a rank differs from rank 0."""
    try:
        compare("the ranks differ", settings)
    except ValueError as error:
        raise UsageError(str(error)) from None


class World:
    """The ranks of a run; alone without `init`. Its messages are not counted as traffic.

    Every `tensor` ranks that follow each other share one model by tensor parallelism and have the
    same data: of `tensor`, a Transport, or None where `tensor` is 1. Ranks at the same place in
    theirs share the data by `data_group` (None: all ranks), as `data_rank` of `data_size`.
    """

    def __init__(self, device: torch.device | str = "cpu", tensor: int = 1):
        self.transport = Transport()
        self.rank, self.size = self.transport.rank, self.transport.size
        self.device = torch.device(device)
        self.tensor, self.data_group = None, None
        self.data_rank, self.data_size = self.rank // tensor, self.size // tensor
        if tensor > 1:
            mesh = init_device_mesh(
                self.device.type, (self.data_size, tensor), mesh_dim_names=("dp", "tp")
            )
            self.data_group = mesh["dp"].get_group()
            self.tensor = Transport(mesh["tp"].get_group())

    def agree(self, settings: dict) -> None:
        """Raises UsageError naming the first of `settings`, JSON values, in which a rank differs
        from rank 0."""
        _agree(self.all_gather(settings))

    def all_gather(self, value) -> list:
        """The JSON values of all ranks."""
        return self.transport.all_gather_object(value, self.device)

    def first(self, action: Callable):
        """Runs action() on rank 0 alone; returns its result there, None elsewhere. An error there
        is raised on every rank."""
        with together(self.transport, self.device):
            return action() if self.rank == 0 else None

    def mean(self, value):
        """The mean over ranks of a number, or of every number in a dict, where an entry that a rank
        lacks counts as 0. Whole numbers stay whole."""
        rows = self.all_gather(value)
        return rows[0] if self.size == 1 else _mean(rows)


def _mean(rows: list):
    if any(isinstance(row, dict) for row in rows):
        rows = [row or {} for row in rows]
        keys = dict.fromkeys(key for row in rows for key in row)
        return {key: _mean([row.get(key, 0) for row in rows]) for key in keys}
    mean = sum(rows) / len(rows)
    return round(mean) if all(isinstance(row, int) for row in rows) else mean
