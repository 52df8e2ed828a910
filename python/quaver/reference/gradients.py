"""Sums of gradients: of micro-batches, of ranks, of squares."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .formats import encode, scale_from_amax, scale_max


def accumulate(
    q: Tensor, scale: Tensor, amax: Tensor, other: Tensor, other_scale: Tensor | None = None,
    other_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q + other in f32, re-encoded just in time (MS-AMP's add_to_fp8); bf16 has scale 1."""
    one = torch.ones(())
    total = q.float() * scale + other.float() * (one if other_scale is None else other_scale)
    seen = total.abs().amax() if total.numel() else torch.zeros(())
    if q.dtype == torch.bfloat16:
        new, codes = one, total.to(torch.bfloat16)
    else:
        new = scale_from_amax(seen, q.dtype, previous=scale)
        # By the reciprocal, which is exact but for a scale that was given and is no power of two.
        codes = encode(total * (one / new), q.dtype)
    finite = amax.isfinite() & (one if other_amax is None else other_amax).isfinite()
    return codes, new, torch.where(finite, seen, torch.nan)


ROUNDED_UP = 1.125  # rounding to FP8 raises a magnitude by less (all_reduce.h)


def shared_scale(
    amaxes: list[float], dtype: torch.dtype, mu: float | None = None
) -> tuple[Tensor, Tensor]:
    """The decode scales of every rank's values and of their sum (FP8-LM, equations 3 and 4).

    The first fits the largest amax; the second fits the sum of what rounding may have made of all
    of them. With mu both are the scale of mu * value over mu.
    """
    f32 = functools.partial(torch.tensor, dtype=torch.float32)
    if not all(math.isfinite(a) for a in amaxes):
        return f32(1.0), f32(1.0)
    top = torch.finfo(torch.float32).max
    if mu is not None:
        return (scale_from_amax((f32(max(amaxes)) / f32(mu)).nan_to_num(top, top, top), dtype),) * 2
    scale = scale_from_amax(f32(max(amaxes)), dtype)
    bound = f32(0.0)
    for a in amaxes:
        bound += torch.minimum(f32(a) * ROUNDED_UP, scale * scale_max(dtype))
    return scale, scale_from_amax(bound.clamp(max=top), dtype)


def two_shot(
    values: list[Tensor], dtype: torch.dtype, sum_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, decode scale and amax of the mean of all ranks' f32 tensors: every rank encodes once
    with the shared scale, the codes are summed in f32 in rank order, the sum is encoded once. The
    1/N is in the scale. `sum_dtype` f32 keeps the sum."""
    n = len(values)
    amaxes = [v.abs().amax().item() if v.numel() else 0.0 for v in values]
    scale, sum_scale = shared_scale(amaxes, dtype)
    total = torch.zeros_like(values[0])
    for v in values:
        total = total + encode(v / scale, dtype).float() * scale
    amax = (total.abs().amax() if total.numel() else torch.zeros(())) / n
    if sum_dtype == torch.float32:
        return total, torch.tensor(1 / n), amax
    return encode(total / sum_scale, dtype), sum_scale / n, amax


def ring_mean(values: list[Tensor], dtype: torch.dtype, mu: float) -> Tensor:
    """The mean (f64) by an FP8 ring that adds hop by hop, in FP8, as NCCL does: every hop rounds
    and saturates. mu = 1/N is pre-scaling, 1 post-scaling, between them FP8-LM's auto-scaling
    (section 2.1, equation 3). Chunk c of N starts at rank c + 1 and ends at its owner, rank c."""
    n = len(values)
    scale, _ = shared_scale([v.abs().amax().item() for v in values], dtype)
    codes = [encode(mu * v.flatten() / scale, dtype) for v in values]
    chunks = [c.tensor_split(n) for c in codes]
    reduced = []
    for c in range(n):
        total = chunks[(c + 1) % n][c].float()
        for hop in range(2, n + 1):
            total = encode(total + chunks[(c + hop) % n][c].float(), dtype).float()
        reduced.append(total)
    return (torch.cat(reduced).double() * scale / (mu * n)).reshape(values[0].shape)


def grad_norm(values: list[Tensor], scales: list[Tensor]) -> tuple[float, list[float]]:
    """The two-norm over all gradients in f64, and each one's amax."""
    decoded = [v.double() * s.double() for v, s in zip(values, scales, strict=True)]
    norm = math.sqrt(sum(g.square().sum().item() for g in decoded))
    return norm, [g.abs().max().item() if g.numel() else 0.0 for g in decoded]
