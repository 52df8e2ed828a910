"""FP8 modules that compute in their input's precision for a while (`quaver.watch`).

A linear layer multiplies in its output's dtype, bf16 under autocast, and a norm or an MLP runs the
forward that it had before `convert`. Parameters, their gradients' formats and state dicts stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import quantize
from ..recipe import E4M3
from ..rows import Rows
from ..tensor import ScaledTensor
from .cast import matrix, output_dtype
from .first_order import FirstOrder
from .rows import chosen_rows


def multiply(layer: nn.Module, x: Tensor) -> Tensor:
    """The product of x and a converted linear layer's weight, without FP8 but for what x or the
    weight is stored in."""
    rule, whole = layer.rule, not getattr(layer.weight, "is_transient", False)
    return _Product.apply(
        x, layer.weight, layer.bias, output_dtype(x), rule.weight_grad if whole else "f32",
        rule.grad_accumulate, layer.input_major,
    )  # fmt: skip


class _Product(FirstOrder):
    """x @ weight.T + bias in `dtype`; the gradients are those of nn/product.py's Product, and the
    arguments too."""

    @staticmethod
    def forward(ctx, x, weight, bias, dtype, weight_grad, grad_accumulate, input_major):
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.weight_grad, ctx.input_major = dtype, weight_grad, input_major
        ctx.grad_accumulate, ctx.chosen = grad_accumulate, chosen_rows(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(_values(x, dtype), _matrix(ctx, weight), bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        dy = _values(dy, ctx.dtype)
        flat = matrix(dy)
        with torch.autocast(dy.device.type, enabled=False):
            if needs_x:
                dx = (dy @ _matrix(ctx, weight)).to(x.dtype)
            if needs_weight:
                dw = _weight_gradient(ctx, flat, matrix(_values(x, ctx.dtype)), weight)
            if needs_bias:
                db = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None


def _values(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.dequantize(dtype) if isinstance(x, ScaledTensor) else x.to(dtype)


def _matrix(ctx, weight: Tensor) -> Tensor:
    """The weight [N, K] in the product's dtype."""
    weight = _values(weight.detach(), ctx.dtype)
    return weight.t() if ctx.input_major else weight


def _weight_gradient(ctx, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dy [M, N] and x [M, K] give the weight's gradient as the recipe leaves it in `.grad`."""
    left, right = (x, dy) if ctx.input_major else (dy, x)
    if ctx.chosen is not None:
        values = left.index_select(1, ctx.chosen).t() @ right
        return Rows(values.to(weight.dtype), ctx.chosen, weight.shape[0])
    dw = left.t() @ right
    if ctx.weight_grad == "e4m3":
        dw = quantize(dw.to(weight.dtype), E4M3)
        if ctx.grad_accumulate != "bf16":
            dw.grad_format = ctx.grad_accumulate
        return dw
    if ctx.weight_grad == "bf16" and isinstance(weight, ScaledTensor):
        dw = dw.bfloat16()
        amax = dw.abs().amax().float()
        return ScaledTensor(dw, torch.ones_like(amax), amax, weight.dtype)
    return dw.to(weight.dtype)
