"""Norms and activations fused with the cast of their results to 1 x 128 blocks, which products read
as they are: `normalize`, `activate` and its backward with scales of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor import ScaledTensor
from .activation import Activated, Grouped, Normalized, grouped_like
from .fake import fake
from .quantize import both_layouts, fake_layouts

_ops = torch.ops.quaver


def normalize_layouts(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    centered: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    tiles_t: bool = False,
    power_of_two: bool = True,
    block: int = 128,
) -> Normalized:
    """RMSNorm, or LayerNorm if `centered`, cast to FP8 in blocks (DeepSeek-V3, arXiv 2412.19437,
    section 3.3.2).

    The values are those of `normalize`, and q and qt those of `cast_layouts` of them in f32: each
    value is cast twice from registers, and no pass looks for an amax first.

    Args:
        x, weight, bias, eps, centered, dtype, block: as in `normalize`.
        tiles_t: qt has a scale for each 128 x 128, instead of one for each 1 x 128 of its rows.
        power_of_two: rounds scales up to powers of two.

    Returns `normalize`'s results without amaxes. The scale of values that are not all finite is
    NaN.

    Raises RuntimeError for shapes and types that do not fit.
    """
    *layouts, codes, scales, mean, rstd = _ops.normalize_layouts(
        x, weight, bias, eps, centered, dtype, tiles_t, power_of_two, block
    )
    q, qt = both_layouts(*layouts, x.dtype, "block", tiles_t)
    return Normalized(q, qt, Grouped(codes, scales, block), mean, rstd)


@fake("normalize_layouts")
def _(x, weight, bias, eps, centered, dtype, tiles_t=False, power_of_two=True, block=128):
    rows, cols = x.shape
    mean, rstd = (x.new_empty([n], dtype=torch.float32) for n in (rows if centered else 0, rows))
    layouts = fake_layouts(x, rows, cols, dtype, tiles_t=tiles_t)
    return *layouts, *grouped_like(x, block), mean, rstd


def activate_layouts(
    x: Tensor,
    up: Tensor | None = None,
    kind: str = "silu",
    channel_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    tiles_t: bool = False,
    power_of_two: bool = True,
    block: int = 128,
) -> Activated:
    """f(x) * up, or f(x), cast to FP8 in blocks: to `activate` what `normalize_layouts` is to
    `normalize`.

    Args:
        x, up, kind, channel_scale, dtype, block: as in `activate`.
        tiles_t, power_of_two: as in `normalize_layouts`.

    Raises RuntimeError for shapes, types and kinds that do not fit.
    """
    *layouts, xq, xscale, uq, uscale, channel_amax = _ops.activate_layouts(
        x, up, kind, channel_scale, dtype, tiles_t, power_of_two, block
    )
    return Activated(
        *both_layouts(*layouts, x.dtype, "block", tiles_t),
        Grouped(xq, xscale, block),
        None if up is None else Grouped(uq, uscale, block),
        None if channel_scale is None else channel_amax,
    )


@fake("activate_layouts")
def _(x, up, kind, channel_scale, dtype, tiles_t=False, power_of_two=True, block=128):
    rows, cols = x.shape
    none = [x.new_empty([0], dtype=t) for t in (torch.float8_e4m3fn, torch.uint8)]
    return (
        *fake_layouts(x, rows, cols, dtype, tiles_t=tiles_t),
        *grouped_like(x, block),
        *(none if up is None else grouped_like(x, block)),
        x.new_empty([0 if channel_scale is None else cols], dtype=torch.float32),
    )


def activate_backward_layouts(
    dy: Tensor,
    x: Grouped,
    up: Grouped | None = None,
    kind: str = "silu",
    channel_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    power_of_two: bool = True,
) -> tuple[ScaledTensor, ScaledTensor, ScaledTensor | None, ScaledTensor | None]:
    """dx, dx.T, dup and dup.T of `activate` in FP8, each in 1 x 128 blocks of its rows.

    Args:
        dy: [R, C] float32, float16 or bfloat16.
        x, up, kind, channel_scale: of `activate_layouts`.
        power_of_two: as in `normalize_layouts`.

    Raises RuntimeError for shapes, types and kinds that do not fit.
    """
    parts = _ops.activate_backward_layouts(
        dy, x.codes, x.scale, up and up.codes, up and up.scale, kind, channel_scale, x.block, dtype,
        power_of_two,
    )  # fmt: skip
    dx = both_layouts(*parts[:4], dy.dtype, "block", False)
    return *dx, *(
        (None, None) if up is None else both_layouts(*parts[4:], dy.dtype, "block", False)
    )


@fake("activate_backward_layouts")
def _(dy, xq, xscale, uq, uscale, kind, channel_scale, block, dtype, power_of_two=True):
    rows, cols = dy.shape
    wanted = uq is not None
    dup = fake_layouts(dy, rows, cols, dtype, q=wanted, qt=wanted)
    return *fake_layouts(dy, rows, cols, dtype), *dup
