"""AdamW in f64, and on stored states bit for bit."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .formats import (
    E4M3,
    E5M2,
    FORMATS,
    MASTER_TO_FP8,
    dither_noise,
    encode,
    encode_stochastic,
    magnitudes,
    scale_from_amax,
)
from .states import decode_state, keep_nonzero, to_format


def adamw(
    w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int, lr, beta1, beta2, eps, weight_decay
) -> tuple[Tensor, Tensor, Tensor]:
    """Step t (from 1) of AdamW in f64: weight, exp_avg, exp_avg_sq.

    Loshchilov & Hutter, arXiv 1711.05101, algorithm 2.
    """
    w, m, v, g = w.double(), m.double(), v.double(), g.double()
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return w - lr * weight_decay * w - lr * update, m, v


def update_bound(t: int, lr, beta1, beta2) -> float:
    """Upper bound of |w' - decay * w|: Cauchy-Schwarz on the two moving averages (adam.h)."""
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    ratio = beta1 * beta1 / beta2 if beta2 > 0 else 1.0
    terms = 1 / (1 - ratio) if ratio < 1 else t
    peak = (1 - beta1) * math.sqrt(terms / (1 - beta2)) * math.sqrt(c2) / c1
    return 2 * abs(lr) * max(peak, 1.0)


def toward_zero(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest value of the format that is not above |y|, with y's sign."""
    table = magnitudes(dtype)
    code = torch.searchsorted(table, y.double().abs().contiguous(), right=True) - 1
    return table[code].copysign(y.double()).float()


def settle_exp_avg(
    y: Tensor, m: Tensor, g: Tensor, dtype: torch.dtype, noise: Tensor | None = None
) -> Tensor:
    """A first moment m, y in the format's domain: toward zero below the normal range, and where
    the gradient is below an eighth of it; else nearest rounding could hold it up for ever. With
    `noise` the others round stochastically by its upper bits."""
    down = (y.abs() < torch.finfo(dtype).tiny) | (8 * g.abs() < m.abs())
    if noise is not None:
        dropped = 23 - FORMATS[dtype][1]
        noise = (noise >> 32 - dropped).reshape(y.shape).masked_fill(down | ~y.isfinite(), 0)
        bits = y.abs().view(torch.int32).to(torch.int64) + noise >> dropped << dropped
        y = bits.to(torch.int32).view(torch.float32).copysign(y)
    return torch.where(down, toward_zero(y, dtype), y)


def adamw_fp8(
    states: list[tuple[Tensor, Tensor, Tensor]], g: Tensor, g_amax: Tensor, t: int, lr, beta1,
    beta2, eps, weight_decay, grains=("tensor",) * 3, seed=None, first=0,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Step t of AdamW on stored (codes, scale, amax) of weight, exp_avg and exp_avg_sq.

    FP8-LM, section 2.2, in one pass: each new scale comes from a bound of the new amax that is
    known before (adam.h), and the next bound starts from the amax of the stored values. All is f32,
    in the order of adam.h, so that every bit can be compared. Unscaled states have scale 1. States
    of grain "flat" and "expand" (flat, expanded) get a scale for each block from its new values.
    With a `seed` an f16 weight, and an FP8 first moment that is not expanded, round stochastically,
    by the noise of flat elements from `first`.
    """
    f32 = functools.partial(torch.tensor, dtype=torch.float32)
    w, m, v = (
        codes.float() * scale if kind == "tensor" else decode_state(codes, scale, kind == "expand")
        for (codes, scale, _), kind in zip(states, grains, strict=True)
    )
    g = g.float()
    b1, r1, b2, r2 = f32(beta1), f32(1 - beta1), f32(beta2), f32(1 - beta2)
    m = b1 * m + r1 * g
    v = b2 * v + r2 * (g * g)
    root = v.double().sqrt().float()  # correctly rounded, as torch's f32 sqrt is not always
    denominator = root * f32(1 / math.sqrt(1 - beta2**t)) + f32(eps)
    w = f32(1 - lr * weight_decay) * w - f32(lr / (1 - beta1**t)) * (m / denominator)

    top = g_amax * 1.125  # rounding to FP8 may have raised it
    bounds = [
        states[0][2] + f32(update_bound(t, lr, beta1, beta2)),
        b1 * states[1][2] + r1 * top,
        b2 * states[2][2] + r2 * (top * top),
    ]
    noise = (None, None) if seed is None else dither_noise(w.numel(), seed, t - 1, first)
    stored = []
    for i, (value, (codes, scale, _)) in enumerate(zip((w, m, v), states, strict=True)):
        dtype, kind = codes.dtype, grains[i]
        if dtype not in FORMATS:
            stored.append((value.to(dtype), scale, f32(0.0)))
            continue
        if kind == "tensor":
            scale = scale_from_amax(bounds[i], dtype, previous=scale)
            y = value / scale
        else:
            y, scale = to_format(value, dtype, kind == "expand")
        if i == 1:
            random = dtype in (E4M3, E5M2) and kind != "expand"
            y = settle_exp_avg(y, m, g, dtype, noise[1] if random else None)
        if i == 2 and dtype in (E4M3, E5M2):
            y = keep_nonzero(y, v, dtype)
        if i == 0 and seed is not None:
            codes = encode_stochastic(y, dtype, words=noise[0] >> 9 + FORMATS[dtype][1])
        else:
            codes = encode(y, dtype)
        amax = (
            (codes.float() * scale).abs().amax() if codes.numel() and kind == "tensor" else f32(0.0)
        )
        stored.append((codes, scale, amax))
    return stored


def split_master(x: Tensor, low_bits: int = 16) -> tuple[Tensor, Tensor]:
    """An f32 master as its nearest bf16, ties away from zero, and its low 16 bits as int16. With 8
    low bits x is first rounded to nearest even at 24 bits, and the rest is int8."""
    bits = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF)
    if low_bits == 8:
        kept, dropped = bits >> 8, bits & 0xFF
        up = (dropped > 0x80) | ((dropped == 0x80) & (kept % 2 == 1))
        bits = kept + up << 8
    high = (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    return high, (bits.to(torch.int16) if low_bits == 16 else (bits >> 8).to(torch.int8))


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """The f32 of `split_master`: a low half of 0x8000 or more, or a low byte of 0x80 or more, was
    rounded up."""
    shift = 0 if low.dtype == torch.int16 else 8
    bits = (high.view(torch.int16).to(torch.int64) << 16) + (low.to(torch.int64) << shift)
    return bits.to(torch.int32).view(torch.float32)


def stochastic_bf16(x: Tensor, seed: int, step: int, first: int = 0) -> Tensor:
    """Up with the probability of the dropped 16 bits, by dither_noise."""
    noise, _ = dither_noise(x.numel(), seed, step, first)
    bits = x.view(torch.int32).to(torch.int64).flatten() + (noise >> 16)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16).reshape(x.shape)


def fp8_weight(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 GEMM copy of an f16 master, and its scale: a function of the codes (dtype.h)."""
    return encode(codes.float() / MASTER_TO_FP8, E4M3), scale * MASTER_TO_FP8
