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
from .cast import Cast, cast, matrix, quantized, row_scales
from .first_order import FirstOrder
from .rows import chosen_rows
from .weight import cast_weight, channels_of

_ops = torch.ops.quaver


class Exchange:
    """The messages of ranks around a product, which tensor parallelism overrides. The layers of a
    single rank have no Exchange."""

    def reduce_output(self, y: Tensor) -> Tensor:
        """The layer's output [..., S / ranks, N] of the local product [..., S, N]."""
        return y

    def cast_gradient(self, dy: Tensor, dtype: torch.dtype, history: Tensor | None, grain: str,
                      both: bool) -> Cast | None:  # fmt: skip
        """The FP8 output gradient [M, N] of the local product, with its transpose where `both`.
        None: the product casts it."""

    def start_gather(self, kept: Tensor, scale: Tensor) -> None:
        """Called before dgrad, so that it overlaps with what `transposed_input` waits for."""

    def transposed_input(self, kept: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The transposed codes [K, M] of the input, and their scale, from what forward saved as qt
        and qt_scale."""
        return kept, scale


class Product(FirstOrder):
    """x @ weight.T + bias, in one op each way (ops/linear.py).

    Args:
        x, weight, bias: [..., K], [N, K] (or [K, N], where `input_major`) and [N]. Autograd
            differentiates with respect to them.
        given: x in FP8, as q, scale, qt and qt_scale of a Cast: the op casts nothing. Four None, or
            q None: it casts x.
        w_q, w_scale, w_qt, w_qt_scale: the codes [N, K] of the weight and their transpose, as a
            Cast. w_q None: the op casts the weight. w_qt None: backward casts it again, and
            autograd checks for changes in between.
        channels: float32 [K], what multiplied the weight and divided x.
        input_history, grad_history: delayed scaling of the input and of the output gradient.
        formats: of the input, of the weight and of the output gradient.
        out_dtype: bfloat16 or float32, of the result and of x's gradient before it is x's dtype.
        weight_grad, grad_accumulate: as in LinearRecipe.
        learns: whether backward forms the weight's gradient.
        exchange: None on a single rank.
        keep: is called with the Cast that is made of x here.
        grain, power_of_two: of the scales that are chosen here. Operands whose scales are not of
            the tensor are cast before the op.
        weight_product: "bf16" keeps x, and multiplies it with dy for the weight's gradient.
        kept: "tile" for a transpose of x, cast here, whose scales are those of tiles.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, q, scale, qt, qt_scale, w_q, w_scale, w_qt, w_qt_scale, channels,
        input_history, grad_history, input_dtype, weight_dtype, grad_dtype, out_dtype, weight_grad,
        grad_accumulate, learns, input_major=False, exchange=None, keep=None, grain="tensor",
        power_of_two=True, weight_product="fp8", kept="grain",
    ):  # fmt: skip
        n = weight.shape[1 if input_major else 0]
        values = _values(x, q)
        ctx.grain, ctx.power_of_two, ctx.weight_product = grain, power_of_two, weight_product
        ctx.input_major, ctx.weight_format, ctx.channels = input_major, weight_dtype, channels
        if grain != "tensor" and q is None:
            both = learns and weight_product == "fp8"
            q, scale, qt, qt_scale = made = cast(
                matrix(values), input_dtype, both=both, grain=grain, power_of_two=power_of_two,
                tiles_t=kept == "tile",
            )  # fmt: skip
            if keep is not None:
                keep(made)
        if grain != "tensor" and w_q is None:
            w_q, w_scale = _cast_weight(ctx, weight)[:2]
        y, made, made_t, made_scale, weight_scale = linear(
            values, q, scale, weight if w_q is None else w_q, w_scale, bias, n, input_dtype,
            weight_dtype, out_dtype, learns, input_major, input_history,
        )  # fmt: skip
        if q is None:
            qt, qt_scale = made_t if learns else None, made_scale
            if keep is not None:
                keep(Cast(made, made_scale, qt, made_scale))
        needs_x = ctx.needs_input_grad[0]
        if weight_product == "bf16" and learns:
            qt, qt_scale = x, None
        ctx.save_for_backward(qt, qt_scale, weight if w_qt is None and needs_x else None)
        # Copies are not saved tensors, because they are written in place with the weight; backward
        # checks the weight's version instead.
        copied = w_qt is not None and needs_x
        ctx.weight, ctx.version = (weight, weight._version) if copied else (None, None)
        ctx.w_scale = w_scale if w_q is not None else weight_scale
        ctx.w_qt, ctx.w_qt_scale = w_qt, w_qt_scale
        ctx.history, ctx.out_dtype = grad_history, out_dtype
        ctx.grad_dtype, ctx.weight_grad = grad_dtype, weight_grad
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.low_weight, ctx.grad_accumulate = isinstance(weight, ScaledTensor), grad_accumulate
        ctx.n, ctx.chosen = n, chosen_rows(weight)
        ctx.bias_dtype, ctx.exchange = None if bias is None else bias.dtype, exchange
        return y if exchange is None else exchange.reduce_output(y)

    @staticmethod
    def backward(ctx, dy):
        kept, kept_scale, weight = ctx.saved_tensors
        if ctx.input_major and kept is not None and kept_scale is not None:
            kept_scale = row_scales(kept_scale, len(kept))
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        db = None
        if needs_bias:
            db = matrix(dy).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        wt = _transposed_weight(ctx, weight) if needs_x else None
        xt = kept if needs_weight else None
        if ctx.exchange is not None:
            dx, dw = _exchanged(ctx, dy, wt, xt, kept_scale)
        elif needs_weight and ctx.weight_product == "bf16":
            g = _cast_gradient(ctx, dy, both=False) if needs_x else None
            dx, _ = _gradients(ctx, dy, g, wt, None, None)
            dw = _plain_weight_gradient(ctx, dy, kept)
        elif needs_weight and ctx.chosen is not None:
            g = _cast_gradient(ctx, dy, both=True)
            dx, _ = _gradients(ctx, dy, g, wt, None, None)
            dw = _chosen_rows(ctx, g, xt, kept_scale)
        elif needs_x or needs_weight:
            g = quantized(dy, ctx.grad_dtype)
            if g is None and ctx.grain != "tensor":
                g = _cast_gradient(ctx, dy, both=needs_weight)
            dx, dw = _gradients(ctx, dy, g, wt, xt, kept_scale)
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


def _cast_gradient(ctx, dy: Tensor, both: bool) -> Cast:
    ready = quantized(dy, ctx.grad_dtype)
    if ready is not None:
        return ready
    return cast(
        matrix(dy), ctx.grad_dtype, both=both, history=ctx.history, grain=ctx.grain,
        power_of_two=ctx.power_of_two,
    )  # fmt: skip


def _exchanged(ctx, dy, wt, xt, x_scale):
    """dx and dw, with the messages of ctx.exchange while dgrad runs."""
    if xt is not None:
        ctx.exchange.start_gather(xt, x_scale)
    if wt is None and xt is None:
        return None, None
    both = xt is not None
    g = ctx.exchange.cast_gradient(dy, ctx.grad_dtype, ctx.history, ctx.grain, both)
    if g is None:
        g = _cast_gradient(ctx, dy, both)
    dx, _ = _gradients(ctx, g.q, g, wt, None, None)
    if dx is not None:
        rows, k = math.prod(ctx.x_shape[:-1]), ctx.x_shape[-1]
        dx = dx[:rows, :k].reshape(ctx.x_shape)
    if xt is None:
        return dx, None
    xt, x_scale = ctx.exchange.transposed_input(xt, x_scale)
    if ctx.chosen is not None:
        return dx, _chosen_rows(ctx, g, xt, x_scale)
    return dx, _gradients(ctx, g.q, g, None, xt, x_scale)[1]


def _gradients(ctx, dy, g, wt, xt, x_scale):
    """dx, where there is a transposed weight with its scale, and dw as the recipe leaves it in
    `.grad`, where there is a transposed input. dy [..., N] is cast, unless `g` has its codes."""
    if wt is None and xt is None:
        return None, None
    kind = ctx.weight_grad
    product = {"f32": torch.float32, "bf16": torch.bfloat16, "e4m3": ctx.out_dtype}[kind]
    q, scale, qt, qt_scale = (None, None, None, None) if g is None else g
    if qt_scale is not scale and xt is not None:  # the op takes one scale of both layouts
        if wt is not None:
            dx, _ = _gradients(ctx, dy, g, wt, None, None)
            return dx, _gradients(ctx, dy, g, None, xt, x_scale)[1]
        scale = qt_scale
    wt, wt_scale = (None, None) if wt is None else wt
    dx, dw, dw_scale, dw_amax = linear_backward(
        _values(dy, q), q, qt, scale, wt, wt_scale, xt,
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
                          (_ops.linear_backward, _backward_flops),
                          (_ops.grouped_gemm, _grouped_flops),
                          (_ops.grouped_gemm_weight, _grouped_weight_flops)):  # fmt: skip
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


def _grouped_flops(a, scale_a, b, scale_b, ends, n, *args, out_shape=None) -> int:
    return 2 * a[0] * a[1] * n


def _grouped_weight_flops(a, scale_a, b, scale_b, ends, m, n, *args, out_shape=None) -> int:
    rows = a[1] - 16 * ends[0]  # of x, in whole sixteens: an operand has 16 more for each expert
    return 2 * rows * m * n


def _cast_weight(ctx, weight: Tensor, transposed: bool = False) -> Cast:
    """The weight [N, K] as the operand that `transposed` says; the other one may be missing."""
    columns = transposed != ctx.input_major
    codes = cast_weight(
        weight, ctx.weight_format, rows=not columns, both=columns,
        scale=ctx.w_scale if transposed and ctx.grain == "tensor" else None,
        channels=channels_of(ctx.channels, ctx.input_major),
        grain="tile" if ctx.grain == "block" else ctx.grain, power_of_two=ctx.power_of_two,
    )  # fmt: skip
    return codes.transposed() if ctx.input_major else codes


def _transposed_weight(ctx, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes [K, N] that forward's weight had, or a plain weight, which the op casts again; and
    the scale, the forward's where there is one of the tensor."""
    if ctx.w_qt is None:
        if ctx.channels is None and not ctx.low_weight and ctx.grain == "tensor":
            return weight, ctx.w_scale
        return _cast_weight(ctx, weight, transposed=True)[2:]
    if ctx.weight._version != ctx.version:
        raise RuntimeError(
            "Linear: the weight was changed in place between this forward and its backward"
        )
    return ctx.w_qt, ctx.w_qt_scale


def _plain_weight_gradient(ctx, dy: Tensor, x: Tensor) -> Tensor | Rows:
    """dy.T @ x in bf16 (weight_product)."""
    a, b = (matrix(t.to(torch.bfloat16)) for t in (dy, x))
    if ctx.input_major:
        a, b = b, a
    a = a.t()
    if ctx.chosen is not None:
        dw = a.index_select(0, ctx.chosen) @ b
        return Rows(dw.to(ctx.weight_dtype), ctx.chosen, len(a))
    return (a @ b).to(ctx.weight_dtype)


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
    if scale.numel() > 1:
        scale = F.pad(scale.index_select(0, ctx.chosen), (0, 0, 0, -count % 16), value=1.0)
    dw = _ops.gemm(taken, scale, *b, None, product, False)[:count, :cols]
    if ctx.channels is not None:
        by = channels_of(ctx.channels, ctx.input_major)
        dw = dw * (by[ctx.chosen] if ctx.input_major else by).to(dw.dtype)
    return Rows(dw.to(ctx.weight_dtype).contiguous(), ctx.chosen, rows)
