"""Plain-torch oracles of every op: slow, short and plainly right. Tests compare against them.

Where an op promises bits, its oracle gives the bits; `gemm`, `grad_norm` and `adamw` are f64.
Scales decode: x ~= scale * q.
"""

from __future__ import annotations

import functools
import math
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2, F16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16
FORMATS = {E4M3: (8, 3, 7), E5M2: (8, 2, 15), F16: (16, 10, 15)}  # width, mantissa bits, bias
MASTER_TO_FP8 = 128.0  # the scale of a weight's e4m3 copy over that of its f16 master (dtype.h)
MIN_SCALE = 2.0**-126
HISTORY = 16


def scale_max(dtype: torch.dtype) -> float:
    """What an amax is scaled to: the finite maximum, but for f16 e4m3's times 2^7 (dtype.h)."""
    return torch.finfo(E4M3).max * MASTER_TO_FP8 if dtype == F16 else torch.finfo(dtype).max


def scale_from_amax(
    amax: Tensor, dtype: torch.dtype, power_of_two: bool = True, previous: float = 1.0
) -> Tensor:
    """amax / maximum in f32, or the smallest power of two that is not below it.

    FP8-LM (arXiv 2310.18313), section 2.2: 2^floor(log2(maximum / amax)) on the encode side.
    An amax of 0, and one that is not finite, keeps `previous`.
    """
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


def encode_stochastic(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Up with the probability of the dropped fraction: one Philox word for each flat index."""
    _, mantissa, bias = FORMATS[dtype]
    dropped = 23 - mantissa  # bits of an f32 that the format lacks
    flat = x.double().abs().flatten()
    index = torch.arange(flat.numel())
    words = philox(seed, index // 4).gather(1, (index % 4)[:, None])[:, 0]
    _, exponent = torch.frexp(flat)
    ulp = torch.ldexp(torch.ones_like(flat), exponent.clamp(min=2 - bias) - 1 - mantissa)
    known = torch.floor(flat / ulp * 2.0**dropped)  # finer than that is lost, in subnormals only
    noise = (words & (2**dropped - 1)).double()
    value = torch.floor((known + noise) / 2.0**dropped) * ulp
    codes = torch.searchsorted(magnitudes(dtype), value).clamp(max=len(magnitudes(dtype)) - 1)
    return _from_codes(codes.reshape(x.shape), x, dtype)


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
    else:
        line = x if x.dim() else x[None]
        width = block if granularity == "block" else max(line.shape[-1], 1)
        count = 1 if granularity == "row" else -(-line.shape[-1] // width)
        padded = F.pad(line, (0, count * width - line.shape[-1]))
        amax = padded.reshape(*line.shape[:-1], count, width).abs().amax(-1)
    if scale is None:
        scale = scale_from_amax(amax, dtype, power_of_two)
    return encode(x / expand_scale(scale, x, granularity, block), dtype), scale, amax


def expand_scale(scale: Tensor, x: Tensor, granularity: str, block: int = 128) -> Tensor:
    """The scales, shaped to multiply x."""
    if granularity == "block":
        scale = scale.repeat_interleave(block, -1)[..., : x.shape[-1] if x.dim() else 1]
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


class DelayedScale:
    """Delayed scaling (FP8-LM's reference, MS-AMP): just in time for the first 16 casts, then from
    the maximum of the last 16 amaxes. A non-finite amax empties the history."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.history: deque[float] = deque(maxlen=HISTORY)

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = None
        if len(self.history) == HISTORY:
            scale = scale_from_amax(torch.tensor(max(self.history)), self.dtype)
        q, scale, amax = quantize(x, self.dtype, scale)
        if amax.isfinite():
            self.history.append(amax.item())
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


def gemm(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """scale_a * scale_b * a @ b.T + bias in f64; scales are 0-D or [rows, 1]."""
    y = (a.double() * scale_a.double()) @ (b.double() * scale_b.double()).t()
    return y if bias is None else y + bias.double()


def gemm_tolerance(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, out_dtype: torch.dtype,
    addend: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """|gemm - f64| of any order of f32 sums: K roundings of the magnitudes' sum, one of the result.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the products are exact.
    """
    magnitude = gemm(a.float().abs(), scale_a.abs(), b.float().abs(), scale_b.abs())
    if addend is not None:
        magnitude = magnitude + addend.double().abs()
    last = torch.finfo(out_dtype).eps / 2
    return magnitude * ((a.shape[1] + 4) * 2.0**-24 + last) + torch.finfo(out_dtype).tiny


def tensor_core_tolerance(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, promoted: bool
) -> Tensor:
    """What Hopper's FP8 tensor cores may lose beside f32 rounding.

    An instruction adds 32 products to the running sum. Every addend is cut to 13 bits below the
    leading bit of the largest one (DeepSeek-V3, arXiv 2412.19437, section 3.5.2: "about 14 bits"),
    so each of the 33 loses less than 2^-13 of that one. Promoted sums start anew each 128 of K.
    """
    a, b = a.double() * scale_a.double(), b.double() * scale_b.double()
    partial = lost = a.new_zeros(a.shape[0], b.shape[0])
    for step, k in enumerate(range(0, a.shape[1], 32)):
        if promoted and step % 4 == 0:
            partial = torch.zeros_like(partial)
        x, y = a[:, k : k + 32], b[:, k : k + 32]
        product = x.abs().amax(1, keepdim=True) * y.abs().amax(1)
        largest = torch.maximum(product, partial.abs() + lost)
        lost = lost + 33 * 2.0**-13 * largest
        partial = partial + x @ y.t()
    return lost


def gemm_quantize(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype, out_scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The lowest and highest codes that gemm may give: rounding is monotonic, so they are those of
    the ends of its tolerance."""
    y = gemm(a, scale_a, b, scale_b, bias)
    bound = gemm_tolerance(a, scale_a, b, scale_b, torch.float32, bias)
    return tuple(encode(((y + end).float() / out_scale), dtype) for end in (-bound, bound))


def accumulate(
    q: Tensor, scale: Tensor, amax: Tensor, other: Tensor, other_scale: Tensor | None = None,
    other_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q + other in f32, re-encoded just in time (MS-AMP's add_to_fp8); bf16 has scale 1."""
    one = torch.ones(())
    total = q.float() * scale + other.float() * (one if other_scale is None else other_scale)
    seen = total.abs().amax() if total.numel() else torch.zeros(())
    if q.dtype == torch.bfloat16:
        new, codes = one, total.to(torch.bfloat16)
    else:
        new = scale_from_amax(seen, q.dtype, previous=scale)
        codes = encode(total / new, q.dtype)
    finite = amax.isfinite() & (one if other_amax is None else other_amax).isfinite()
    return codes, new, torch.where(finite, seen, torch.nan)


ROUNDED_UP = 1.125  # rounding to FP8 raises a magnitude by less (all_reduce.h)


def shared_scale(
    amaxes: list[float], dtype: torch.dtype, mu: float | None = None
) -> tuple[Tensor, Tensor]:
    """The decode scales of every rank's values and of their sum (FP8-LM, equations 3 and 4).

    The first fits the largest amax; the second fits the sum of what rounding may have made of all
    of them. With mu both are the scale of mu * value over mu.
    """
    f32 = functools.partial(torch.tensor, dtype=torch.float32)
    if not all(math.isfinite(a) for a in amaxes):
        return f32(1.0), f32(1.0)
    if mu is not None:
        return (scale_from_amax(f32(max(amaxes)) / f32(mu), dtype),) * 2
    scale = scale_from_amax(f32(max(amaxes)), dtype)
    bound = f32(0.0)
    for a in amaxes:
        bound += torch.minimum(f32(a) * ROUNDED_UP, scale * scale_max(dtype))
    return scale, scale_from_amax(bound, dtype)


def two_shot(
    values: list[Tensor], dtype: torch.dtype, sum_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, decode scale and amax of the mean of all ranks' f32 tensors: every rank encodes once
    with the shared scale, the codes are summed in f32 in rank order, the sum is encoded once. The
    1/N is in the scale. `sum_dtype` f32 keeps the sum."""
    n = len(values)
    amaxes = [v.abs().amax().item() if v.numel() else 0.0 for v in values]
    scale, sum_scale = shared_scale(amaxes, dtype)
    total = torch.zeros_like(values[0])
    for v in values:
        total = total + encode(v / scale, dtype).float() * scale
    amax = (total.abs().amax() if total.numel() else torch.zeros(())) / n
    if sum_dtype == torch.float32:
        return total, torch.tensor(1 / n), amax
    return encode(total / sum_scale, dtype), sum_scale / n, amax


def ring_mean(values: list[Tensor], dtype: torch.dtype, mu: float) -> Tensor:
    """The mean (f64) by an FP8 ring that adds hop by hop, in FP8, as NCCL does: every hop rounds
    and saturates. mu = 1/N is pre-scaling, 1 post-scaling, between them FP8-LM's auto-scaling
    (section 2.1, equation 3). Chunk c of N starts at rank c + 1 and ends at its owner, rank c."""
    n = len(values)
    scale, _ = shared_scale([v.abs().amax().item() for v in values], dtype)
    codes = [encode(mu * v.flatten() / scale, dtype) for v in values]
    chunks = [c.tensor_split(n) for c in codes]
    reduced = []
    for c in range(n):
        total = chunks[(c + 1) % n][c].float()
        for hop in range(2, n + 1):
            total = encode(total + chunks[(c + hop) % n][c].float(), dtype).float()
        reduced.append(total)
    return (torch.cat(reduced).double() * scale / (mu * n)).reshape(values[0].shape)


def grad_norm(values: list[Tensor], scales: list[Tensor]) -> tuple[float, list[float]]:
    """The two-norm over all gradients in f64, and each one's amax."""
    decoded = [v.double() * s.double() for v, s in zip(values, scales, strict=True)]
    norm = math.sqrt(sum(g.square().sum().item() for g in decoded))
    return norm, [g.abs().max().item() if g.numel() else 0.0 for g in decoded]


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
    """sign(x) * finite_max * (|x| / scale)^k, what is then rounded (COAT, arXiv 2410.19313)."""
    power, lift = _power(scale), torch.where(scale < 2.0**-64, LIFT, 1.0)
    log2_max = torch.tensor(math.log2(scale_max(dtype)), dtype=torch.float32)
    offset = log2_max - power * log2_coarse(scale * lift)
    x = groups.abs().nan_to_num(posinf=torch.finfo(torch.float32).max) * lift[:, None]
    usable = torch.where(x >= 2.0**-126, x, 1.0)
    exponent = fma(log2_coarse(usable), power[:, None], offset[:, None])
    y = exp2_coarse(torch.where(x >= 2.0**-126, exponent, -40.0).clamp(min=-40))
    return torch.where(groups.isnan(), groups, y.copysign(groups))


def to_format(x: Tensor, dtype: torch.dtype, expanded: bool) -> tuple[Tensor, Tensor]:
    """What is rounded to codes, shaped like x, and the scale of each group."""
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


def toward_zero(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest value of the format that is not above |y|, with y's sign."""
    table = magnitudes(dtype)
    code = torch.searchsorted(table, y.double().abs().contiguous(), right=True) - 1
    return table[code].copysign(y.double()).float()


def settle_exp_avg(y: Tensor, m: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """A first moment m, y in the format's domain: toward zero below the normal range, and where
    the gradient is below an eighth of it; else nearest rounding could hold it up for ever."""
    return torch.where(
        (y.abs() < torch.finfo(dtype).tiny) | (8 * g.abs() < m.abs()), toward_zero(y, dtype), y
    )


def adamw_fp8(
    states: list[tuple[Tensor, Tensor, Tensor]], g: Tensor, g_amax: Tensor, t: int, lr, beta1,
    beta2, eps, weight_decay, granularities=("tensor",) * 3,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Step t of AdamW on stored (codes, scale, amax) of weight, exp_avg and exp_avg_sq.

    FP8-LM, section 2.2, in one pass: each new scale comes from a bound of the new amax that is
    known before (adam.h), and the amax of what was stored is what the next starts from. f32, in
    the order of adam.h, so that every bit can be compared. Unscaled states have scale 1. States of
    granularity "group" and "expand" have the scales of their groups, from what they now hold.
    """
    f32 = functools.partial(torch.tensor, dtype=torch.float32)
    w, m, v = (
        codes.float() * scale if kind == "tensor" else decode_state(codes, scale, kind == "expand")
        for (codes, scale, _), kind in zip(states, granularities, strict=True)
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
    stored = []
    for i, (value, (codes, scale, _)) in enumerate(zip((w, m, v), states, strict=True)):
        dtype, kind = codes.dtype, granularities[i]
        if dtype not in FORMATS:
            stored.append((value.to(dtype), scale, f32(0.0)))
            continue
        if kind == "tensor":
            scale = scale_from_amax(bounds[i], dtype, previous=scale)
            y = value / scale
        else:
            y, scale = to_format(value, dtype, kind == "expand")
        if i == 1:
            y = settle_exp_avg(y, m, g, dtype)
        if i == 2 and dtype in (E4M3, E5M2):
            y = keep_nonzero(y, v, dtype)
        codes = encode(y, dtype)
        amax = (
            (codes.float() * scale).abs().amax() if codes.numel() and kind == "tensor" else f32(0.0)
        )
        stored.append((codes, scale, amax))
    return stored


def split_master(x: Tensor) -> tuple[Tensor, Tensor]:
    """An f32 master as its nearest bf16, ties away from zero, and its low 16 bits as int16."""
    bits = x.view(torch.int32).to(torch.int64)
    high = (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    return high, bits.to(torch.int16)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """The f32 of `split_master`: a low half of 0x8000 or more was rounded up."""
    bits = (high.view(torch.int16).to(torch.int64) << 16) + low.to(torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def stochastic_bf16(x: Tensor, seed: int, offset: int) -> Tensor:
    """Up with the probability of the dropped 16 bits: Philox of (seed, offset, flat index)."""
    index = torch.arange(x.numel())
    words = philox(seed, index // 4, offset).gather(1, (index % 4)[:, None])[:, 0]
    bits = x.view(torch.int32).to(torch.int64).flatten() + (words & 0xFFFF)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16).reshape(x.shape)


def fp8_weight(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 GEMM copy of an f16 master, and its scale: a function of the codes (dtype.h)."""
    return encode(codes.float() / MASTER_TO_FP8, E4M3), scale * MASTER_TO_FP8
