"""Sequence shards: gather them, or sum partial results into them, over a tensor-parallel group.

The sequence is the last axis but one; rank r holds the r-th of equal runs of it. Codes and values
are sent as bytes, and sums are taken in f32 in rank order, so that every rank and every backend
gets the same bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import traffic

_ops = torch.ops.quaver
# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def size(group: dist.ProcessGroup) -> int:
    return dist.get_world_size(group)


def stack(x: Tensor, group: dist.ProcessGroup, kind: str) -> Tensor:
    """Every rank's x, [ranks, *x.shape]; all have one shape and dtype."""
    x = x.contiguous()
    sent = x.reshape(-1).view(torch.uint8)
    received = sent.new_empty(size(group) * sent.numel())
    if sent.numel():
        _all_gather(received, sent, group=group)
        traffic.count(kind, sent.numel() * (size(group) - 1))
    return received.view(x.dtype).reshape(-1, *x.shape)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sequence [..., S, C] of shards x [..., S / ranks, C]."""
    shards = stack(x, group, "activation")
    return _bytes(shards).movedim(0, -3).flatten(-3, -2).view(x.dtype)


def own(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's shard of the sequence x."""
    return _runs(x, group)[dist.get_rank(group)].contiguous()


def sum_scatter(
    x: Tensor, group: dist.ProcessGroup, wire: torch.dtype | None, out: torch.dtype
) -> Tensor:
    """This rank's shard [..., S / ranks, C] of the sum over ranks of x [..., S, C], in dtype `out`.

    An all-to-all and a sum in f32 in rank order. `wire`: an FP8 format that x travels in, with one
    scale on all ranks (FP8-LM, arXiv 2310.18313, section 2.3), or None for x's own dtype.
    """
    runs = _runs(x, group).contiguous()
    if wire is not None:
        runs, scale = shared_cast(runs, wire, None, group)
    received = torch.empty_like(runs)
    if runs.numel():
        dist.all_to_all_single(_bytes(received), _bytes(runs), group=group)
        traffic.count("activation", runs.nbytes // size(group) * (size(group) - 1))
    total = received[0].float()
    for part in received[1:]:
        total += part.float()
    if wire is not None:
        total *= scale
    return total.to(out)


def shared_amax(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The largest magnitude on any rank, f32 0-D; infinite where any rank holds a NaN."""
    amax = largest(x).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return share_max(amax, group)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude here, f32 0-D; 0 of an empty tensor."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    return torch.linalg.vector_norm(x, float("inf")).float()


def share_max(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The maximum over ranks, in place. NaNs must be gone: backends drop them."""
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    traffic.count("scale", 2 * x.nbytes * (size(group) - 1) // size(group))
    return x


def shared_cast(
    x: Tensor, dtype: torch.dtype, history: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """FP8 codes of x, and the decode scale, from the amax of all ranks: what one process would
    choose for the whole tensor. The scale is NaN where a value on any rank is not finite."""
    amax = shared_amax(x, group)
    # The op that chooses scales and keeps histories, asked about the largest value alone.
    _, scale, _ = _quantize(amax.reshape(1), dtype, None, history)
    codes, _, _ = _quantize(x, dtype, scale, None)
    return codes, scale + (amax - amax)


def _quantize(x, dtype, scale, history):
    return _ops.quantize(x, dtype, scale, history, "tensor", 128, True, False, 0)


def _bytes(x: Tensor) -> Tensor:
    """A view that gloo sends and torch copies, whatever the dtype."""
    return x.view(torch.uint8) if x.dtype in FP8 else x


def _runs(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ..., S / ranks, C], a view."""
    ranks = size(group)
    if x.dim() < 2 or x.shape[-2] % ranks:
        raise ValueError(
            f"tensor parallel: the sequence (the last axis but one of {list(x.shape)}) must be "
            f"divisible by the {ranks} ranks"
        )
    return x.unflatten(-2, (ranks, x.shape[-2] // ranks)).movedim(-3, 0)
