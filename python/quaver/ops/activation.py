"""Norms and activations fused with the cast of their results, and their backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tensor import ScaledTensor
from .fake import fake
from .quantize import _both_layouts, check_scale

_ops = torch.ops.quaver


class Grouped(NamedTuple):
    """A matrix saved for backward: e4m3 codes [R, C] in groups of 1 x `block` along the last axis.

    Scales are powers of two, one byte each, 2^(byte - 127): uint8 [R, ceil(C / block)]. Not
    float8_e8m0fnu, the dtype of that format: Inductor takes no op that may write and returns one.
    """

    codes: Tensor
    scale: Tensor
    block: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * codes as a plain tensor."""
        scale = self.scale.view(torch.float8_e8m0fnu).float()
        return _ops.dequantize(self.codes, scale, dtype, "block", self.block)


class Normalized(NamedTuple):
    """The results of `normalize`: both layouts of y, and the tensors that its backward needs."""

    q: ScaledTensor
    qt: ScaledTensor
    saved: Grouped
    mean: Tensor
    rstd: Tensor


class Activated(NamedTuple):
    """The results of `activate`: both layouts of y, and the tensors that its backward needs."""

    q: ScaledTensor
    qt: ScaledTensor
    x: Grouped
    up: Grouped | None
    channel_amax: Tensor | None


def normalize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    centered: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale: Tensor | None = None,
    history: Tensor | None = None,
    power_of_two: bool = True,
    block: int = 32,
) -> Normalized:
    """RMSNorm (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450) if `centered`, cast to FP8.

    y = (x - mean) * rstd * weight + bias in f32 with rstd = 1 / sqrt(mean((x - mean)^2) + eps).
    q [R16, C16] and qt [C16, R16] are y and its transpose under one scale, padded with zeros to
    multiples of 16 in both axes, as `gemm` wants them. `saved` is x in FP8 (COAT, arXiv 2410.19313,
    section 4). Row sums have a fixed order (normalize.h): the same bits on every device.

    Args:
        x: [R, C] float32, float16 or bfloat16, any strides.
        weight, bias: [C] of any of these types.
        dtype: float8_e4m3fn or float8_e5m2, of q and qt.
        scale, history, power_of_two: as in `quantize`; with neither, just in time.
        block: values per scale of `saved`.

    Returns:
        `mean` is float32 [R] if centered, else [0]; `rstd` float32 [R]. A row whose squares
        overflow or are not finite is NaN, which the amax of q shows.

    Raises RuntimeError for shapes and types that do not fit, ValueError for a scale as `quantize`.
    """
    check_scale("normalize", scale)
    q, qt, scale, amax, codes, scales, mean, rstd = _ops.normalize(
        x, weight, bias, eps, centered, dtype, scale, history, power_of_two, block
    )
    return Normalized(
        ScaledTensor(q, scale, amax, x.dtype),
        ScaledTensor(qt, scale, amax, x.dtype),
        Grouped(codes, scales, block),
        mean,
        rstd,
    )


@fake("normalize")
def _(
    x, weight, bias, eps, centered, dtype, scale=None, history=None, power_of_two=True, block=32,
    spread_nan=False,
):  # fmt: skip
    rows, cols = x.shape
    mean, rstd = (x.new_empty([n], dtype=torch.float32) for n in (rows if centered else 0, rows))
    return *_both_layouts(x, rows, cols, dtype), *grouped_like(x, block), mean, rstd


def normalize_backward(
    dy: Tensor,
    saved: Grouped,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    has_bias: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx [R, C], dweight [C] and dbias [C] (float32) of `normalize`, from its saved FP8 input.

    With xhat = (x - mean) * rstd and g = dy * weight, dx = (g - mean(g) - xhat * mean(g * xhat)) *
    rstd, where mean(g) is LayerNorm's alone. Every sum has a fixed order: bitwise repeatable.

    Args:
        dy: [R, C] float32, float16 or bfloat16.
        saved, mean, rstd: of `normalize`.
        dtype: of dx; None: dy's.

    Raises RuntimeError for shapes and types that do not fit.
    """
    dx, dweight, dbias = _ops.normalize_backward(
        dy, saved.codes, saved.scale, mean, rstd, weight, saved.block, has_bias, dtype or dy.dtype
    )
    return dx, dweight if weight is not None else None, dbias if has_bias else None


@fake("normalize_backward")
def _(dy, xq, xscale, mean, rstd, weight, block, has_bias, dx_dtype):
    rows, cols = dy.shape
    return (
        dy.new_empty([rows, cols], dtype=dx_dtype),
        dy.new_empty([0 if weight is None else cols], dtype=torch.float32),
        dy.new_empty([cols if has_bias else 0], dtype=torch.float32),
    )


def activate(
    x: Tensor,
    up: Tensor | None = None,
    kind: str = "silu",
    channel_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale: Tensor | None = None,
    history: Tensor | None = None,
    power_of_two: bool = True,
    block: int = 32,
) -> Activated:
    """f(x) * up (SwiGLU and GeGLU, arXiv 2002.05202), or f(x), cast to FP8 in both layouts.

    Computed in f32 from the exact x and up, whose FP8 copies are kept for backward (COAT,
    arXiv 2410.19313, section 4). q and qt are as `normalize` gives them.

    Args:
        x, up: [R, C] float32, float16 or bfloat16, both alike; rows may lie apart, as those of the
            halves of a joint projection do.
        kind: f is "silu", "gelu" (with erf) or "gelu_tanh".
        channel_scale: float32 [C] that multiplies the result before it is cast (Smooth-SwiGLU,
            arXiv 2409.12517); `channel_amax` [C] is then the largest |f(x) * up| of each column.
        dtype, scale, history, power_of_two, block: as in `normalize`.

    Raises RuntimeError for shapes, types and kinds that do not fit, ValueError for a scale as
    `quantize`.
    """
    check_scale("activate", scale)
    q, qt, scale, amax, xq, xscale, uq, uscale, channel_amax = _ops.activate(
        x, up, kind, channel_scale, dtype, scale, history, power_of_two, block
    )
    return Activated(
        ScaledTensor(q, scale, amax, x.dtype),
        ScaledTensor(qt, scale, amax, x.dtype),
        Grouped(xq, xscale, block),
        None if up is None else Grouped(uq, uscale, block),
        None if channel_scale is None else channel_amax,
    )


@fake("activate")
def _(
    x, up, kind, channel_scale, dtype, scale=None, history=None, power_of_two=True, block=32,
    spread_nan=False,
):  # fmt: skip
    rows, cols = x.shape
    none = [x.new_empty([0], dtype=t) for t in (torch.float8_e4m3fn, torch.uint8)]
    return (
        *_both_layouts(x, rows, cols, dtype),
        *grouped_like(x, block),
        *(none if up is None else grouped_like(x, block)),
        x.new_empty([0 if channel_scale is None else cols], dtype=torch.float32),
    )


def activate_backward(
    dy: Tensor,
    x: Grouped,
    up: Grouped | None = None,
    kind: str = "silu",
    channel_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e5m2,
    *,
    x_history: Tensor | None = None,
    up_history: Tensor | None = None,
    power_of_two: bool = True,
    joint: bool = False,
) -> tuple[ScaledTensor, ScaledTensor, ScaledTensor | None, ScaledTensor | None]:
    """dx, dx.T, dup and dup.T of `activate` in FP8, from its saved inputs; padded like its result.

    With g = dy * channel_scale: dx = g * up * f'(x) and dup = g * f(x).

    Args:
        dy: [R, C] float32, float16 or bfloat16.
        x, up, kind, channel_scale: of `activate`.
        x_history, up_history: delayed scaling of dx and of dup, as in `quantize`.
        joint: dx is [dx, dup], of 2 C columns by one scale, and there is no dup; C is then a
            multiple of 16.

    Raises RuntimeError for shapes, types and kinds that do not fit.
    """
    q, qt, scale, amax, uq, uqt, uscale, uamax = _ops.activate_backward(
        dy, x.codes, x.scale, up and up.codes, up and up.scale, kind, channel_scale, x.block, dtype,
        x_history, up_history, power_of_two, False, joint,
    )  # fmt: skip
    dx, dxt = (ScaledTensor(t, scale, amax, dy.dtype) for t in (q, qt))
    if up is None or joint:
        return dx, dxt, None, None
    return dx, dxt, *(ScaledTensor(t, uscale, uamax, dy.dtype) for t in (uq, uqt))


@fake("activate_backward")
def _(
    dy, xq, xscale, uq, uscale, kind, channel_scale, block, dtype, x_history=None,
    up_history=None, power_of_two=True, spread_nan=False, joint=False,
):  # fmt: skip
    rows, cols = dy.shape
    none = [dy.new_empty([0], dtype=t) for t in (dtype, dtype, torch.float32, torch.float32)]
    dup = none if uq is None or joint else _both_layouts(dy, rows, cols, dtype)
    return *_both_layouts(dy, rows, 2 * cols if joint else cols, dtype), *dup


def grouped_like(like, block):
    """Codes and scales of a saved matrix like that."""
    rows, cols = like.shape
    scale = like.new_empty([rows, (cols + block - 1) // block], dtype=torch.uint8)
    return like.new_empty([rows, cols], dtype=torch.float8_e4m3fn), scale
