"""Linear layers of which each rank of a tensor-parallel group holds a part.

Column parallel: the weight's rows are spread, the input is gathered along the sequence. Row
parallel: the columns are spread, the partial outputs are summed into sequence shards. Megatron-LM
(arXiv 2205.05198, section 4.2.2), with FP8 on the wire (FP8-LM, arXiv 2310.18313, section 2.3):
the input and, in backward, the output gradient are cast once, with one scale on all ranks, or with
scales of rows or blocks, and their codes are gathered. For backward a rank keeps the codes of its
own sequence shard and gathers them again, or keeps the gathered codes (TPGroup.regather).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ... import recipe as recipes
from ...comm.transport import Transport
from ...layout import Layout
from ...nn.cast import Cast, cast_history, matrix, output_dtype
from ...nn.linear import Linear, product_dtype
from ...nn.product import Exchange, Product
from ...tensor import ScaledTensor
from . import sequence


@dataclass(frozen=True, eq=False)
class TPGroup:
    """The ranks of a tensor-parallel group, and how its layers exchange tensors.

    fp8_sum: partial results are sent in FP8 too, outputs as e4m3 and input gradients in the
        recipe's gradient format; without, in the dtype of the product.
    regather: backward gathers an input again, instead of keeping the whole sequence. None: unless
        the FP8 codes of the sequence are no more bytes than a bf16 shard, so on up to two ranks.
    """

    transport: Transport
    fp8_sum: bool = False
    regather: bool | None = None

    def regathers(self, codes: bool) -> bool:
        if self.regather is None:
            return not codes or self.transport.size > 2
        return self.regather

    def __deepcopy__(self, memo) -> TPGroup:
        return self


class RegatherCache(Exchange):
    """Gathers a layer input again for backward, once for all layers that share it; freed after the
    last use. Each calls `start_gather`, and then `transposed_input` for the result."""

    def __init__(self, transport: Transport | None, prepare):
        self.transport, self.prepare = transport, prepare  # None: the whole sequence was saved
        self.users = self.served = 0
        self.waiting = self.result = None

    def start_gather(self, kept: Tensor, scale: Tensor | None = None) -> None:
        if self.waiting is not None or self.result is not None:
            return
        if self.transport is None:
            self.waiting = lambda: (kept, scale)
        else:
            self.waiting = sequence.start_gather_codes(kept, scale, self.transport)

    def transposed_input(self, kept: Tensor, scale: Tensor | None = None):
        if self.result is None:
            self.result, self.waiting = self.prepare(*self.waiting()), None
        result = self.result
        self.served += 1
        if self.served >= self.users:
            self.result, self.served = None, 0
        return result


class _RowExchange(Exchange):
    """A row-parallel layer's messages: it sums partial outputs and gathers output gradients."""

    def __init__(self, group: TPGroup):
        self.tp_group = group

    def reduce_output(self, y: Tensor) -> Tensor:
        fp8 = recipes.E4M3 if self.tp_group.fp8_sum else None
        return sequence.sum_scatter(y, self.tp_group.transport, fp8, y.dtype)

    def cast_gradient(self, dy, dtype, history, grain, both) -> Cast:
        link = self.tp_group.transport
        own, scale = sequence.shared_cast(dy, dtype, history, link, grain)
        codes, scale = sequence.start_gather_codes(own, scale, link)()
        g = sequence.operand(codes, scale)
        return Cast(*g, *(sequence.transposed(codes, scale, grain) if both else (None, g[1])))


class _Gathered(torch.autograd.Function):
    """A shard's sequence, already gathered; backward sums the partial gradients into shards."""

    @staticmethod
    def forward(ctx, x, full, transport, fp8):
        ctx.transport, ctx.fp8, ctx.dtype = transport, fp8, x.dtype
        return full.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return sequence.sum_scatter(dy, ctx.transport, ctx.fp8, ctx.dtype), None, None, None


class _SumScatter(torch.autograd.Function):
    """Partial sequences to a shard of their sum; backward gathers the shards' gradients."""

    @staticmethod
    def forward(ctx, y, transport):
        ctx.transport = transport
        return sequence.sum_scatter(y, transport, None, y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return sequence.gather(dy, ctx.transport), None


class _PlainProduct(torch.autograd.Function):
    """x @ w.T + b on a gathered input, of which only the shard is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, kept, cache):
        low = weight.to(x.dtype)
        ctx.save_for_backward(kept, low)
        ctx.cache, ctx.dtypes = cache, (weight.dtype, None if bias is None else bias.dtype)
        return F.linear(x, low, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, low = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_weight:
            ctx.cache.start_gather(kept)
        if needs_x:
            dx = dy @ low
        if needs_weight:
            dw = (matrix(dy).t() @ ctx.cache.transposed_input(kept)[0]).to(ctx.dtypes[0])
        if needs_bias:
            db = matrix(dy).sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        return dx, dw, db, None, None


@dataclass(eq=False)
class Input:
    """Stored on a gathered tensor for the layers that take it: what to save, the scale of that,
    and what gives it back transposed."""

    kept: Tensor
    scale: Tensor | None
    cache: RegatherCache


class _Column:
    """The base of both column-parallel layers; `tp_group` is set by the style that made them."""

    def gather(self, x: Tensor) -> Tensor:
        """The sequence of x [..., S / ranks, K], for this layer and all that share its input. Of an
        FP8 layer: codes, a ScaledTensor."""
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"ColumnParallel: wanted an input [..., sequence, {self.in_features}], got "
                f"{list(x.shape)}"
            )
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"ColumnParallel: input must be float32, float16 or bfloat16, got {x.dtype}"
            )
        group, dtype = self.tp_group, output_dtype(x)
        shard, scale, full, fp8 = self._gather(x.detach(), dtype)
        if group.regathers(codes=scale is not None):
            kept, cache = shard, RegatherCache(group.transport, self._prepare)
        else:
            kept, cache = full, RegatherCache(None, self._prepare)
            if isinstance(full, ScaledTensor):
                kept, scale = full.qdata, full.scale
        full = _Gathered.apply(x, full, group.transport, fp8 if group.fp8_sum else None)
        full.sequence_input = Input(kept, scale, cache)
        return full

    def _take(self, x: Tensor) -> tuple[Tensor, Input]:
        if getattr(x, "sequence_input", None) is None:
            if self.gathers:
                x = self.gather(x)
            else:
                raise ValueError(
                    "ColumnParallel: the input is not what GatherInput gathered; something changed "
                    f"it on the way (it came as {list(x.shape)})"
                )
        if torch.is_grad_enabled() and self.weight.requires_grad:
            x.sequence_input.cache.users += 1
        return x, x.sequence_input


class ColumnParallelLinear(_Column, Linear):
    """FP8. Input: a sequence shard [..., S / ranks, K], or what `gather` made of one; output
    [..., S, N / ranks] in the dtype that Linear has."""

    def _gather(self, x, dtype):
        # A shared scale, so a shared history: the input's amax is that of the whole sequence.
        history = cast_history(self, self.input_history)
        rule, link = self.rule, self.tp_group.transport
        codes, scale = sequence.shared_cast(x, rule.input, history, link, rule.grain)
        layout = Layout.of(rule.input, rule.grain)
        gathered = sequence.start_gather_codes(codes, scale, link)()
        return codes, scale, ScaledTensor(*gathered, None, dtype, layout), rule.grad_output

    def _prepare(self, codes, scale):
        return sequence.transposed(codes, scale, self.rule.grain)

    def forward(self, x: Tensor) -> Tensor:
        x, taken = self._take(x)
        rule = self.rule
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        return Product.apply(
            x, self.weight, self.bias, *sequence.operand(x.qdata, x.scale), taken.kept, taken.scale,
            *self.operands(), None, None, self.grad_history if self.training else None, rule.input,
            rule.weight, rule.grad_output, product_dtype(x.dtype), rule.weight_grad,
            rule.grad_accumulate, learns, False, taken.cache, None, rule.grain, rule.power_of_two,
        ).to(x.dtype)  # fmt: skip


class RowParallelLinear(Linear):
    """FP8. Input [..., S, K / ranks]; output: this rank's sequence shard [..., S / ranks, N] of the
    sum over ranks. The bias is added after the sum, on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"RowParallel: wanted an input [..., sequence, {self.in_features}], got "
                f"{list(x.shape)}"
            )
        y = self.multiply(x, None, self.operands(), exchange=_RowExchange(self.tp_group))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PlainColumnParallelLinear(_Column, nn.Linear):
    """ColumnParallelLinear without FP8, of an nn.Linear: in the autocast dtype, or the input's."""

    def _gather(self, x, dtype):
        x = x.to(dtype)
        return x, None, sequence.gather(x, self.tp_group.transport), None

    @staticmethod
    def _prepare(full, scale):
        return matrix(full), None

    def forward(self, x: Tensor) -> Tensor:
        x, taken = self._take(x)
        with torch.autocast(x.device.type, enabled=False):
            return _PlainProduct.apply(x, self.weight, self.bias, taken.kept, taken.cache)


class PlainRowParallelLinear(nn.Linear):
    """A RowParallelLinear without FP8, of an nn.Linear: in the autocast dtype, or the input's."""

    def forward(self, x: Tensor) -> Tensor:
        y = _SumScatter.apply(F.linear(x, self.weight), self.tp_group.transport)
        return y if self.bias is None else y + self.bias.to(y.dtype)
