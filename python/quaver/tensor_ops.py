"""The aten ops that keep a ScaledTensor what it is: moves, views, copies, sums and factors.

All others see its decoded value (tensor.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tensor import KNOWN, ScaledTensor

aten = torch.ops.aten


def _implements(*ops):
    def register(function):
        for op in ops:
            KNOWN[op] = function
        return function

    return register


@_implements(aten.detach.default, aten.alias.default)
def _alias(func, x):
    out = x._map(func)
    out.part, out.is_transient = x.part, x.is_transient
    if "fp8_weight" in x.__dict__:  # a write through `.data` reaches the copies too
        out.fp8_weight = x.fp8_weight
    return out


@_implements(aten.clone.default)
def _clone(func, x, *, memory_format=None):
    return x._map(aten.clone.default)


@_implements(aten.new_empty_strided.default)
def _new_empty_strided(func, x, size, stride, *, dtype=None, device=None, **kwargs):
    """Autograd allocates with this before it copies a gradient that it cannot steal; keep the
    layout."""
    same = (
        list(size) == list(x.shape)
        and x.qlayout.grain == "tensor"
        and dtype in (None, x.dtype)
        and device in (None, x.device)
    )
    if not same:
        return NotImplemented
    return x._map(torch.empty_like)._like(func(x.qdata, size, stride))


@_implements(aten._to_copy.default)
def _to_copy(func, x, *, dtype=None, device=None, non_blocking=False, **kwargs):
    """A new device moves the codes; a new dtype changes the logical dtype only."""
    move = {"device": device, "non_blocking": non_blocking} if device is not None else {}
    return x._map(lambda t: aten._to_copy.default(t, **move), dtype)


@_implements(aten.view.default, aten._unsafe_view.default, aten.t.default, aten.transpose.int)
def _view(func, x, *args):
    if x.qlayout.grain != "tensor":
        return NotImplemented
    qdata = func(x.qdata, *args)
    # Leading axes split or joined are the same matrix.
    views = func in (aten.view.default, aten._unsafe_view.default)
    out = x._like(qdata, qt=x.qt if views and qdata.shape[-1:] == x.shape[-1:] else None)
    out.part = x.part
    return out


@_implements(aten.slice.Tensor, aten.split.Tensor, aten.as_strided.default)
def _rows(func, x, *args, **kwargs):
    """Some of the rows, or all: how FSDP2 cuts a weight into shards. Other slices are decoded."""

    def part(qdata):
        out = x._like(qdata)
        out.part, out.is_transient = x.part or qdata.numel() != x.numel(), x.is_transient
        return out

    if x.qlayout.grain != "tensor" or not x.qdata.is_contiguous():
        return NotImplemented
    qdata = func(x.qdata, *args, **kwargs)
    one = isinstance(qdata, Tensor)
    if not all(q.is_contiguous() for q in ([qdata] if one else qdata)):
        return NotImplemented
    return part(qdata) if one else [part(q) for q in qdata]


@_implements(aten.new_zeros.default)
def _new_zeros(func, x, size, *, dtype=None, device=None, **kwargs):
    """FSDP2 allocates the padded shard with this; keep layout and scale."""
    rows = list(size[1:]) == list(x.shape[1:]) and dtype is None and device is None
    fsdp = rows and (x.part or not torch.is_grad_enabled())
    if x.qlayout.grain != "tensor" or not fsdp:
        return NotImplemented
    return x._map(torch.clone)._like(func(x.qdata, size))


@_implements(aten.copy_.default)
def _copy_(func, target, source, non_blocking=False):
    if not isinstance(target, ScaledTensor):
        return target.copy_(source.dequantize(), non_blocking)
    same = (
        isinstance(source, ScaledTensor)
        and source.qdata.dtype == target.qdata.dtype
        and source.shape == target.shape
        and source.scale.shape == target.scale.shape
        and not (target.part and source.scale != target.scale)
    )
    if not same:
        value = source.dequantize() if isinstance(source, ScaledTensor) else source
        return target._encode_(value.to(target.device))
    target.qdata.copy_(source.qdata, non_blocking)
    target.scale.copy_(source.scale, non_blocking)
    if target.amax is not None and not target.part:
        known = source.amax is not None
        target.amax.copy_(source.amax if known else source.dequantize().abs().amax())
    return target.refresh_copies()


@_implements(aten.zero_.default)
def _zero_(func, x):
    x.qdata.zero_()
    if x.amax is not None and not x.part:
        x.amax.zero_()
    return x.refresh_copies()


@_implements(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar)
def _scale_(func, x, factor):
    """By one number: the codes stay, the scale takes it. Clipping an FP8 gradient costs nothing."""
    one = not isinstance(factor, Tensor) or (
        factor.dim() == 0 and not isinstance(factor, ScaledTensor)
    )
    if not (isinstance(x, ScaledTensor) and one) or x.qlayout.expand or x.part:
        return NotImplemented
    func(x.scale, factor)
    if x.amax is not None:
        func(x.amax, factor).abs_()
    return x.refresh_copies()


@_implements(aten.add_.Tensor)
def _accumulate_(func, target, other, *, alpha=1):
    """Gradient accumulation over micro-batches, in the target's own format."""
    fits = (
        isinstance(target, ScaledTensor)
        and target.qdata.dtype != torch.float16
        and target.qlayout.grain == "tensor"
        and target.amax is not None
        and isinstance(other, Tensor)
        and other.shape == target.shape
        and other.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (not isinstance(other, ScaledTensor) or other.qlayout.grain == "tensor")
        and alpha == 1
    )
    if not fits:
        return NotImplemented
    scaled = isinstance(other, ScaledTensor)
    torch.ops.quaver.accumulate_(
        target.qdata,
        target.scale,
        target.amax,
        other.qdata if scaled else other,
        other.scale if scaled else None,
        other.amax if scaled else None,
    )
    target.qt = None
    return target


@_implements(aten.add.Tensor)
def _accumulate(func, a, b, *, alpha=1):
    # Autograd adds out of place when it may not write: two uses of one weight in a graph.
    low = isinstance(a, ScaledTensor) and isinstance(b, ScaledTensor)
    if not low or a.qdata.dtype != b.qdata.dtype:
        return NotImplemented
    return _accumulate_(aten.add_.Tensor, a._map(torch.clone), b, alpha=alpha)
