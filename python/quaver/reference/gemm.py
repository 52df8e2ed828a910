"""Matrix products in f64, and how far from them a product in f32 may be."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import encode


def decoded(q: Tensor, scale: Tensor) -> Tensor:
    """scale * q in f64, by the shape of the scales: one, [rows, 1], those of 1 x 128 blocks, or of
    128 x 128 tiles."""
    scale = scale.double()
    if scale.dim() == 2 and scale.numel() > 1:
        if scale.shape[0] != q.shape[0]:
            scale = scale.repeat_interleave(128, 0)[: q.shape[0]]
        if scale.shape[1] != 1:
            scale = scale.repeat_interleave(128, 1)[:, : q.shape[1]]
    return q.double() * scale


def gemm(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """scale_a * scale_b * a @ b.T + bias in f64; scales as `decoded` takes them."""
    y = decoded(a, scale_a) @ decoded(b, scale_b).t()
    return y if bias is None else y + bias.double()


def gemm_tolerance(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, out_dtype: torch.dtype,
    addend: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """|gemm - f64| of any order of f32 sums: K roundings of the magnitudes' sum, one of the result.
    Operands with several scales may be decoded first, to bf16 if that is the result's dtype: two
    more roundings.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the products are exact.
    """
    magnitude = gemm(a.float().abs(), scale_a.abs(), b.float().abs(), scale_b.abs())
    if scale_a.numel() > 1 or scale_b.numel() > 1:
        coarse = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
        magnitude = magnitude * (1 + torch.finfo(coarse).eps / 2) ** 2
        decoding = 2 * (torch.finfo(coarse).eps / 2) * magnitude
    else:
        decoding = 0
    if addend is not None:
        magnitude = magnitude + addend.double().abs()
    last = torch.finfo(out_dtype).eps / 2
    rounding = magnitude * ((a.shape[1] + 4) * 2.0**-24 + last)
    return rounding + decoding + torch.finfo(out_dtype).tiny


def tensor_core_tolerance(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, promoted: bool
) -> Tensor:
    """The error that Hopper's FP8 tensor cores may add to f32 rounding.

    An instruction adds 32 products to the running sum. Every addend is cut to 13 bits below the
    leading bit of the largest one (DeepSeek-V3, arXiv 2412.19437, section 3.5.2: "about 14 bits"),
    so each of the 33 loses less than 2^-13 of that one. Promoted sums start anew each 128 of K.
    """
    a, b = decoded(a, scale_a), decoded(b, scale_b)
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
