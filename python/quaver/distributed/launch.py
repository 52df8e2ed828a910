"""Processes that torchrun started: the group, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..comm.together import together
from ..comm.transport import Transport
from ..errors import UsageError

__all__ = ["World", "init"]


def init(device: str = "cpu", timeout: float = 60.0, message_timeout: float = 1800.0) -> None:
    """torch.distributed.init_process_group from torchrun's environment: gloo for "cpu", nccl for
    "cuda", whose device becomes LOCAL_RANK's.

    Args:
        timeout: seconds that the store has to answer.
        message_timeout: seconds after which a message that does not arrive is an error.

    Raises:
        UsageError: not started by torchrun, or a store that does not answer: with its address.
    """
    missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if n not in os.environ]  # fmt: skip
    if missing:
        raise UsageError(f"{', '.join(missing)} not set: start the ranks with torchrun")
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"the store at {address} (MASTER_ADDR, MASTER_PORT) did not answer within {timeout:g} "
            f"s: {reason}"
        ) from None
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=message_timeout),
    )


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

    def share(self, value) -> list:
        """The JSON values of all ranks."""
        return self.transport.share(value, self.device)

    def first(self, action: Callable):
        """Runs action() on rank 0 alone and returns what it does there, None elsewhere. An error
        there is one on every rank."""
        with together(self.transport, self.device):
            return action() if self.rank == 0 else None

    def mean(self, value):
        """The mean over ranks of a number, or of every number in a dict; whole numbers stay so."""
        rows = self.share(value)
        return rows[0] if self.size == 1 else _mean(rows)


def _mean(rows: list):
    if isinstance(rows[0], dict):
        return {key: _mean([row[key] for row in rows]) for key in rows[0]}
    mean = sum(rows) / len(rows)
    return round(mean) if all(isinstance(row, int) for row in rows) else mean
