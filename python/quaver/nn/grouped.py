"""The products of a mixture's experts: the autograd Function over grouped ops (ops/groups.py), and
the loop of Products, one for each expert, which computes the same bits."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.groups import cast_groups, cast_stack, grouped_gemm, grouped_gemm_weight
from ..tensor import ScaledTensor
from .cast import ALIGNMENT, row_scales
from .first_order import FirstOrder
from .product import Product
from .weight import cast_weight

# Rows of an expert, on average, from which Hopper loops: wgmma multiplies FP8 at about twice the
# rate of the grouped kernel's mma.sync, which there multiplies codes as f16. An expert's product of
# 512 rows by 4096 x 14336 takes some 60 us at that rate, longer than its launches: an estimate,
# until a GPU has measured it.
LOOPED_ROWS = 512


def multiply_groups(x: Tensor, weight: Tensor, ends: Tensor, rule, out_dtype: torch.dtype,
                    input_major: bool, learns: bool) -> Tensor:  # fmt: skip
    """Rows ends[e - 1] to ends[e] of x times the e-th weight, for every e.

    GPUs before sm_89 multiply no FP8 in groups: there the host reads `ends` and loops, as on Hopper
    where experts have LOOPED_ROWS, except while a graph is captured.

    Args:
        x: [S, K] float32, float16 or bfloat16, sorted by expert. Rows from ends[-1] on belong to
            none; their results and gradients are zero.
        weight: [E, N, K], or [E, K, N] where `input_major`, of a float type, or frozen codes.
        ends: int64 [E] that do not fall, on the device of x.
        rule: the LinearRecipe, of current scaling and plain gradients.
        out_dtype: float32 or bfloat16, of the result [S, N].
        learns: whether backward forms the weight's gradient.
    """
    options = rule, out_dtype, input_major, learns
    if x.is_cuda and _loops(x, weight.shape[0]):
        return LoopedProduct.apply(x, weight, read_ends(ends, len(x)), *options)
    return GroupedProduct.apply(x, weight, ends, *options)


def _loops(x: Tensor, experts: int) -> bool:
    """Whether a loop over experts is the faster way on the GPU of x, or the only one."""
    major, minor = _capability(x.device)
    if (major, minor) < (8, 9):
        return True
    many = len(x) >= LOOPED_ROWS * experts
    return major == 9 and many and not torch.cuda.is_current_stream_capturing()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def read_ends(ends: Tensor, rows: int) -> list[int]:
    """The ends of `rows` rows. The host waits."""
    return ends.tolist()


class GroupedProduct(FirstOrder):
    """What `multiply_groups` computes, in a few ops. The host reads nothing of the device."""

    @staticmethod
    def forward(ctx, x, weight, ends, rule, out_dtype, input_major, learns):
        ctx.rule, ctx.out_dtype, ctx.input_major = rule, out_dtype, input_major
        ctx.likes = x.dtype, weight.dtype, *weight.shape[1:]
        n = weight.shape[2 if input_major else 1]
        fp8 = learns and rule.weight_product == "fp8"
        q, scale, qt, qt_scale = _cast_rows(x, ends, rule, rule.input, fp8, rule.kept == "tile")
        codes, weight_scale = _cast_weights(weight, rule, input_major)
        y = grouped_gemm(q, scale, codes, weight_scale, ends, n, out_dtype, True)
        kept = (qt, qt_scale) if fp8 else (x if learns else None, None)
        ctx.weight_scale = weight_scale if rule.grain == "tensor" else None
        ctx.save_for_backward(ends, *kept, weight if ctx.needs_input_grad[0] else None)
        return y

    @staticmethod
    def backward(ctx, dy):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ends, kept, kept_scale, weight = ctx.saved_tensors
        rule, (x_dtype, *_) = ctx.rule, ctx.likes
        fp8 = needs_weight and rule.weight_product == "fp8"
        dx = dw = None
        if needs_x or fp8:
            q, scale, qt, qt_scale = _cast_rows(dy, ends, rule, rule.grad_output, fp8)
        if needs_x:
            codes, weight_scale = _cast_weights(weight, rule, not ctx.input_major, ctx.weight_scale)
            k = weight.shape[1 if ctx.input_major else 2]
            dx = grouped_gemm(q, scale, codes, weight_scale, ends, k, ctx.out_dtype, False).to(
                x_dtype
            )
        if fp8:
            dw = _weight_gradient(ctx, (qt, qt_scale), (kept, kept_scale), ends)
        elif needs_weight:
            dw = _plain_weight_gradient(ctx, dy, kept, ends)
        return dx, dw, None, None, None, None, None


def _cast_rows(x: Tensor, ends: Tensor, rule, dtype: torch.dtype, both: bool,
               tiles_t: bool = False):  # fmt: skip
    """q, scale, qt and qt_scale of the rows of all groups; the last two None without `both`."""
    q, scale, qt, qt_scale = cast_groups(
        x, ends, dtype, rule.grain, both, rule.power_of_two, tiles_t and both
    )
    if not both:
        return q, scale, None, None
    return q, scale, qt, scale if rule.grain == "tensor" else qt_scale


def _cast_weights(weight: Tensor, rule, columns: bool, scale: Tensor | None = None):
    """The codes of a stack as they lie or, where `columns`, of its transpose, and their scales;
    `scale` are those of an earlier cast to one a matrix."""
    if isinstance(weight, ScaledTensor):
        return _frozen_weights(weight, columns)
    grain = "tile" if rule.grain == "block" else rule.grain
    q, q_scale, qt, qt_scale = cast_stack(
        weight.detach(), rule.weight, grain, scale, not columns, columns, rule.power_of_two
    )
    return (qt if columns else q), (qt_scale if columns and grain != "tensor" else q_scale)


def _frozen_weights(weight: ScaledTensor, columns: bool) -> tuple[Tensor, Tensor]:
    """The operand that a frozen stack's codes are. Scales of rows do not fit the transpose: the
    decoded values are cast again."""
    q, scale, grain = weight.qdata, weight.scale, weight.qlayout.grain
    if columns and grain == "row":
        values = weight.detach().dequantize(torch.float32)
        return cast_stack(values, q.dtype, "row", None, False, True)[2:]
    plain = q.view(torch.uint8)  # not every torch pads and copies FP8
    if columns:
        plain, scale = plain.transpose(1, 2), scale.transpose(1, 2)
    rows, cols = (-n % ALIGNMENT for n in plain.shape[1:])
    if grain == "row":
        scale = F.pad(scale, (0, 0, 0, rows), value=1.0)
    return F.pad(plain, (0, cols, 0, rows)).contiguous().view(q.dtype), scale.contiguous()


def _weight_gradient(ctx, g, x, ends: Tensor) -> Tensor:
    """dw of the transposed codes and scales of dy and x."""
    _, dtype, rows, cols = ctx.likes
    product = torch.bfloat16 if ctx.rule.weight_grad == "bf16" else torch.float32
    if ctx.input_major:
        codes, scale = x
        if scale.dim() == 2:
            scale = row_scales(scale, len(codes))
        g, x = (codes, scale), g
    return grouped_gemm_weight(*g, *x, ends, rows, cols, product, False).to(dtype)


def _plain_weight_gradient(ctx, dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dw by torch's grouped product in bf16 (weight_product), which wants columns in multiples of
    8."""
    _, dtype, rows, cols = ctx.likes
    a, b = (F.pad(t.to(torch.bfloat16), (0, -t.shape[1] % 8)) for t in (dy, x))
    if ctx.input_major:
        a, b = b, a
    dw = F.grouped_mm(a.t(), b, offs=ends.to(torch.int32))
    return dw[:, :rows, :cols].to(dtype)


class _Context:
    """The context of one expert's product."""

    def __init__(self, needs_input_grad: tuple[bool, ...]):
        self.needs_input_grad, self.saved_tensors = needs_input_grad, ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class LoopedProduct(FirstOrder):
    """What `multiply_groups` computes, each expert with a Product of its own; `ends` are ints."""

    @staticmethod
    def forward(ctx, x, weight, ends, rule, out_dtype, input_major, learns):
        ctx.groups, ctx.likes = (
            list(group_rows(ends)),
            (x.shape, x.dtype, weight.shape, weight.dtype),
        )
        y = x.new_zeros((len(x), weight.shape[2 if input_major else 1]), dtype=out_dtype)
        ctx.inner = [_Context((*ctx.needs_input_grad[:2], False)) for _ in ctx.groups]
        for inner, (expert, begin, end) in zip(ctx.inner, ctx.groups, strict=True):
            own, operands = expert_of(weight, expert), (None,) * 4
            if isinstance(own, ScaledTensor):
                codes = cast_weight(own, rule.weight, both=input_major)
                operands = (codes.transposed() if input_major else codes)._replace(qt=None)
            y[begin:end] = Product.forward(
                inner, x[begin:end], own, *(None,) * 5, *operands, *(None,) * 3, rule.input,
                rule.weight, rule.grad_output, out_dtype, rule.weight_grad, rule.grad_accumulate,
                learns, input_major, None, None, rule.grain, rule.power_of_two,
                rule.weight_product, rule.kept,
            )  # fmt: skip
        # Autograd must know of all that is kept: hooks count, move or drop it.
        ctx.save_for_backward(*(t for inner in ctx.inner for t in inner.saved_tensors))
        for inner in ctx.inner:
            inner.count, inner.saved_tensors = len(inner.saved_tensors), ()
        return y

    @staticmethod
    def backward(ctx, dy):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        x_shape, x_dtype, w_shape, w_dtype = ctx.likes
        dx = dy.new_zeros(x_shape, dtype=x_dtype) if needs_x else None
        dw = dy.new_zeros(w_shape, dtype=w_dtype) if needs_weight else None
        saved = iter(ctx.saved_tensors)
        for inner, (expert, begin, end) in zip(ctx.inner, ctx.groups, strict=True):
            inner.saved_tensors = tuple(itertools.islice(saved, inner.count))
            of_x, of_weight, *_ = Product.backward(inner, dy[begin:end])
            inner.saved_tensors = ()
            if needs_x:
                dx[begin:end] = of_x
            if needs_weight:
                dw[expert] = of_weight
        return dx, dw, None, None, None, None, None


def expert_of(stack: Tensor, expert: int) -> Tensor:
    """The matrix of an expert; of frozen codes the codes."""
    if not isinstance(stack, ScaledTensor):
        return stack[expert]
    codes, scale = stack.qdata[expert], stack.scale[expert]
    return ScaledTensor(codes, scale, None, stack.dtype, stack.qlayout)


def group_rows(ends: list[int]):
    """(expert, begin, end) of those that have rows."""
    for expert, (begin, end) in enumerate(itertools.pairwise((0, *ends))):
        if end > begin:
            yield expert, begin, end
