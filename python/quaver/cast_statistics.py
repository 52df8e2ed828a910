"""Statistics of tensors that are cast to FP8: what a cast loses, and what makes it lose more."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .nn.cast import matrix
from .ops import quantize
from .tensor import ScaledTensor

STATISTICS = ("amax", "amax_jump", "saturated", "flushed", "kurtosis")
MEASURED = ("amax", "saturated", "flushed", "kurtosis")  # of a tensor; a jump is of two


def measured(x: Tensor, dtype: torch.dtype, history: Tensor | None = None, grain: str = "tensor",
             power_of_two: bool = True) -> Tensor:  # fmt: skip
    """amax, saturated, flushed and kurtosis (float32 [4]; see `watch`) of x, as codes or before its
    cast to `dtype`, under the delayed scaling of `history` if there is one, or just in time with
    scales of a `grain`."""
    coded = isinstance(x, ScaledTensor)
    values = (x.dequantize(torch.float32) if coded else x.float()).abs()
    amax = values.amax() if values.numel() else values.new_zeros(())
    if coded:
        codes = x.qdata.float().abs()
        # A block's scale, just in time, fits: its largest value may have the largest code.
        forecast = x.qlayout.grain == "tensor"
        beyond = (codes == torch.finfo(x.qdata.dtype).max) & forecast
        lost, of = codes == 0, torch.ones_like(codes)
    elif grain != "tensor":
        q = quantize(matrix(x), dtype, granularity=grain, power_of_two=power_of_two)
        beyond = torch.zeros_like(values, dtype=torch.bool)  # a scale just in time fits
        lost, of = (q.qdata.view(x.shape).float() == 0) & (values > 0), values > 0
    else:
        kept = None if history is None else history.clone()
        q = quantize(x, dtype, history=kept)
        beyond = values > torch.finfo(dtype).max * q.scale
        lost, of = (q.qdata.float() == 0) & (values > 0), values > 0
    count = max(1, values.numel())
    squares = (values / amax.clamp(min=torch.finfo(torch.float32).tiny)).square()
    kurtosis = squares.square().mean() / squares.mean().square()
    return torch.stack((
        amax, beyond.sum() / count, lost.sum() / of.sum().clamp(min=1),
        torch.where(amax > 0, kurtosis, 0.0),
    ))  # fmt: skip


@torch.no_grad()
def measured_groups(x: Tensor, ends: list[int], dtype: torch.dtype, **scales) -> Tensor:
    """`measured` of the rows ends[i] to ends[i + 1] of x, each with scales of its own: the largest
    amax, and of the others the mean over all rows."""
    x, total = x.detach(), None
    for begin, end in itertools.pairwise(ends):
        if end > begin:
            found = measured(x[begin:end], dtype, **scales)
            found = torch.cat((found[:1], found[1:] * (end - begin)))
            total = found if total is None else torch.cat((
                torch.maximum(total[:1], found[:1]), total[1:] + found[1:]
            ))  # fmt: skip
    if total is None:
        return torch.zeros(len(MEASURED), device=x.device)
    return torch.cat((total[:1], total[1:] / max(1, ends[-1])))
