"""Parameters of which each rank holds a part: which part, and what all ranks must agree on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..tensor import ScaledTensor
from . import sequence


@dataclass(frozen=True, eq=False)
class Shard:
    """Which part of a matrix a rank of `group` holds: of axis `dim`, a run of every one of `parts`
    (the lengths, summing to the whole, of what is fused along it: q, k and v, say)."""

    dim: int
    parts: tuple[int, ...]
    group: dist.ProcessGroup

    def __deepcopy__(self, memo) -> Shard:
        return self  # a copied model talks over the same group

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a plain tensor."""
        ranks, rank = sequence.size(self.group), dist.get_rank(self.group)
        runs = [part.chunk(ranks, self.dim)[rank] for part in whole.split(self.parts, self.dim)]
        return torch.cat(runs, self.dim)

    def join(self, mine: Tensor) -> Tensor:
        """The whole of a plain tensor, from every rank's part. All ranks must call it."""
        shards = sequence.stack(mine.detach(), self.group, "weight")
        lengths = [n // len(shards) for n in self.parts]
        runs = zip(*(shard.split(lengths, self.dim) for shard in shards), strict=True)
        return torch.cat([run for part in runs for run in part], self.dim)


def shard_of(parameter: Tensor) -> Shard | None:
    return parameter.__dict__.get("shard")


def take(whole: Tensor, shard: Shard) -> Tensor:
    """This rank's part of a plain or scaled tensor. Codes stay as they are, under the old scale."""
    if not isinstance(whole, ScaledTensor):
        return shard.take(whole.detach())
    if whole.granularity != "tensor":
        raise ValueError(f"tensor parallel: wanted one scale a tensor, got {whole!r}")
    codes = shard.take(whole.qdata)
    amax = sequence.largest(codes) * whole.scale
    return ScaledTensor(codes, whole.scale.clone(), amax, whole.dtype)


def join(mine: Tensor, shard: Shard) -> Tensor:
    """The whole, as decoded values: the scales of the parts differ."""
    return shard.join(mine.dequantize() if isinstance(mine, ScaledTensor) else mine)


def groups(parameters: Iterable[Tensor]) -> list[dist.ProcessGroup]:
    """The groups over which any of these are sharded."""
    found = {}
    for p in parameters:
        shard = shard_of(p)
        if shard is not None:
            found[id(shard.group)] = shard.group
    return list(found.values())


def grad_norm(parameters: Iterable[Tensor], kind: float) -> Tensor:
    """The norm (`kind`: 2 or inf) of the gradients of a model that is spread over a group: of all
    ranks' parts, and once of what they all hold. Float32 0-D, the same bits on every rank."""
    parameters = [p for p in parameters if p.grad is not None]
    found = groups(parameters)
    if len(found) != 1:
        raise ValueError(f"grad_norm: wanted parameters spread over one group, got {len(found)}")
    mine = []
    for spread in (True, False):
        grads = [p.grad for p in parameters if (shard_of(p) is not None) == spread]
        norm, amax = ops.grad_norm(grads or [parameters[0].new_zeros(1)])
        mine.append(norm if kind == 2.0 else amax.max())
    every = sequence.stack(torch.stack(mine), found[0], "scale")
    # What all hold is counted as the first rank has it, so that all get one result.
    norms = torch.cat((every[:, 0], every[:1, 1])).double()
    if kind != 2.0:
        return torch.where(norms.isfinite().all(), norms.max(), float("nan")).float()
    return norms.square().sum().sqrt().float()


def agree_to_skip(amax: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """`amax` of gradients (f32 [n]), made infinite where a gradient on a rank that holds another
    part of the model is not finite: all ranks skip the step or none."""
    for group in groups(parameters):
        bad = sequence.share_max((~amax.isfinite().all()).float(), group)
        amax = torch.where(bad > 0, float("inf"), amax)
    return amax
