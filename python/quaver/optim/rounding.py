"""Storing a float32 result in a parameter of 16 bits, in torch's ops: what `ops.adam_` does inside
for the moments that it fuses."""

from __future__ import annotations

import torch
from torch import Tensor


def store_(p: Tensor, new: Tensor, how: str, remainder: Tensor | None, seed: int,
           step: Tensor) -> None:  # fmt: skip
    """Writes `new` (float32, of p's shape) to p, rounded to nearest, "stochastic"ally by the noise
    of (seed, step, element), or with its low bits in `remainder` (int16, or int8 of 24 bits).

    `step` (int64, 0-D) counts the steps taken before. bfloat16 and float32 parameters have the bits
    that `ops.adam_` would give them; float16 rounds to nearest.
    """
    if remainder is not None:
        bits = new.contiguous().view(torch.int32)
        if remainder.dtype == torch.int8:
            bits = (bits + 0x7F + (bits >> 8 & 1)) & -0x100  # to nearest even
        p.copy_(((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16))
        remainder.copy_((bits >> _shift(remainder)).to(remainder.dtype))
    elif how == "stochastic" and p.dtype == torch.bfloat16:
        bits = new.contiguous().view(torch.int32)
        up = (bits + _noise(bits, seed, step)) >> 16
        rounded = up.to(torch.int16).view(torch.bfloat16)
        p.copy_(torch.where(new.isfinite(), rounded, new.bfloat16()))
    else:
        p.copy_(new)


def master(p: Tensor, remainder: Tensor | None) -> Tensor:
    """The float32 values that p and its remainder stand for."""
    if remainder is None:
        return p.float()
    low = remainder.to(torch.int32) << _shift(remainder)
    return ((p.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def _shift(remainder: Tensor) -> int:
    return 0 if remainder.dtype == torch.int16 else 8


def _noise(like: Tensor, seed: int, step: Tensor) -> Tensor:
    """The upper 16 bits of dither.h's weight_noise for each element, int32. int32 products wrap as
    uint32's do."""
    key = _mixed(seed + _mixed(seed >> 32))
    index = torch.arange(like.numel(), device=like.device)
    start = _mix((index & 0xFFFFFFFF).to(torch.int32) ^ key)
    start = start + (index >> 32).to(torch.int32) * _int32(0xC13FA9A9)
    noise = start + step.to(torch.int32) * _int32(0x9E3779B9)
    return ((noise >> 16) & 0xFFFF).view(like.shape)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16 & 0xFFFF)) * _int32(0x85EBCA6B)
    x = (x ^ (x >> 13 & 0x7FFFF)) * _int32(0xC2B2AE35)
    return x ^ (x >> 16 & 0xFFFF)


def _mixed(x: int) -> int:
    return _mix(torch.tensor(_int32(x), dtype=torch.int32)).item()


def _int32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (x >> 31 << 32)
