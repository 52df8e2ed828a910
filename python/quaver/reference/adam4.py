"""AdamW with moments of 4 bits (arXiv 2309.01507, algorithm 1) in float32, bit for bit."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FLAT_BLOCK = 128
_MAGNITUDES = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
DYNAMIC4 = torch.tensor([*(-x for x in reversed(_MAGNITUDES)), 0.0, *_MAGNITUDES, 1.0])
LINEAR4 = torch.arange(1, 17) / 16


def unpack(codes: Tensor, numel: int) -> Tensor:
    """The codes of flat elements, two of a byte."""
    return torch.stack([codes & 15, codes >> 4], 1).flatten()[:numel].long()


def pack(codes: Tensor) -> Tensor:
    """Bytes of two codes, the first in the low bits."""
    even = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.numel() % 2))
    return even[::2] | even[1::2] << 4


def encode(y: Tensor, levels: Tensor) -> Tensor:
    """The code of the nearest level, by the midpoints; a tie goes to the larger."""
    middle = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(y, middle, right=True)


def block_scales(x: Tensor) -> Tensor:
    """The largest magnitude of each 128 flat elements."""
    padded = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % FLAT_BLOCK))
    return _finite(padded.view(-1, FLAT_BLOCK).abs().amax(1) if x.numel() else padded)


def rank1_scales(x: Tensor) -> Tensor:
    """The maxima of the slices along each axis, those of axis 0 first."""
    axes = range(x.dim())
    return _finite(torch.cat([x.abs().amax([a for a in axes if a != axis]) for axis in axes]))


def _finite(x: Tensor) -> Tensor:
    return x.clamp_max(torch.finfo(torch.float32).max)


def spread(scales: Tensor, shape: torch.Size, second: str) -> Tensor:
    """The scale of each flat element of a tensor; of a factored moment its value."""
    if second == "linear4":
        return scales.repeat_interleave(FLAT_BLOCK)[: shape.numel()]
    if second == "factor":
        rows = shape.numel() // shape[-1]
        row, col = scales[:rows].view(*shape[:-1], 1), scales[rows:]
        return (row * col.view(*shape[:-2], 1, shape[-1])).flatten()
    result = torch.full(shape, torch.inf)
    for axis, part in enumerate(scales.split(list(shape))):
        result = torch.minimum(result, part.view(-1, *[1] * (len(shape) - 1 - axis)))
    return result.flatten()


def over_scale(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, x / torch.where(scale > 0, scale, 1), 0)


def adamw_4bit(
    w: Tensor, state: dict[str, Tensor], g: Tensor, t: int, lr, beta1, beta2, eps, weight_decay,
    second: str,
) -> Tensor:  # fmt: skip
    """Step t (from 1): writes `state` (exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, as
    ops.adam_4bit_ has them) and returns the new weight, float32."""
    f32 = functools.partial(torch.tensor, dtype=torch.float32)
    shape, n = w.shape, w.numel()
    w, g = w.float().flatten(), g.float().flatten()
    m = DYNAMIC4[unpack(state["exp_avg"], n)] * spread(state["exp_avg_scale"], shape, "linear4")
    m = f32(beta1) * m + f32(1 - beta1) * g
    v = spread(state["exp_avg_sq_scale"], shape, second)
    if second != "factor":
        v = LINEAR4[unpack(state["exp_avg_sq"], n)] * v
        v = f32(beta2) * v + f32(1 - beta2) * (g * g)
    root = v.double().sqrt().float()  # correctly rounded, as torch's f32 sqrt is not always
    denominator = root * f32(1 / math.sqrt(1 - beta2**t)) + f32(eps)
    w = f32(1 - lr * weight_decay) * w - f32(lr / (1 - beta1**t)) * (m / denominator)
    state["exp_avg_scale"] = block_scales(m)
    y = over_scale(m, spread(state["exp_avg_scale"], shape, "linear4"))
    state["exp_avg"] = pack(encode(y, DYNAMIC4))
    if second != "factor":
        scales = block_scales(v) if second == "linear4" else rank1_scales(v.view(shape))
        state["exp_avg_sq_scale"] = scales
        state["exp_avg_sq"] = pack(encode(over_scale(v, spread(scales, shape, second)), LINEAR4))
    return w.view(shape)
