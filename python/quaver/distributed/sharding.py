"""Parameters of which each rank holds a part: which part, and what all ranks must agree on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..comm.transport import Transport
from ..tensor import ScaledTensor
from .tensor_parallel import sequence


@dataclass(frozen=True, eq=False)
class Shard:
    """Which part of a matrix a rank holds: of axis `dim`, a run of every one of `parts` (the
    lengths, summing to the whole, of what is fused along it: q, k and v, say)."""

    dim: int
    parts: tuple[int, ...]
    transport: Transport

    def __deepcopy__(self, memo) -> Shard:
        return self  # a copied model talks over the same group

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


def shard_of(parameter: Tensor) -> Shard | None:
    return parameter.__dict__.get("shard")


def take(whole: Tensor, shard: Shard) -> Tensor:
    """This rank's part of a plain or scaled tensor. Codes stay as they are, under the old scale."""
    if not isinstance(whole, ScaledTensor):
        return shard.take(whole.detach())
    if whole.qlayout.grain != "tensor":
        raise ValueError(f"tensor parallel: wanted one scale a tensor, got {whole!r}")
    codes = shard.take(whole.qdata)
    amax = sequence.largest(codes) * whole.scale
    return ScaledTensor(codes, whole.scale.clone(), amax, whole.dtype)


def join(mine: Tensor, shard: Shard) -> Tensor:
    """The whole, as decoded values: the scales of the parts differ."""
    return shard.join(mine.dequantize() if isinstance(mine, ScaledTensor) else mine)


def transports(parameters: Iterable[Tensor]) -> list[Transport]:
    """Of the groups over which any of these are spread."""
    found = {}
    for p in parameters:
        shard = shard_of(p)
        if shard is not None:
            found[id(shard.transport)] = shard.transport
    return list(found.values())


def grad_norm(
    parameters: Iterable[Tensor], kind: float = 2.0, of: Iterable[Tensor] | None = None
) -> Tensor:
    """The norm (`kind`: 2 or inf) of the gradients of `parameters`, float32 0-D. Where `of`, the
    parameters of the model (default: these), are spread over a group, it is that of all ranks'
    parts, and once of what they all hold, with the same bits on every rank; all must call.
    """
    parameters = [p for p in parameters if p.grad is not None]
    of = parameters if of is None else list(of)
    over = transports(of)
    if not over:
        return _local_norm(parameters, kind)
    if len(over) > 1:
        raise ValueError("grad_norm: the parameters are spread over several groups; wanted one")
    spread, replicated = ([p for p in parameters if (shard_of(p) is None) == b] for b in (0, 1))
    mine = [_local_norm(some, kind).to(of[0].device) for some in (spread, replicated)]
    every = over[0].all_gather(torch.stack(mine), "scale").wait()
    # What all hold is counted as the first rank has it, so that all get one result.
    norms = torch.cat((every[:, 0], every[:1, 1])).double()
    if kind != 2.0:
        return torch.where(norms.isfinite().all(), norms.max(), float("nan")).float()
    return norms.square().sum().sqrt().float()


def _local_norm(parameters: list[Tensor], kind: float) -> Tensor:
    if not parameters:
        return torch.zeros(())
    norm, amax = ops.grad_norm([p.grad for p in parameters])
    return norm if kind == 2.0 else amax.max()


def agree_to_skip(amax: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """`amax` of gradients (f32 [n]), made infinite where a gradient on a rank that holds another
    part of the model is not finite: all ranks skip the step or none."""
    parameters = list(parameters)
    if not transports(parameters):
        return amax
    bad = anywhere((~amax.isfinite().all()).float(), parameters)
    return torch.where(bad > 0, float("inf"), amax)


def anywhere(flag: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The largest `flag` (f32 0-D) of the ranks over which `parameters` are spread."""
    for transport in transports(parameters):
        flag = transport.max(flag, "scale").wait()
    return flag
