"""Quantisation: values to codes and scales, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..layout import Layout
from ..tensor import ScaledTensor
from .fake import fake

_ops = torch.ops.quaver


def check_scale(op: str, scale: Tensor | None) -> None:
    """Raises ValueError unless every decode scale is positive and finite.

    Checks scales on the CPU only: reading one on a GPU would wait for it. Layers call
    torch.ops.quaver instead, where a scale may be NaN, so that a non-finite value spreads."""
    if not isinstance(scale, Tensor) or torch.compiler.is_compiling() or is_fake(scale):
        return
    if scale.device.type != "cpu":
        return
    # item() costs a fortieth of the comparisons.
    usable = (
        0 < scale.item() < math.inf
        if scale.numel() == 1
        else bool(((scale > 0) & (scale < math.inf)).all())
    )
    if not usable:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale.tolist()}")


def quantize(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale: Tensor | None = None,
    granularity: str = "tensor",
    block: int = 128,
    power_of_two: bool = True,
    rounding: str = "nearest",
    seed: int = 0,
    history: Tensor | None = None,
) -> ScaledTensor:
    """Encode x, saturating, with the amax of what was encoded beside it.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        dtype: float8_e4m3fn, float8_e5m2, or float16 (see scale_max in dtype.h).
        scale: decode scale(s) to use, float32 and positive; None chooses amax / finite_max just in
            time.
        granularity: "tensor", "row", "block" (1 x `block` along the last axis) or "tile"
            (128 x 128 of a matrix).
        power_of_two: round chosen scales up to a power of two (FP8-LM, section 2.2).
        rounding: "nearest" (ties to even) or "stochastic" (Philox: seed and element index).
        history: float32 [17] state of delayed scaling, read and updated; excludes `scale`.

    Raises:
        ValueError: an unknown rounding; a scale on the CPU that is not positive and finite.
        RuntimeError: types, shapes or granularities that do not fit, named with what came.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'quantize: rounding must be "nearest" or "stochastic", got {rounding!r}')
    check_scale("quantize", scale)
    q, scale, amax = _ops.quantize(
        x, dtype, scale, history, granularity, block, power_of_two, rounding == "stochastic", seed
    )
    return ScaledTensor(q, scale, amax, x.dtype, Layout.of(dtype, granularity, block))


@fake("quantize")
def _(x, dtype, scale=None, history=None, granularity="tensor", block=128, power_of_two=True,
      stochastic=False, seed=0):  # fmt: skip
    shape = Layout.of(dtype, granularity, block).scale_shape(x.shape)
    q = x.new_empty(x.shape, dtype=dtype)
    return q, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def dequantize(t: ScaledTensor, dtype: torch.dtype | None = None) -> Tensor:
    """scale * q as a plain tensor of `dtype` (default: t's logical dtype)."""
    return t.dequantize(dtype)


@fake("dequantize")
def _(q, scale, dtype, granularity="tensor", block=128):
    return q.new_empty(q.shape, dtype=dtype)


def cast_transpose(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None,
    *,
    power_of_two: bool = True,
    history: Tensor | None = None,
) -> tuple[ScaledTensor, ScaledTensor]:
    """Both GEMM layouts of a matrix from one read: q [R, C] and qt [C, R], one scale and amax.

    Arguments and errors as `quantize`. Raises RuntimeError if x is not a matrix.
    """
    check_scale("cast_transpose", scale)
    q, qt, scale, amax = _ops.cast_transpose(x, dtype, scale, history, power_of_two)
    return ScaledTensor(q, scale, amax, x.dtype), ScaledTensor(qt, scale, amax, x.dtype)


@fake("cast_transpose")
def _(x, dtype, scale=None, history=None, power_of_two=True):
    rows, cols = x.shape
    scalar = x.new_empty([], dtype=torch.float32)
    return (
        x.new_empty([rows, cols], dtype=dtype),
        x.new_empty([cols, rows], dtype=dtype),
        scalar,
        torch.empty_like(scalar),
    )


def cast_layouts(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    granularity: str = "block",
    *,
    power_of_two: bool = False,
    tiles_t: bool = False,
) -> tuple[ScaledTensor, ScaledTensor]:
    """A matrix as products read it: x and its transpose, each with scales of its own. x is read
    once, or with scales of rows twice.

    Args:
        x: float32, float16 or bfloat16 [R, C].
        dtype: float8_e4m3fn or float8_e5m2.
        granularity: "row"; "block", 1 x 128 along each result's last axis; or "tile", 128 x 128,
            whose codes are the same in both.
        tiles_t: beside "block", qt has scales of tiles, a 128th of the bytes.

    Returns q [R, C] and qt [C, R], both axes padded with zeros to multiples of 16. A scale is NaN
    where one of its values is not finite, so that products show it; there is no amax.

    Raises:
        RuntimeError: types, shapes or granularities that do not fit, named with what came.
    """
    parts = _ops.cast_layouts(x, dtype, granularity, True, True, power_of_two, tiles_t)
    return both_layouts(*parts, x.dtype, granularity, tiles_t)


def both_layouts(q, scale, qt, qt_scale, dtype: torch.dtype, granularity: str, tiles_t: bool):
    """The two tensors of the results of an op that writes layouts."""
    grains = granularity, "tile" if tiles_t else granularity
    return tuple(
        ScaledTensor(codes, scales, None, dtype, Layout.of(codes.dtype, grain))
        for codes, scales, grain in zip((q, qt), (scale, qt_scale), grains, strict=True)
    )


@fake("cast_layouts")
def _(x, dtype, granularity, rows=True, columns=True, power_of_two=False, tiles_t=False):
    return fake_layouts(x, *x.shape, dtype, granularity, rows, columns, tiles_t)


def fake_layouts(like, rows, cols, dtype, granularity="block", q=True, qt=True, tiles_t=False):
    """Codes and scales of both layouts of a matrix [rows, cols]."""
    grains, results = (granularity, "tile" if tiles_t else granularity), []
    for wanted, shape, grain in zip((q, qt), ((rows, cols), (cols, rows)), grains, strict=True):
        shape = [(n + 15) // 16 * 16 for n in shape] if wanted else [0]
        scales = Layout.of(dtype, grain).scale_shape(shape) if wanted else [0]
        results += [like.new_empty(shape, dtype=dtype), like.new_empty(scales, dtype=torch.float32)]
    return tuple(results)


def _both_layouts(like, rows, cols, dtype):
    """q and qt padded for `gemm`, scale and amax."""
    rows, cols = ((n + 15) // 16 * 16 for n in (rows, cols))
    q, qt = (like.new_empty(shape, dtype=dtype) for shape in ([rows, cols], [cols, rows]))
    return q, qt, *(like.new_empty([], dtype=torch.float32) for _ in range(2))
