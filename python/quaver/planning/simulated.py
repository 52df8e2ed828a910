"""Ranks that do not exist: one rank's part of a training, on torch's backend without messages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from .. import distributed
from ..assembly import shard
from ..comm.heartbeat import Heartbeat
from ..errors import UsageError
from ..nn import grouped
from ..parallel import Parallel
from ..recipe import Recipe

__all__ = ["HostValues", "mesh_of", "routed", "simulated", "single_sequences", "spread"]

_SCALAR = torch.ops.aten._local_scalar_dense.default


class HostValues(TorchDispatchMode):
    """Numbers that the host reads of fake tensors: 0, 1.0 or true. So a step is not skipped, what
    is due at its first step happens, and a bias correction is not zero."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not _SCALAR:
            return func(*args, **(kwargs or {}))
        kind = args[0].dtype
        return True if kind == torch.bool else 1.0 if kind.is_floating_point else 0


@contextmanager
def single_sequences() -> Iterator[None]:
    """Lets transformers' models take the rows of a plan for one sequence each, as they find from
    the positions' values of real rows. On tensors without values they would prepare for several,
    and every layer would save a mask of length x length, which real steps do not make."""
    masks = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if find is None:  # no transformers, or one that does not look for packed sequences
        yield
        return

    def none(*args, **kwargs) -> None:
        find(*args, **kwargs)  # its memory counts

    masks.find_packed_sequence_indices = none
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = find


@contextmanager
def routed() -> Iterator[None]:
    """Deals the rows of a plan out to FP8 experts evenly, where the host reads their counts. Those
    are values, which fake tensors lack: of zeros no expert would multiply at all."""
    real = grouped.read_ends

    def even(ends: torch.Tensor, rows: int) -> list[int]:
        real(ends, rows)  # its memory counts
        return [rows * (i + 1) // len(ends) for i in range(len(ends))]

    grouped.read_ends = even
    try:
        yield
    finally:
        grouped.read_ends = real


class _Silent(Heartbeat):
    """The heartbeat of ranks that cannot fail."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.failure, self._group = None, None

    def on_failure(self, callback) -> None:
        del callback

    def reason(self) -> None:
        return None

    def stop(self, farewell: float = 0.0) -> None:
        Heartbeat._of_process = None


@contextmanager
def simulated(parallel: Parallel, rank: int) -> Iterator[distributed.World]:
    """The World of one rank of a run that --parallel describes. UsageError where this process is a
    rank of another group."""
    if dist.is_initialized():
        raise UsageError("plan: this process has a process group; plan in one that has none")
    if parallel.ranks == 1:
        yield distributed.World()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.ranks)
    _Silent(rank, parallel.ranks).watch(dist.group.WORLD)
    try:
        yield distributed.World("cpu", parallel.tensor)
    finally:
        Heartbeat.of_process().stop()
        dist.destroy_process_group()


def mesh_of(world: distributed.World) -> DeviceMesh | None:
    """The mesh of all ranks of a World; None of one rank."""
    return None if world.size == 1 else init_device_mesh(world.device.type, (world.size,))


def spread(
    model: nn.Module,
    recipe: Recipe,
    parallel: Parallel,
    world: distributed.World,
    mesh: DeviceMesh | None,
) -> None:
    """Splits a converted model over the ranks as `quaver train` does. Raises UsageError."""
    try:
        if world.tensor is not None:
            distributed.parallelize(model, world.tensor, fp8_sum=recipe.fp8_sum)
        if parallel.kind == "fsdp" and world.size > 1:
            shard(model, recipe, mesh)
    except ValueError as error:
        raise UsageError(f"plan: parallel {parallel}: {error}") from None
