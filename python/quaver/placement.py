"""The ranks that hold the parts of a tensor, and the values on which they must agree.

A parameter is whole on every rank, or a DTensor (FSDP2), or has a `Shard` (tensor parallelism), and
ZeRO gives it an `Owner`. Optimizers, clipping and checkpoints depend on ranks through this alone.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import ops
from .comm.transport import Transport
from .tensor import ScaledTensor, any_sharded, is_sharded, local

_transport_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # must not keep groups alive

_reducers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # see set_reducer


def transport(group: dist.ProcessGroup) -> Transport:
    """The one Transport of a group: it counts what is sent over it."""
    if group not in _transport_of:
        _transport_of[group] = Transport(group)
    return _transport_of[group]


@dataclass(frozen=True, eq=False)
class Shard:
    """The slice of a matrix that a rank holds along axis `dim`. `parts` are the lengths of the
    matrices that are fused along it (q, k and v, say); the rank holds an equal run of each."""

    dim: int
    parts: tuple[int, ...]
    transport: Transport

    def __deepcopy__(self, memo) -> Shard:
        return self  # a copied model uses the same group

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a plain tensor."""
        ranks, rank = self.transport.size, self.transport.rank
        runs = [part.chunk(ranks, self.dim)[rank] for part in whole.split(self.parts, self.dim)]
        return torch.cat(runs, self.dim)

    def join(self, mine: Tensor) -> Tensor:
        """The whole of a plain tensor, from every rank's part. All ranks must call it."""
        shards = self.transport.all_gather(mine.detach(), "weight").wait()
        lengths = [n // len(shards) for n in self.parts]
        runs = zip(*(shard.split(lengths, self.dim) for shard in shards), strict=True)
        return torch.cat([run for part in runs for run in part], self.dim)


@dataclass(frozen=True, eq=False)
class Owner:
    """The `rank` of a group that keeps a whole parameter's state, and under ZeRO's second stage
    alone has its gradient."""

    rank: int
    transport: Transport

    def __deepcopy__(self, memo) -> Owner:
        return self


def shard_of(parameter: Tensor) -> Shard | None:
    return parameter.__dict__.get("shard")


def owner_of(parameter: Tensor) -> Owner | None:
    return parameter.__dict__.get("owner")


def set_reducer(parameter: Tensor, reducer: object | None) -> None:
    """Records the DataParallel that replaces the gradient by the mean over ranks, or that none
    does. The record keeps nothing alive."""
    if reducer is None:
        _reducers.pop(parameter, None)
    else:
        _reducers[parameter] = weakref.ref(reducer)


def reducer_of(parameter: Tensor):
    """The DataParallel of `set_reducer`, or None."""
    found = _reducers.get(parameter)
    return None if found is None else found()


def mesh_transports(t: Tensor, only_sharded: bool = False) -> tuple[Transport, ...]:
    """The groups of a DTensor's mesh; `only_sharded` leaves out those that join replicas."""
    if not is_sharded(t):
        return ()
    mesh = t.device_mesh
    wanted = [mesh.size(i) > 1 for i in range(mesh.ndim)]
    if only_sharded:
        wanted = [w and not p.is_replicate() for w, p in zip(wanted, t.placements, strict=True)]
    return tuple(transport(mesh.get_group(i)) for i in range(mesh.ndim) if wanted[i])


def _transports(t: Tensor, only_sharded: bool = False) -> tuple[Transport, ...]:
    """The groups whose ranks hold parts of `t`, or all of it but not its gradient."""
    places = [place for place in (shard_of(t), owner_of(t)) if place is not None]
    return mesh_transports(t, only_sharded) + tuple(place.transport for place in places)


def max_(values: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """The maximum of `values` (float32 [n], the same n everywhere) over all ranks that hold a part
    of one of `tensors`, in place. A value that is not finite on one rank is infinite on all."""
    values.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    for group in {group: None for t in tensors for group in _transports(t)}:  # in order, each once
        values.copy_(group.max(values, "scale").wait())
    return values


def agree(amaxes: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The amaxes that decide whether a step is skipped, alike on all ranks that hold a part of the
    model.

    `amaxes` (f32 [n]) are those of this rank's gradients. A DTensor's becomes the whole gradient's;
    all become infinite where a rank with other shards has a gradient that is not finite. Owners
    are left to ZeRO's optimizer: a rank that has nothing to step must take part too.
    """
    parameters = list(parameters)
    if any_sharded(parameters):
        return max_(amaxes, parameters)
    for group in {s.transport: None for p in parameters if (s := shard_of(p)) is not None}:
        bad = group.max((~amaxes.isfinite().all()).float(), "scale").wait()
        amaxes = torch.where(bad > 0, torch.inf, amaxes)
    return amaxes


def whole_amaxes_(tensors: Iterable[Tensor]) -> None:
    """The amax of every ScaledTensor among DTensors becomes the whole tensor's, by one message."""
    tensors = [t for t in tensors if is_sharded(t)]
    amaxes = [local(t).amax for t in tensors if isinstance(local(t), ScaledTensor)]
    amaxes = [amax for amax in amaxes if amax is not None]
    if amaxes:
        torch._foreach_copy_(amaxes, list(max_(torch.stack(amaxes), tensors).unbind()))


def grad_norm(parameters: Iterable[Tensor], kind: float = 2.0) -> Tensor:
    """The norm (`kind`: 2 or inf) of the gradients of the whole model, float32 0-D, with the same
    bits on every rank. NaN or infinite where a gradient is. Collective where `parameters`, which
    are the model's, with or without a gradient here, are spread over ranks.

    What ranks of a tensor-parallel group all hold is counted once, as the first of them has it.
    """
    parameters = list(parameters)
    spread = list({s.transport: None for p in parameters if (s := shard_of(p)) is not None})
    if len(spread) > 1:
        raise ValueError("grad_norm: the parameters are spread over several groups; wanted one")
    groups: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        whole, over = shard_of(p) is None, _transports(p, only_sharded=True)
        owner, mine = owner_of(p), groups.setdefault((whole, over), [])
        if p.grad is not None and (owner is None or owner.rank == owner.transport.rank):
            mine.append(local(p.grad))
    if list(groups) == [(True, ())]:
        return _local_norm(groups[True, ()], kind)
    total = torch.sum if kind == 2.0 else torch.amax
    values = []
    for (whole, over), grads in groups.items():
        value = _local_norm(grads, kind).to(parameters[0].device).double()
        value = value.square() if kind == 2.0 else value
        for group in over:
            value = total(group.all_gather(value, "scale").wait())
        for group in spread if whole else ():
            value = group.all_gather(value, "scale").wait()[0]
        values.append(value)
    result = total(torch.stack(values))
    return (result.sqrt() if kind == 2.0 else result).float()


def _local_norm(grads: list[Tensor], kind: float) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float32)
    norm, amax = ops.grad_norm(grads)
    return norm if kind == 2.0 else amax.amax()


def like(t: Tensor, part: Tensor) -> Tensor:
    """Makes `part`, which has one row for each of this rank's rows of `t`, a DTensor sharded as `t`
    is; returns `part` itself where `t` is not sharded."""
    if not is_sharded(t):
        return part
    from torch.distributed.tensor import (
        DTensor,  # half a second, and imported already where t is a DTensor
    )

    shape = torch.Size([t.shape[0], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, t.device_mesh, t.placements, run_check=False, shape=shape, stride=stride
    )


def first_element(t: Tensor) -> int:
    """The flat index, in the whole of `t`, of the first element of this rank's rows; 0 of a tensor
    that is not sharded by rows. Stochastic rounding draws by it."""
    if not is_sharded(t) or t.dim() == 0:
        return 0
    first, rows = 0, t.shape[0]
    for i, place in enumerate(t.placements):
        if place.is_shard(0):  # as torch.chunk cuts
            chunk = -(-rows // t.device_mesh.size(i))
            begin = min(chunk * t.device_mesh.get_local_rank(i), rows)
            first, rows = first + begin, min(chunk, rows - begin)
    return first * math.prod(t.shape[1:])
