"""Rotary positions (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(parts, cos: Tensor, sin: Tensor, turned: int, inverse: bool = False) -> Tensor:
    """See ops.rotate."""
    x = torch.cat(list(parts), dim=2)
    first = x[:, :, :turned].float()
    half = first.shape[-1] // 2
    swapped = torch.cat((first[..., half:], first[..., :half]), dim=-1)
    sign = -1.0 if inverse else 1.0
    y = first * cos[:, None] + sign * (swapped * sin[:, None])
    return torch.cat((y.to(x.dtype), x[:, :, turned:]), dim=2)
