"""Norms and activations, with the sums that have a fixed order."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _tree(lanes: Tensor, axis: int) -> Tensor:
    """Adds the upper half to the lower one until one is left."""
    while lanes.shape[axis] > 1:
        low, high = lanes.chunk(2, axis)
        lanes = low + high
    return lanes.squeeze(axis)


def _in_order(parts: Tensor, axis: int) -> Tensor:
    return functools.reduce(torch.add, parts.unbind(axis), torch.zeros_like(parts.select(axis, 0)))


def row_sum(x: Tensor) -> Tensor:
    """f32 sums over rows in the order of normalize.h: 512 lanes, then a tree."""
    rows, cols = x.shape
    turns = max(1, -(-cols // 512))
    turns = F.pad(x, (0, turns * 512 - cols)).reshape(rows, turns, 512)
    return _tree(_in_order(turns, 1), 1)[:, None]


def column_sum(x: Tensor) -> Tensor:
    """f32 sums over columns in the order of normalize.h: pieces of 64 rows, 16 strands, a tree."""
    rows, cols = x.shape
    turns = max(1, -(-rows // 1024))
    pieces = F.pad(x, (0, 0, 0, turns * 1024 - rows)).reshape(turns, 16, 64, cols)
    return _tree(_in_order(_in_order(pieces, 2), 0), 0)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd of RMSNorm or LayerNorm in f32, to the bit."""
    x, count = x.float(), max(x.shape[1], 1)
    mean = row_sum(x) / count if centered else torch.zeros(x.shape[0], 1)
    square = row_sum((x - mean).square()) / count + torch.tensor(eps)
    root = square.double().sqrt().float()  # correctly rounded, as torch's f32 sqrt is not always
    rstd = torch.where(square.isfinite(), 1 / root, torch.nan)
    y = (x - mean) * rstd
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()), mean[:, 0], rstd[:, 0]


def normalize_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias in f32, to the bit; x is the decoded copy."""
    dy, rstd, count = dy.float(), rstd[:, None], max(dy.shape[1], 1)
    xhat = (x - mean[:, None]) * rstd
    g = dy if weight is None else dy * weight.float()
    mean_g = row_sum(g) / count if centered else torch.zeros(())
    dx = (g - mean_g - xhat * (row_sum(g * xhat) / count)) * rstd
    return dx, column_sum(dy * xhat), column_sum(dy)


def activation(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x) in f64 (arXiv 1702.03118 and 1606.08415)."""
    x = x.double()
    if kind == "gelu":
        gate = torch.special.erfc(-x / math.sqrt(2)) / 2
        slope = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    else:
        k = 2 * math.sqrt(2 / math.pi)
        u, du = (
            (x, 1) if kind == "silu" else (k * (x + 0.044715 * x**3), k * (1 + 0.134145 * x * x))
        )
        gate = torch.sigmoid(u)
        slope = gate * torch.sigmoid(-u) * du
    return x * gate, gate + x * slope


def activate(x: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """f(x) * up in f64."""
    y = activation(x, kind)[0]
    return y if up is None else y * up.double()


def activate_backward(
    dy: Tensor, x: Tensor, up: Tensor | None, kind: str, channel_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx and dup in f64."""
    f, slope = activation(x, kind)
    g = dy.double() if channel_scale is None else dy.double() * channel_scale.double()
    return g * slope * (1 if up is None else up.double()), g * f
