"""Optimizer states as codes in groups."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementary import exp2_coarse, fma, log2_coarse
from .formats import encode, magnitudes, scale_from_amax, scale_max

GROUP = 128  # flat elements that share a scale
LIFT = 2.0**64  # of groups below 2^-64, so that their logarithms meet normal numbers


def _groups(x: Tensor) -> Tensor:
    flat = x.detach().float().flatten()
    return F.pad(flat, (0, -len(flat) % GROUP)).reshape(-1, GROUP)


def _power(scale: Tensor) -> Tensor:
    """k of expanded groups: sixteenths in the low byte of the scale's bits."""
    return ((scale.view(torch.int32) & 255).clamp(min=16) / 16).float()


def expanded_scale(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each group [n, 128]: the smallest f32 whose low byte is 16 k and that is not
    below the largest magnitude; k = log2(finite_max^2 / 2) / log2(largest / smallest that is not
    zero), rounded down to sixteenths, from 1 to 255/16; 1 where the largest is subnormal."""
    top = torch.finfo(torch.float32).max
    a = groups.abs().nan_to_num(0.0, posinf=top)
    most, least = a.amax(1), torch.where(a > 0, a, top).amin(1)
    lift = torch.where(most < 2.0**-64, LIFT, 1.0)
    ratio = log2_coarse(most * lift) - log2_coarse(least * lift)
    log2_max = torch.tensor(math.log2(scale_max(dtype)), dtype=torch.float32)
    wanted = (2 * log2_max - 1) * 16 / ratio
    power = torch.where((ratio > 0) & (wanted < 255), wanted.clamp(max=255), 255.0)
    power = torch.where(most < 2.0**-126, 16.0, power).clamp(min=16).int()
    seen = most.view(torch.int32)
    bits = seen & ~255 | power
    bits = torch.where(bits < seen, bits + 256, bits)
    return torch.where(bits < 0x7F800000, bits, bits - 256).view(torch.float32)


def expand(groups: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """sign(x) * finite_max * (|x| / scale)^k, which is then rounded (COAT, arXiv 2410.19313)."""
    power, lift = _power(scale), torch.where(scale < 2.0**-64, LIFT, 1.0)
    log2_max = torch.tensor(math.log2(scale_max(dtype)), dtype=torch.float32)
    offset = log2_max - power * log2_coarse(scale * lift)
    x = groups.abs().nan_to_num(posinf=torch.finfo(torch.float32).max) * lift[:, None]
    usable = torch.where(x >= 2.0**-126, x, 1.0)
    exponent = fma(log2_coarse(usable), power[:, None], offset[:, None])
    y = exp2_coarse(torch.where(x >= 2.0**-126, exponent, -40.0).clamp(min=-40))
    return torch.where(groups.isnan(), groups, y.copysign(groups))


def to_format(x: Tensor, dtype: torch.dtype, expanded: bool) -> tuple[Tensor, Tensor]:
    """The values that are rounded to codes, shaped like x, and the scale of each group."""
    groups = _groups(x)
    if expanded:
        scale = expanded_scale(groups, dtype)
        y = expand(groups, scale, dtype)
    else:
        amax = groups.abs().nan_to_num(0.0, posinf=torch.finfo(torch.float32).max).amax(1)
        scale = scale_from_amax(amax, dtype, power_of_two=False)
        y = groups / scale[:, None]
    return y.flatten()[: x.numel()].reshape(x.shape), scale


def keep_nonzero(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """y, of x in the format's domain, at least the smallest subnormal where x is not zero: a second
    moment that vanished would leave m / eps for a step."""
    least = y.abs().clamp(min=magnitudes(dtype)[1].item()).copysign(y)
    return torch.where(x == 0, y, least)


def encode_state(x: Tensor, dtype: torch.dtype, expanded: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups of 128 flat elements; see ops.encode_state."""
    y, scale = to_format(x, dtype, expanded)
    return encode(keep_nonzero(y, x, dtype), dtype), scale


def decode_state(q: Tensor, scale: Tensor, expanded: bool) -> Tensor:
    """The values of `encode_state`'s codes, f32."""
    groups = _groups(q)
    if expanded:
        a = groups.abs()
        finite = (a > 0) & a.isfinite()
        top = torch.tensor(scale_max(q.dtype), dtype=torch.float32)
        log2 = log2_coarse(torch.where(finite, a, 1.0)) - log2_coarse(top)
        value = exp2_coarse(log2 * (1 / _power(scale))[:, None])
        groups = torch.where(finite, value, torch.where(a == 0, a, torch.nan)).copysign(groups)
    return (groups * scale[:, None]).flatten()[: q.numel()].reshape(q.shape)
