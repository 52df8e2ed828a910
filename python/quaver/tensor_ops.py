"""aten ops on a ScaledTensor.

Views share the codes; moves, copies, sums and factors keep them codes. Any other op works on the
decoded values, and where it writes they are encoded again. Nothing is written to a temporary: what
cannot take effect is refused by name.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .layout import FORMATS
from .read_only import ReadOnlyTensor, is_view, written
from .tensor import KNOWN, ScaledTensor

aten = torch.ops.aten

FP8 = ("e4m3", "e5m2")

# Ops that overwrite all earlier contents.
OVERWRITES = {aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor}

# Ops that write values as they are given: to the nearest code. Results of arithmetic round
# stochastically in f16, because a step below half a code would be lost each time. copy_ is among
# the arithmetic: averages of weights arrive by it.
ASSIGNMENTS = {
    aten.fill_.Scalar, aten.fill_.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor,
    aten.index_put_.default, aten._index_put_impl_.default, aten.masked_scatter_.default,
    aten.index_fill_.int_Scalar, aten.index_fill_.int_Tensor, aten.index_copy_.default,
    aten.scatter_.src, aten.scatter_.value,
}  # fmt: skip


def _implements(*ops):
    def register(function):
        for op in ops:
            KNOWN[op] = function
        return function

    return register


# Any op


@_implements("any")
def _decoded(func, args, kwargs):
    """Runs an op on decoded values and encodes those that it writes: all of them, or none."""
    targets = {id(t): t for t in written(func, args, kwargs) if isinstance(t, ScaledTensor)}
    if targets:
        _refuse_writes(func)
        if func not in ASSIGNMENTS | OVERWRITES and any(t.is_frozen for t in targets.values()):
            raise RuntimeError(
                f"{func.name()}: a frozen FP8 weight has 3 bits of mantissa, which round most of "
                "an adapter away; call quaver.restore(model) before you merge into it"
            )
    plain = {}

    def decode(t):
        if id(t) not in plain:
            plain[id(t)] = t.dequantize()
        return plain[id(t)]

    args, kwargs = tree_map_only(ScaledTensor, decode, (args, kwargs))
    out = func(*args, **kwargs)
    if not targets:
        return _read_only(out) if is_view(func) else out
    seeds = {k: None if func in ASSIGNMENTS else rounding_seed(t) for k, t in targets.items()}
    new = {k: t.encoded(plain[k], seeds[k]) for k, t in targets.items()}  # all, or none is written
    for key, target in targets.items():
        target.write_(new[key], func in OVERWRITES)
        if not target.is_inference():  # fused ops do not change the versions
            torch.autograd.graph.increment_version(target)
    results = {id(plain[key]): target for key, target in targets.items()}
    return tree_map_only(Tensor, lambda t: results.get(id(t), t), out)


def _read_only(out):
    """Views of decoded values; plain ones inside a compiler's trace, which lacks the class."""
    traced = [t for t in torch.utils._pytree.tree_leaves(out) if type(t) is not Tensor]
    return out if traced else tree_map_only(Tensor, ReadOnlyTensor, out)


def _refuse_writes(func) -> None:
    if "c10d" in func.namespace:
        raise RuntimeError(
            f"{func.name()}: a collective cannot write to a ScaledTensor. Use "
            "qv.distributed.ddp or all_reduce_mean, or send t.dequantize() and t.copy_() the "
            "result"
        )
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(
            f"{func.name()}: the shape and memory of a ScaledTensor cannot change in place. Use "
            "the op without the underscore, or t.data = value"
        )


def rounding_seed(t: ScaledTensor) -> int | None:
    """The seed by which arithmetic on `t` is rounded; None for nearest.

    Drawn from torch's default CPU generator, so that a resumed run rounds alike. Where several
    ranks may hold the same weight it is the number of writes to it, the same on all of them.
    """
    if t.qlayout.format != "f16" or type(t.qdata) is not Tensor or t.is_meta:
        return None
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return 0 if t.is_inference() else t._version
    return int(torch.randint(2**62, ()))


# Views


@_implements(
    aten.alias.default, aten.detach.default, aten.view.default, aten._unsafe_view.default,
    aten.t.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.diagonal.default,
    aten.expand.default, aten.unfold.default, aten.as_strided.default,
)  # fmt: skip
def _view(func, x, *args, **kwargs):
    """Codes with one scale may be viewed in any way, others as they lie."""
    codes = func(x.qdata, *args, **kwargs)
    if x.qlayout.grain != "tensor":
        same = isinstance(codes, Tensor) and _geometry(codes) == _geometry(x.qdata)
        return x.view_of_codes(codes, x.qt) if same else NotImplemented
    if not isinstance(codes, Tensor):
        return [x.view_of_codes(q) for q in codes]
    # A view that keeps the last axis, and splits or joins the others, is the same matrix.
    whole = func in _KEEP_ROWS and codes.shape[-1:] == x.shape[-1:]
    out = x.view_of_codes(codes, x.qt if whole else None)
    if func is aten.slice.Tensor and x.owned_rows is not None:
        _own(x, out)
    return out


def _geometry(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.storage_offset()


_KEEP_ROWS = (aten.alias.default, aten.detach.default, aten.view.default, aten._unsafe_view.default)


def _own(padded: ScaledTensor, rows: ScaledTensor) -> None:
    """The first rows that are cut from padded memory are FSDP2's shard: the scale is theirs alone,
    since the padding is zero."""
    first = rows.storage_offset() == padded.storage_offset() and rows.shape[1:] == padded.shape[1:]
    if first and padded.owned_rows in (0, len(rows)):
        padded.owned_rows = len(rows)
        rows.shares_scale = False


@_implements(aten.detach_.default)
def _detach_(func, x):
    return x


@_implements(aten.record_stream.default)
def _record_stream(func, x, stream):
    for part in x.parts().values():
        part.record_stream(stream)


# Copies and memory


@_implements(aten.clone.default)
def _clone(func, x, *, memory_format=None):
    return x._map(aten.clone.default)


@_implements(aten._to_copy.default)
def _to_copy(func, x, *, dtype=None, device=None, non_blocking=False, **kwargs):
    """A new device moves the codes; a new dtype changes the logical dtype only."""
    move = {"device": device, "non_blocking": non_blocking} if device is not None else {}
    return x._map(lambda t: aten._to_copy.default(t, **move), dtype)


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


@_implements(aten.new_zeros.default)
def _new_zeros(func, x, size, *, dtype=None, device=None, **kwargs):
    """FSDP2 allocates the padded shard with this; keep layout and scale."""
    rows = list(size[1:]) == list(x.shape[1:]) and dtype is None and device is None
    fsdp = rows and (x.source is not None or not torch.is_grad_enabled())
    if x.qlayout.grain != "tensor" or not fsdp:
        return NotImplemented
    out = x._map(torch.clone)._like(func(x.qdata, size))
    out.owned_rows = 0
    return out


@_implements(aten.copy_.default)
def _copy_(func, target, source, non_blocking=False):
    if not isinstance(target, ScaledTensor):
        if isinstance(target, ReadOnlyTensor):
            return NotImplemented
        return target.copy_(source.dequantize(), non_blocking)
    same = (
        isinstance(source, ScaledTensor)
        and source.qlayout == target.qlayout
        and source.shape == target.shape
        and not (target.shares_scale and source.scale != target.scale)
    )
    if not same:
        new = target.encoded(source.to(target.device), rounding_seed(target))
        return target.write_(new)
    target.qdata.copy_(source.qdata, non_blocking)
    target.scale.copy_(source.scale, non_blocking)
    if target.amax is not None:
        amax = source.dequantize().abs().amax() if source.amax is None else source.amax
        target.amax.copy_(torch.maximum(target.amax, amax) if target.shares_scale else amax)
    return target.refresh_copies()


# Arithmetic on codes


@_implements(aten.zero_.default)
def _zero_(func, x):
    if x.shares_scale:
        return NotImplemented
    x.qdata.zero_()
    x.scale.fill_(1.0)
    if x.amax is not None:
        x.amax.zero_()
    return x.refresh_copies()


@_implements(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar)
def _scale_(func, x, factor):
    """Multiplies the scale by one positive number and leaves the codes, so that clipping an FP8
    gradient costs nothing."""
    if not isinstance(x, ScaledTensor) or x.qlayout.expand or x.shares_scale:
        return NotImplemented
    if isinstance(factor, Tensor):
        if factor.dim() or isinstance(factor, ScaledTensor):
            return NotImplemented
        known = factor.item() if type(factor) is Tensor and factor.device.type == "cpu" else 1.0
    else:
        known = factor
    if not 0 < known < float("inf"):
        return NotImplemented
    func(x.scale, factor)
    if x.amax is not None:
        func(x.amax, factor)
    return x.refresh_copies()


@_implements(aten.add_.Tensor)
def _accumulate_(func, target, other, *, alpha=1):
    """Gradient accumulation over micro-batches. The first leaves FP8 codes; three bits of mantissa
    hold no sum, so the second makes them bf16 (or `grad_format`), which keep scale 1."""
    fits = (
        isinstance(target, ScaledTensor)
        and not target.is_frozen
        and target.qlayout.format != "f16"
        and target.qlayout.grain == "tensor"
        and target.amax is not None
        and isinstance(other, Tensor)
        and other.shape == target.shape
        and other.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and alpha == 1
        and not target.shares_scale
        and target.qdata.is_contiguous()
    )
    if not fits:
        return NotImplemented
    if target.qlayout.format in FP8:
        same = target.sources()  # a gradient is the detached tensor that backward returned
        if len({_place(t) for t in same}) > 1:
            return NotImplemented  # a part cannot change the format of the whole
        wide = target.dequantize(FORMATS[target.grad_format])
        one = torch.ones_like(target.scale)
        for t in same:
            t.store_(wide, one, target.amax)
    scale = amax = None
    if isinstance(other, ScaledTensor):
        coarse = other.qlayout.grain == "tensor"
        scale, amax = (other.scale, other.amax) if coarse else (None, None)
        other = other.qdata if coarse else other.dequantize(torch.float32)
    if target.qlayout.format == "f32":
        value = other.float() if scale is None else other.float() * scale
        seen = target.amax if amax is None else torch.maximum(target.amax, amax)
        target.write_(target.encoded(target.dequantize(torch.float32) + value))
        target.amax.copy_(torch.where(seen.isfinite(), target.amax, torch.nan))
        return target
    torch.ops.quaver.accumulate_(target.qdata, target.scale, target.amax, other, scale, amax)
    return target.refresh_copies()


def _place(t: ScaledTensor) -> tuple:
    """The place of a tensor's codes in memory."""
    return t.qdata.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()


@_implements(aten.add.Tensor)
def _accumulate(func, a, b, *, alpha=1):
    """Autograd adds out of place when it may not write: two uses of one weight in a graph."""
    low = isinstance(a, ScaledTensor) and isinstance(b, ScaledTensor)
    if not low or "f16" in (a.qlayout.format, b.qlayout.format):
        return NotImplemented
    return _accumulate_(aten.add_.Tensor, a._map(torch.clone), b, alpha=alpha)
