"""What the ranks that share a tensor must agree on. Of a DTensor every rank holds a part, but its
scale and amax belong to the whole: then the codes of all parts together are those that one process
would have, whatever the number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import ops
from ..comm.transport import Transport
from ..tensor import ScaledTensor, is_sharded, local

# One Transport for each group: it counts what is sent over it.
transport = functools.cache(Transport)


def transports(t: Tensor, only_sharded: bool = False) -> tuple[Transport, ...]:
    """Over which `t` is spread; `only_sharded` leaves out those that join replicas."""
    if not is_sharded(t):
        return ()
    mesh = t.device_mesh
    wanted = [mesh.size(i) > 1 for i in range(mesh.ndim)]
    if only_sharded:
        wanted = [w and not p.is_replicate() for w, p in zip(wanted, t.placements, strict=True)]
    return tuple(transport(mesh.get_group(i)) for i in range(mesh.ndim) if wanted[i])


def share_max_(values: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """The maximum of `values` (float32 [n], the same n everywhere) over all ranks that hold a part
    of one of `tensors`, in place. A value that is not finite on one rank is infinite on all."""
    values.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    for link in {link: None for t in tensors for link in transports(t)}:  # in order, each once
        values.copy_(link.max(values, "scale").wait())
    return values


def share_amaxes_(tensors: Iterable[Tensor]) -> None:
    """The amax of every sharded ScaledTensor becomes the whole tensor's, in one all-reduce."""
    tensors = [t for t in tensors if is_sharded(t)]
    amaxes = [local(t).amax for t in tensors if isinstance(local(t), ScaledTensor)]
    amaxes = [amax for amax in amaxes if amax is not None]
    if amaxes:
        torch._foreach_copy_(amaxes, list(share_max_(torch.stack(amaxes), tensors).unbind()))


def grad_norm(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`quaver.ops.grad_norm` of whole gradients, of which this rank may hold parts; the same bits
    on all ranks. The amaxes (float32 [n]) are of the parts, in no particular order."""
    spread: dict[tuple, list[Tensor]] = {}
    for g in grads:
        spread.setdefault(transports(g, only_sharded=True), []).append(local(g))
    squares, amaxes = [], []
    for links, parts in spread.items():
        norm, amax = ops.grad_norm(parts)
        square = norm.double().square()
        for link in links:
            square = link.all_gather(square, "scale").wait().sum()
        squares.append(square)
        amaxes.append(amax)
    return torch.stack(squares).sum().sqrt().float(), torch.cat(amaxes)


def like(t: Tensor, part: Tensor) -> Tensor:
    """`part`, this rank's rows of something with a row for each of t's, sharded as `t` is."""
    if not is_sharded(t):
        return part
    shape = torch.Size([t.shape[0], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, t.device_mesh, t.placements, run_check=False, shape=shape, stride=stride
    )
