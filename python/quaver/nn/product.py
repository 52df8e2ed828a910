"""The one autograd Function of linear layers: three FP8 products over given casts."""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import linear, linear_backward
from ..recipe import E4M3
from ..rows import Rows
from ..tensor import ScaledTensor
from .cast import Cast, cast, matrix, quantized
from .first_order import FirstOrder
from .rows import chosen_rows
from .weight import cast_weight

_ops = torch.ops.quaver


class Exchange:
    """The messages of ranks around a product, which tensor parallelism overrides. The layers of a
    single rank have no Exchange."""

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


class Product(FirstOrder):
    """x @ weight.T + bias, in one op each way (ops/linear.py).

    Args:
        x, weight, bias: [..., K], [N, K] (or [K, N], where `input_major`) and [N]. Autograd
            differentiates with respect to them.
        given: x in FP8, as q, scale, qt and qt_scale of a Cast: the op casts nothing. Four None, or
            q None: it casts x.
        w_q, w_scale, w_qt: the codes [N, K] of the weight, their scale, and their transpose. w_q
            None: the op casts the weight. w_qt None: backward casts it again, and autograd checks
            for changes in between.
        channels: float32 [K], what multiplied the weight and divided x.
        input_history, grad_history: delayed scaling of the input and of the output gradient.
        formats: of the input, of the weight and of the output gradient.
        out_dtype: bfloat16 or float32, of the result and of x's gradient before it is x's dtype.
        weight_grad, grad_accumulate: as in LinearRecipe.
        learns: whether backward forms the weight's gradient.
        exchange: None on a single rank.
        keep: is called with the Cast that the op made of x.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, q, scale, qt, qt_scale, w_q, w_scale, w_qt, channels, input_history,
        grad_history, input_dtype, weight_dtype, grad_dtype, out_dtype, weight_grad,
        grad_accumulate, learns, input_major=False, exchange=None, keep=None,
    ):  # fmt: skip
        n = weight.shape[1 if input_major else 0]
        values = _values(x, q)
        y, made, made_t, made_scale, weight_scale = linear(
            values, q, scale, weight if w_q is None else w_q, w_scale, bias, n, input_dtype,
            weight_dtype, out_dtype, learns, input_major, input_history,
        )  # fmt: skip
        if q is None:
            qt, qt_scale = made_t if learns else None, made_scale
            if keep is not None:
                keep(Cast(made, made_scale, qt, made_scale))
        needs_x = ctx.needs_input_grad[0]
        ctx.save_for_backward(qt, qt_scale, weight if w_qt is None and needs_x else None)
        # Copies are not saved tensors, because they are written in place with the weight; backward
        # checks the weight's version instead.
        copied = w_qt is not None and needs_x
        ctx.weight, ctx.version = (weight, weight._version) if copied else (None, None)
        ctx.w_scale, ctx.w_qt = w_scale if w_q is not None else weight_scale, w_qt
        ctx.channels, ctx.history, ctx.out_dtype = channels, grad_history, out_dtype
        ctx.weight_format, ctx.grad_dtype, ctx.weight_grad = weight_dtype, grad_dtype, weight_grad
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.low_weight, ctx.grad_accumulate = isinstance(weight, ScaledTensor), grad_accumulate
        ctx.n, ctx.chosen, ctx.input_major = n, chosen_rows(weight), input_major
        ctx.bias_dtype, ctx.exchange = None if bias is None else bias.dtype, exchange
        return y if exchange is None else exchange.reduce_output(y)

    @staticmethod
    def backward(ctx, dy):
        kept, kept_scale, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        db = None
        if needs_bias:
            db = matrix(dy).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        wt = _transposed_weight(ctx, weight) if needs_x else None
        xt = kept if needs_weight else None
        if ctx.exchange is not None:
            dx, dw = _exchanged(ctx, dy, wt, xt, kept_scale)
        elif needs_weight and ctx.chosen is not None:
            g = Exchange.cast_gradient(None, dy, ctx.grad_dtype, ctx.history, True)
            dx, _ = _gradients(ctx, dy, g, wt, None, None)
            dw = _chosen_rows(ctx, g, xt, kept_scale)
        elif needs_x or needs_weight:
            dx, dw = _gradients(ctx, dy, quantized(dy, ctx.grad_dtype), wt, xt, kept_scale)
        else:
            dx = dw = None
        if dx is not None and dx.dtype != ctx.x_dtype:
            dx = dx.to(ctx.x_dtype)
        return dx, dw, db, *(None,) * (len(ctx.needs_input_grad) - 3)


def _values(x: Tensor, q: Tensor | None) -> Tensor:
    """What the op takes as x, whose codes are `q` or, where that is None, cast by the op."""
    if not isinstance(x, ScaledTensor):
        return x
    return x.dequantize() if q is None else x.qdata


def _exchanged(ctx, dy, wt, xt, x_scale):
    """dx and dw, with the messages of ctx.exchange while dgrad runs."""
    if xt is not None:
        ctx.exchange.start_gather(xt)
    if wt is None and xt is None:
        return None, None
    g = ctx.exchange.cast_gradient(dy, ctx.grad_dtype, ctx.history, xt is not None)
    dx, _ = _gradients(ctx, g.q, g, wt, None, None)
    if dx is not None:
        rows, k = math.prod(ctx.x_shape[:-1]), ctx.x_shape[-1]
        dx = dx[:rows, :k].reshape(ctx.x_shape)
    if xt is None:
        return dx, None
    xt = ctx.exchange.transposed_input(xt)
    if ctx.chosen is not None:
        return dx, _chosen_rows(ctx, g, xt, x_scale)
    return dx, _gradients(ctx, g.q, g, None, xt, x_scale)[1]


def _gradients(ctx, dy, g, wt, xt, x_scale):
    """dx, where there is a transposed weight, and dw as the recipe leaves it in `.grad`, where
    there is a transposed input. dy [..., N] is cast, unless `g` has its codes."""
    if wt is None and xt is None:
        return None, None
    kind = ctx.weight_grad
    product = {"f32": torch.float32, "bf16": torch.bfloat16, "e4m3": ctx.out_dtype}[kind]
    q, scale, qt = (None, None, None) if g is None else g[:3]
    dx, dw, dw_scale, dw_amax = linear_backward(
        _values(dy, q), q, qt, scale, wt, None if wt is None else ctx.w_scale, xt,
        None if xt is None else x_scale, ctx.channels, ctx.n, ctx.x_shape[-1],
        ctx.grad_dtype, ctx.weight_format, ctx.out_dtype, product,
        E4M3 if kind == "e4m3" else None, ctx.input_major, ctx.history,
    )  # fmt: skip
    dx = None if wt is None else dx
    if xt is None:
        return dx, None
    if kind == "e4m3":
        dw = ScaledTensor(dw, dw_scale, dw_amax, ctx.weight_dtype)
        if ctx.grad_accumulate != "bf16":
            dw.grad_format = ctx.grad_accumulate
    elif kind == "bf16" and ctx.low_weight:
        amax = dw.abs().amax().float()
        dw = ScaledTensor(dw, torch.ones_like(amax), amax, ctx.weight_dtype)
    elif dw.dtype != ctx.weight_dtype:
        dw = dw.to(ctx.weight_dtype)
    return dx, dw


_registering = threading.Lock()


def register_product() -> None:
    """Makes the compiler take the Function whole, because its backward makes a ScaledTensor, and
    FlopCounterMode count its products. Not at import, because this imports the compiler."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    with _registering:
        torch.compiler.allow_in_graph(Product)
        for op, flops in ((_ops.gemm, _gemm_flops), (_ops.linear, _linear_flops),
                          (_ops.linear_backward, _backward_flops)):  # fmt: skip
            if op not in flop_registry:
                register_flop_formula(op)(flops)


def _gemm_flops(a, scale_a, b, *args, out_shape=None, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[0]


def _linear_flops(x, codes, scale, weight, weight_scale, bias, n, *args, out_shape=None) -> int:
    return 2 * math.prod(x) * n


def _backward_flops(
    dy, codes, codes_t, scale, weight, weight_scale, xt, x_scale, channels, n, k, *args,
    out_shape=None,
) -> int:  # fmt: skip
    return 2 * math.prod(dy) * k * ((weight is not None) + (xt is not None))


def _transposed_weight(ctx, weight: Tensor | None) -> Tensor:
    """The codes [K, N] that forward's weight had, or a plain weight, which the op casts again."""
    if ctx.w_qt is None:
        if ctx.channels is None and not ctx.low_weight:
            return weight
        codes = cast_weight(
            weight, ctx.weight_format, both=not ctx.input_major, scale=ctx.w_scale,
            channels=ctx.channels,
        )  # fmt: skip
        return codes.q if ctx.input_major else codes.qt
    if ctx.weight._version != ctx.version:
        raise RuntimeError(
            "Linear: the weight was changed in place between this forward and its backward"
        )
    return ctx.w_qt


def _chosen_rows(ctx, g: Cast, xt: Tensor, x_scale: Tensor) -> Rows:
    """The rows of the weight's gradient that an optimizer has chosen: those of the first operand
    are gathered before the product (Grass, arXiv 2406.17660)."""
    kind = ctx.weight_grad
    product = {"f32": torch.float32, "bf16": torch.bfloat16, "e4m3": ctx.out_dtype}[kind]
    (q, scale), b = (g.qt, g.qt_scale), (xt, x_scale)
    rows, cols = ctx.n, ctx.x_shape[-1]
    if ctx.input_major:
        (q, scale), b, rows, cols = b, (q, scale), cols, rows
    count = ctx.chosen.numel()
    taken = q.view(torch.uint8).index_select(0, ctx.chosen)
    taken = F.pad(taken, (0, 0, 0, -count % 16)).view(q.dtype)
    dw = _ops.gemm(taken, scale, *b, None, product, False)[:count, :cols]
    if ctx.channels is not None:
        dw = dw * ctx.channels.to(dw.dtype)
    return Rows(dw.to(ctx.weight_dtype).contiguous(), ctx.chosen, rows)
