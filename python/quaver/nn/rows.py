"""Linear layers whose backward forms some rows of the weight's gradient (Grass, arXiv 2406.17660).

    dW[index] = dy[:, index].t() @ x

instead of the whole product: its compute and memory are r / m of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from ..rows import Rows
from .swap import Swapped, swap, swap_back, swapped_class

_choosers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight: a weak method


def choose_rows(weight: Tensor, chooser: Callable[[Tensor], Tensor | None] | None) -> None:
    """Lets backward form the rows `chooser(weight)` (a method; int64 [r]) of the weight's gradient,
    as Rows in `.grad`; all of it, as a plain tensor, where that is None or the method's object is
    gone. It is called in each forward, so that it may depend on a state that others load."""
    if chooser is None:
        _choosers.pop(weight, None)
    else:
        _choosers[weight] = weakref.WeakMethod(chooser)


def chosen_rows(weight: Tensor) -> Tensor | None:
    """The index that the chooser of `choose_rows` gives now."""
    found = _choosers.get(weight)
    chooser = None if found is None else found()
    return None if chooser is None else chooser(weight)


class RowsLinear(Swapped):
    """An nn.Linear that forms the rows of `choose_rows`. The parameters and their names in state
    dicts stay as they were."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        index = chosen_rows(self.weight) if learns else None
        if index is None:
            return super().forward(x)
        kind, dtype = x.device.type, None
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return RowsProduct.apply(x, self.weight, self.bias, index, dtype)


class RowsProduct(torch.autograd.Function):
    """x @ weight.T + bias, in `dtype` where autocast gives one."""

    @staticmethod
    def forward(ctx, x, weight, bias, index, dtype):
        ctx.save_for_backward(x, weight)
        ctx.index, ctx.dtype = index, dtype  # sums compare the identity of the index
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype or bias.dtype)
            return F.linear(x.to(dtype or x.dtype), weight.to(dtype or weight.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        with torch.autocast(x.device.type, enabled=False):
            flat = dy.reshape(-1, dy.shape[-1])
            if needs_x:
                dx = (dy @ weight.to(ctx.dtype or weight.dtype)).to(x.dtype)
            if needs_weight:
                inputs = x.reshape(-1, x.shape[-1]).to(dy.dtype)
                values = flat.index_select(1, ctx.index).t() @ inputs
                dw = Rows(values.to(weight.dtype), ctx.index, weight.shape[0])
            if needs_bias:
                db = flat.sum(0).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def of(kind: type) -> type:
    """The class that `enable_rows` gives a layer of class `kind`."""
    return swapped_class(RowsLinear, kind)


def enable_rows(module: nn.Linear) -> None:
    """Makes a plain nn.Linear form the rows of `choose_rows`."""
    if not isinstance(module, RowsLinear):
        swap(module, RowsLinear)


def disable_rows(module: nn.Linear) -> None:
    """Undoes `enable_rows`."""
    choose_rows(module.weight, None)
    if isinstance(module, RowsLinear):
        swap_back(module)
