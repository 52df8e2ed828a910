"""The fake kernels of `linear` and `linear_backward`: a layer's casts and products as one op each
way. nn/product.py calls them.

linear(x [..., K], codes, scale, weight, weight_scale, bias [N], n, ...):
    y = x @ weight.T + bias, [..., N] in `out_dtype`. Where `codes` and `scale` are given, codes
    [M16, K16] are x in FP8, padded to multiples of 16; else x is cast to `input_dtype`, under
    `history` where there is one. Where `weight_scale` is given, weight is FP8 [N16, K16]; else
    [N, K] (or [K, N], if `input_major`) in a float type, and is cast to `weight_dtype`. The
    results q, qt (where `both`), used_scale and used_weight_scale are what was cast here; empty,
    where it was given. A scale of a value that is not finite is NaN.

linear_backward(dy [..., N], codes, codes_t, scale, weight, weight_scale, xt, x_scale, ...):
    dx = dy @ weight, [..., K] in `dx_dtype`, empty without `weight`; dw = dy.T @ x, [N, K] (or
    [K, N]), empty without `xt`: plain in `dw_dtype`, or as codes `dw_codes` with a scale and an
    amax. dy is cast to `grad_dtype` unless its codes are given. `weight` is FP8 [K16, N16], or the
    forward's weight in a float type, which is cast again under `weight_scale`. `channels` [K]
    multiply dw.

Both raise RuntimeError for arguments that do not fit.
"""

from __future__ import annotations

import math

import torch

from .fake import fake
from .quantize import _both_layouts

linear = torch.ops.quaver.linear.default
linear_backward = torch.ops.quaver.linear_backward.default


def _none(like):
    return like.new_empty([0], dtype=torch.float32)


def _scalar(like):
    return like.new_empty([], dtype=torch.float32)


@fake("linear")
def _(
    x, codes, scale, weight, weight_scale, bias, n, input_dtype, weight_dtype, out_dtype, both,
    input_major=False, history=None,
):  # fmt: skip
    q, qt, used_scale = (_none(x) for _ in range(3))
    if codes is None:
        q, qt, used_scale, _ = _both_layouts(x, math.prod(x.shape[:-1]), x.shape[-1], input_dtype)
        qt = qt if both else _none(x)
    used_weight_scale = _none(x) if weight_scale is not None else _scalar(x)
    return x.new_empty([*x.shape[:-1], n], dtype=out_dtype), q, qt, used_scale, used_weight_scale


@fake("linear_backward")
def _(
    dy, codes, codes_t, scale, weight, weight_scale, xt, x_scale, channels, n, k, grad_dtype,
    weight_dtype, dx_dtype, dw_dtype, dw_codes=None, input_major=False, history=None,
):  # fmt: skip
    dx = _none(dy) if weight is None else dy.new_empty([*dy.shape[:-1], k], dtype=dx_dtype)
    if xt is None:
        return dx, _none(dy), _none(dy), _none(dy)
    dw = dy.new_empty([k, n] if input_major else [n, k], dtype=dw_codes or dw_dtype)
    scales = (_none(dy), _none(dy)) if dw_codes is None else (_scalar(dy), _scalar(dy))
    return dx, dw, *scales
