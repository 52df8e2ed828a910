"""f32 arithmetic whose bits are promised."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of f32 values, rounded once.

    The product is exact in f64 and the sum is rounded to odd there, after which rounding to f32 is
    right (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    b, c = (torch.as_tensor(t, dtype=torch.float32).double() for t in (b, c))
    product = a.double() * b
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    odd = total.view(torch.int64) % 2 == 1
    away = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where((error == 0) | odd, total, torch.nextafter(total, away)).float()


def log2_coarse(x: Tensor) -> Tensor:
    """log2 of normal f32 > 0, within 2^-18: the polynomial of codec.h."""
    mantissa, exponent = torch.frexp(x)  # [1/2, 1)
    low = mantissa < math.sqrt(0.5)
    u = torch.where(low, 2 * mantissa, mantissa) - 1
    p = torch.full_like(u, -0.206591845)
    for c in (0.32215485, -0.367489964, 0.479348004, -0.721131861, 1.4427135):
        p = fma(p, u, c)
    return fma(p, u, (exponent - low.int()).float())


def exp2_coarse(x: Tensor) -> Tensor:
    """2^x within a relative 2^-18: the polynomial of codec.h."""
    n = x.round()
    p = torch.full_like(x, 9.58285294e-3)
    for c in (5.59064262e-2, 2.40240991e-1, 6.93124175e-1, 1.0):
        p = fma(p, x - n, c)
    return torch.ldexp(p.double(), n.int()).float()
