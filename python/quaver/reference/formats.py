"""Scales, and values as codes of a format."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

E4M3, E5M2, F16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16
FORMATS = {E4M3: (8, 3, 7), E5M2: (8, 2, 15), F16: (16, 10, 15)}  # width, mantissa bits, bias
MASTER_TO_FP8 = 128.0  # the scale of a weight's e4m3 copy over that of its f16 master (dtype.h)
MIN_SCALE = 2.0**-126


def scale_max(dtype: torch.dtype) -> float:
    """The value that an amax is scaled to: the finite maximum; of f16, e4m3's times 2^7."""
    return torch.finfo(E4M3).max * MASTER_TO_FP8 if dtype == F16 else torch.finfo(dtype).max


def scale_from_amax(
    amax: Tensor, dtype: torch.dtype, power_of_two: bool = True, previous: float = 1.0
) -> Tensor:
    """amax / maximum in f32, or the smallest power of two that is not below it.

    FP8-LM (arXiv 2310.18313), section 2.2: 2^floor(log2(maximum / amax)) on the encode side.
    An amax of 0, and one that is not finite, keeps `previous`, or 1 where `previous` is subnormal,
    zero or not finite.
    """
    previous = torch.as_tensor(previous)
    divides = previous.isfinite() & (previous.abs() >= MIN_SCALE)
    previous = torch.where(divides, previous, 1.0)
    usable = (amax > 0) & amax.isfinite()
    amax = torch.where(usable, amax.float(), 1.0)
    scale = amax / scale_max(dtype)
    if power_of_two:  # in f64 the quotient is a power of two exactly where the true one is
        mantissa, exponent = torch.frexp(amax.double() / scale_max(dtype))
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int()).float()
    return torch.where(usable, scale.clamp(min=MIN_SCALE), previous)


@functools.cache
def magnitudes(dtype: torch.dtype) -> Tensor:
    """The f64 value of every finite code without a sign, ascending: the index is the code.

    OCP 8-bit Floating Point Specification 1.0, section 5; IEEE 754 for f16.
    """
    width, mantissa, bias = FORMATS[dtype]
    code = torch.arange(2 ** (width - 1))
    exponent, fraction = code >> mantissa, (code & (2**mantissa - 1)).double()
    significand = torch.where(exponent == 0, fraction, fraction + 2.0**mantissa)
    value = torch.ldexp(significand, exponent.clamp(min=1) - bias - mantissa)
    return value[value <= torch.finfo(dtype).max]


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of the format, ties to the even code, saturating; NaN is all ones."""
    table = magnitudes(dtype)
    middle = (table[1:] + table[:-1]) / 2  # exact in f64
    magnitude = x.double().abs().contiguous()
    code = torch.searchsorted(middle, magnitude)  # at a tie, the code below
    tie = magnitude == middle[code.clamp(max=len(middle) - 1)]
    code += tie & (code % 2 == 1)
    return _from_codes(code, x, dtype)


def _from_codes(code: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of magnitudes, with the sign of x, and x's NaNs."""
    sign = 1 << (FORMATS[dtype][0] - 1)
    code = torch.where(x.isnan(), sign - 1, code + sign * x.signbit())
    return code.to(torch.uint16 if dtype == F16 else torch.uint8).view(dtype)


def philox(seed: int, counter: Tensor, high: int = 0) -> Tensor:
    """The four 32-bit words [..., 4] of Philox4x32-10 (Salmon et al., SC 2011, section 3.3)."""
    mask = 0xFFFFFFFF
    key = [seed & mask, seed >> 32 & mask]
    zeros = torch.zeros_like(counter)
    c = [counter & mask, counter >> 32 & mask, zeros + (high & mask), zeros + (high >> 32 & mask)]

    def product(constant, x):  # high and low words; int64 holds 32 x 16 bits
        low = constant * (x & 0xFFFF)
        high = constant * (x >> 16) + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c[0])
        high1, low1 = product(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return torch.stack(c, -1)


def random_words(count: int, seed: int) -> Tensor:
    """One Philox word for each flat index, int64 [count]."""
    index = torch.arange(count)
    return philox(seed, index // 4).gather(1, (index % 4)[:, None])[:, 0]


def dither_noise(count: int, seed: int, step: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """32 bits of noise for the weight, and for its first moment, of each flat index from `first` in
    a step: Weyl sequences over the steps, which start at a hash of seed and index (dither.h)."""
    mask = 0xFFFFFFFF

    def times(x, constant):  # mod 2^32; int64 holds 32 x 16 bits
        return (x * (constant & 0xFFFF) + ((x * (constant >> 16) & 0xFFFF) << 16)) & mask

    def mix(x):  # MurmurHash3's finalizer
        x = times(x ^ x >> 16, 0x85EBCA6B)
        x = times(x ^ x >> 13, 0xC2B2AE35)
        return x ^ x >> 16

    key = mix((seed & mask) + mix(seed >> 32 & mask) & mask)
    index = torch.arange(first, first + count)
    start = mix(index & mask ^ key) + times(index >> 32, 0xC13FA9A9) & mask
    weight = start + times(step & mask, 0x9E3779B9) & mask
    return weight, times(start, 0xC2B2AE35) + times(step & mask, 0x91E10DA5) & mask


def encode_stochastic(
    x: Tensor, dtype: torch.dtype, seed: int = 0, words: Tensor | None = None
) -> Tensor:
    """Up with the probability of the dropped fraction, by the low bits of `words`, or of
    random_words."""
    _, mantissa, bias = FORMATS[dtype]
    dropped = 23 - mantissa  # bits of an f32 that the format lacks
    flat = x.double().abs().flatten()
    words = random_words(flat.numel(), seed) if words is None else words
    _, exponent = torch.frexp(flat)
    ulp = torch.ldexp(torch.ones_like(flat), exponent.clamp(min=2 - bias) - 1 - mantissa)
    known = torch.floor(flat / ulp * 2.0**dropped)  # finer than that is lost, in subnormals only
    noise = (words & (2**dropped - 1)).double()
    value = torch.floor((known + noise) / 2.0**dropped) * ulp
    codes = torch.searchsorted(magnitudes(dtype), value).clamp(max=len(magnitudes(dtype)) - 1)
    return _from_codes(codes.reshape(x.shape), x, dtype)
