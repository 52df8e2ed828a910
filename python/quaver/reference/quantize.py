"""Casts of whole tensors."""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import E4M3, F16, encode, scale_from_amax, scale_max

HISTORY = 16
TILE = 128
FORECAST = 16.0  # how far too large a delayed scale may be


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    granularity: str = "tensor",
    block: int = 128,
    power_of_two: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale and amax: q = encode(x / scale), with an f32 division."""
    x = x.float()
    if granularity == "tensor":
        amax = x.abs().amax() if x.numel() else torch.zeros(())
    elif granularity == "tile":
        rows, cols = (-(-n // TILE) for n in x.shape)
        padded = F.pad(x, (0, cols * TILE - x.shape[1], 0, rows * TILE - x.shape[0]))
        amax = padded.reshape(rows, TILE, cols, TILE).abs().amax((1, 3))
    else:
        line = x if x.dim() else x[None]
        width = max(line.shape[-1], 1)
        width = min(block, width) if granularity == "block" else width
        count = 1 if granularity == "row" else -(-line.shape[-1] // width)
        padded = F.pad(line, (0, count * width - line.shape[-1]))
        amax = padded.reshape(*line.shape[:-1], count, width).abs().amax(-1)
    if scale is None:
        scale = scale_from_amax(amax, dtype, power_of_two)
    return encode(x / expand_scale(scale, x, granularity, block), dtype), scale, amax


def expand_scale(scale: Tensor, x: Tensor, granularity: str, block: int = 128) -> Tensor:
    """The scales, shaped to multiply x."""
    if granularity == "tile":
        scale = scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        return scale[: x.shape[0], : x.shape[1]]
    if granularity == "block":
        cols = x.shape[-1] if x.dim() else 1
        scale = scale.repeat_interleave(min(block, max(cols, 1)), -1)[..., :cols]
    return scale if x.dim() else scale.reshape(())


def dequantize(
    q: Tensor, scale: Tensor, dtype: torch.dtype, granularity: str = "tensor", block: int = 128
) -> Tensor:
    """scale * q in f32, then rounded to `dtype`; f16 saturates, as every encoding does."""
    value = q.float() * expand_scale(scale, q, granularity, block)
    return encode(value, F16) if dtype == F16 else value.to(dtype)


def cast_transpose(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, its transpose, scale and amax."""
    q, scale, amax = quantize(x, dtype, scale, power_of_two=power_of_two)
    return q, q.t().contiguous(), scale, amax


def cast_layouts(
    x: Tensor, dtype: torch.dtype, granularity: str, power_of_two: bool = False,
    tiles_t: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, scale, qt and qt_scale: quantize of x and of its transpose, padded with zeros to multiples
    of 16 in both axes. A scale whose values are not all finite is NaN. `tiles_t`: qt has tiles."""

    def layout(y, grain):
        y = F.pad(y.float(), (0, -y.shape[1] % 16, 0, -y.shape[0] % 16))
        q, scale, amax = quantize(y, dtype, None, grain, TILE, power_of_two)
        return q, torch.where(amax.isfinite(), scale, torch.nan)

    grain_t = "tile" if tiles_t else granularity
    return *layout(x, granularity), *layout(x.t().contiguous(), grain_t)


class DelayedScale:
    """Delayed scaling (FP8-LM's reference, MS-AMP): just in time for the first 16 casts, then from
    the maximum of the last 16 amaxes.

    A cast that would saturate, or whose amax is more than 16 times below what its scale is for, is
    made again just in time, and an amax enters the history as at most 16 times the history's
    maximum. A non-finite amax empties the history."""

    def __init__(self, dtype: torch.dtype, power_of_two: bool = True):
        self.dtype, self.power_of_two = dtype, power_of_two
        self.history: deque[float] = deque(maxlen=HISTORY)

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        most = max(self.history, default=0.0)
        q, scale, amax = quantize(x, self.dtype, power_of_two=self.power_of_two)
        if len(self.history) == HISTORY and most > 0:
            forecast = scale_from_amax(torch.tensor(most), self.dtype, self.power_of_two)
            foreseen = forecast * scale_max(self.dtype)
            near = foreseen / FORECAST <= amax <= foreseen
            if near or amax == 0 or not amax.isfinite():
                q, scale, amax = quantize(x, self.dtype, forecast)
        if amax.isfinite():
            self.history.append(min(amax.item(), FORECAST * most) if most else amax.item())
        else:
            self.history.clear()
        return q, scale, amax


def pad_for_gemm(q: Tensor) -> Tensor:
    """Zero codes up to multiples of 16 in both axes."""
    rows, cols = q.shape
    return F.pad(q.view(torch.uint8), (0, -cols % 16, 0, -rows % 16)).view(q.dtype)


def cast_for_gemm(
    y: Tensor, dtype: torch.dtype, scale: Tensor | None = None, power_of_two: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cast_transpose, padded."""
    q, scale, amax = quantize(y, dtype, scale, power_of_two=power_of_two)
    q = pad_for_gemm(q)
    return q, q.t().contiguous(), scale, amax


def save_groups(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes and power-of-two scales as one byte each (OCP MX's e8m0)."""
    q, scale, _ = quantize(x, E4M3, granularity="block", block=block)
    return q, scale.to(torch.float8_e8m0fnu).view(torch.uint8)


def load_groups(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    scale = scale.view(torch.float8_e8m0fnu).float()
    return codes.float() * expand_scale(scale, codes, "block", block)
