"""The one autograd Function of linear layers: three FP8 products over given casts."""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipe import E4M3
from ..rows import Rows
from ..tensor import ScaledTensor
from .cast import Cast, cast, matrix, quantized
from .first_order import FirstOrder
from .rows import chosen_rows
from .weight import cast_weight

_ops = torch.ops.quaver


class Exchange:
    """The messages of ranks around a product. This class sends none; tensor parallelism overrides
    it."""

    def reduce_output(self, y: Tensor) -> Tensor:
        """The layer's output [..., S / ranks, N] of the local product [..., S, N]."""
        return y

    def cast_gradient(self, dy: Tensor, dtype: torch.dtype, history: Tensor | None,
                      both: bool) -> Cast:  # fmt: skip
        """The FP8 output gradient [M, N] of the local product."""
        ready = quantized(dy, dtype)
        return cast(matrix(dy), dtype, both=both, history=history) if ready is None else ready

    def start_gather(self, kept: Tensor) -> None:
        """Called before dgrad, so that it overlaps with what `transposed_input` waits for."""

    def transposed_input(self, kept: Tensor) -> Tensor:
        """The transposed codes [K, M] of the input, from what forward saved."""
        return kept


_SINGLE = Exchange()


class Product(FirstOrder):
    """x @ weight.T + bias. Everything was cast before, so that layers may share it.

    Args:
        x, weight, bias: [..., K], [N, K] (or [K, N], where `input_major`) and [N]. Autograd
            differentiates with respect to them; the products read the codes that follow.
        q, scale: the codes [M, K] of x.
        kept, kept_scale: what backward needs for the transposed codes of x, None if weight takes no
            gradient.
        w_q, w_scale, w_qt: the codes [N, K] of the weight, and their transpose, or None: backward
            then casts the weight again, which autograd checks for changes in between.
        channels: float32 [K], what multiplied the weight and divided x.
        history: delayed scaling of the output gradient.
        out_dtype: bfloat16 or float32, of the result and of x's gradient before it is x's dtype.
        grad_dtype: the FP8 format of the output gradient.
        weight_grad, grad_accumulate: as in LinearRecipe.
        exchange: None on a single rank.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, q, scale, kept, kept_scale, w_q, w_scale, w_qt, channels, history,
        out_dtype, grad_dtype, weight_grad, grad_accumulate, input_major=False, exchange=None,
    ):  # fmt: skip
        ctx.exchange = exchange = exchange or _SINGLE
        n = weight.shape[1 if input_major else 0]
        ctx.bias_dtype = None if bias is None else bias.dtype
        if bias is not None and w_q.shape[0] != n:
            bias = F.pad(bias.detach(), (0, w_q.shape[0] - n))
        y = _ops.gemm(q, scale, w_q, w_scale, bias, out_dtype)
        # No view, which autograd would not let callers write in place: nn.ReLU(inplace=True).
        y = torch.ops.aten._unsafe_view(
            y[: math.prod(x.shape[:-1]), :n].contiguous(), (*x.shape[:-1], n)
        )
        recast = w_qt is None and ctx.needs_input_grad[0]
        ctx.save_for_backward(kept, kept_scale, weight if recast else None)
        # Copies are not saved tensors, because they are written in place with the weight; backward
        # checks the weight's version instead.
        copied = w_qt is not None and ctx.needs_input_grad[0]
        ctx.weight, ctx.version = (weight, weight._version) if copied else (None, None)
        ctx.w_format, ctx.w_scale, ctx.w_qt = w_q.dtype, w_scale, w_qt
        ctx.channels, ctx.history, ctx.out_dtype = channels, history, out_dtype
        ctx.grad_dtype, ctx.weight_grad, ctx.input_major = grad_dtype, weight_grad, input_major
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.low_weight, ctx.grad_accumulate = isinstance(weight, ScaledTensor), grad_accumulate
        ctx.n, ctx.chosen = n, chosen_rows(weight)
        return exchange.reduce_output(y)

    @staticmethod
    def backward(ctx, dy):
        kept, kept_scale, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_weight:
            ctx.exchange.start_gather(kept)
        if needs_bias:
            db = matrix(dy).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        if needs_x or needs_weight:
            g = ctx.exchange.cast_gradient(dy, ctx.grad_dtype, ctx.history, needs_weight)
        if needs_x:
            rows, k = math.prod(ctx.x_shape[:-1]), ctx.x_shape[-1]
            dx = _ops.gemm(
                g.q, g.scale, _transposed_weight(ctx, weight), ctx.w_scale, None, ctx.out_dtype,
                False,
            )  # fmt: skip
            dx = dx[:rows, :k].reshape(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:
            dw = _weight_gradient(ctx, g, ctx.exchange.transposed_input(kept), kept_scale)
        return dx, dw, db, *(None,) * (len(ctx.needs_input_grad) - 3)


_registering = threading.Lock()


def register_product() -> None:
    """Makes the compiler take the Function whole, because its backward makes a ScaledTensor, and
    FlopCounterMode count its products. Not at import, because this imports the compiler."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    with _registering:
        torch.compiler.allow_in_graph(Product)
        if _ops.gemm not in flop_registry:
            register_flop_formula(_ops.gemm)(_flops)


def _flops(a, scale_a, b, *args, out_shape=None, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[0]


def _transposed_weight(ctx, weight: Tensor | None) -> Tensor:
    """The codes [K, N] that forward's weight had."""
    if ctx.w_qt is None:
        codes = cast_weight(
            weight, ctx.w_format, both=not ctx.input_major, scale=ctx.w_scale, channels=ctx.channels
        )
        return codes.q if ctx.input_major else codes.qt
    if ctx.weight._version != ctx.version:
        raise RuntimeError(
            "Linear: the weight was changed in place between this forward and its backward"
        )
    return ctx.w_qt


def _weight_gradient(ctx, g: Cast, xt: Tensor, x_scale: Tensor) -> Tensor:
    """The weight's gradient as the recipe leaves it in `.grad`."""
    kind = ctx.weight_grad
    product = {"f32": torch.float32, "bf16": torch.bfloat16, "e4m3": ctx.out_dtype}[kind]
    a, b = (g.qt, g.qt_scale), (xt, x_scale)
    rows, cols = ctx.n, ctx.x_shape[-1]
    if ctx.input_major:
        a, b, rows, cols = b, a, cols, rows
    if ctx.chosen is not None:
        return _chosen_rows(ctx, a, b, product, rows, cols)
    dw = _ops.gemm(*a, *b, None, product, False)[:rows, :cols]
    if ctx.channels is not None:
        dw = dw * ctx.channels.to(dw.dtype)
    if kind == "e4m3":
        q, scale, amax = _ops.quantize(dw, E4M3)
        grad = ScaledTensor(q, scale, amax, ctx.weight_dtype)
        if ctx.grad_accumulate != "bf16":
            grad.grad_format = ctx.grad_accumulate
        return grad
    if kind == "bf16" and ctx.low_weight:
        dw = dw.contiguous()
        amax = dw.abs().amax().float()
        return ScaledTensor(dw, torch.ones_like(amax), amax, ctx.weight_dtype)
    return dw.to(ctx.weight_dtype)


def _chosen_rows(ctx, a, b, product: torch.dtype, rows: int, cols: int) -> Rows:
    """The rows of the weight's gradient that an optimizer has chosen: those of `a` are gathered
    before the product (Grass, arXiv 2406.17660)."""
    q, scale = a
    count = ctx.chosen.numel()
    taken = q.view(torch.uint8).index_select(0, ctx.chosen)
    taken = F.pad(taken, (0, 0, 0, -count % 16)).view(q.dtype)
    dw = _ops.gemm(taken, scale, *b, None, product, False)[:count, :cols]
    if ctx.channels is not None:
        dw = dw * ctx.channels.to(dw.dtype)
    return Rows(dw.to(ctx.weight_dtype).contiguous(), ctx.chosen, rows)
