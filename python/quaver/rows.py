"""Rows: the gradient of a matrix of which only some rows were formed (Grass, arXiv 2406.17660)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class Rows(torch.Tensor):
    """A gradient [m, n] in `.grad`, of which the rows `index` exist as `values`; no other row was
    formed, and those count as zeros in norms.

    To autograd and `.grad` it is a tensor of the parameter's shape, without memory of it. Sums of
    such gradients with one index, factors, norms and finite checks work on the values, hence
    accumulation over micro-batches and torch's and this package's clip_grad_norm_. Any other op is
    refused, because it would form the whole matrix; `to_dense()` does so.

    Args:
        values: float32, bfloat16 or float16 [r, n].
        index: int64 [r], rows of the matrix. A row that it names several times (sampling with
            replacement) has equal values at each place, and counts as often in norms.
        rows: m.

    Raises:
        ValueError: values and index of other shapes.
    """

    values: Tensor
    index: Tensor

    @staticmethod
    def __new__(cls, values, index, rows):
        if values.dim() != 2 or index.shape != values.shape[:1]:
            raise ValueError(
                f"Rows: wanted values [r, n] and index [r], got {list(values.shape)} and "
                f"{list(index.shape)}"
            )
        out = torch.Tensor._make_wrapper_subclass(
            cls, (rows, values.shape[1]), dtype=values.dtype, device=values.device
        )
        torch._C._set_throw_on_mutable_data_ptr(out)  # there is no memory behind it
        return out

    def __init__(self, values, index, rows):
        self.values, self.index = values, index

    def to_dense(self) -> Tensor:
        """The whole matrix [m, n], zero in the rows that were not formed."""
        return self.values.new_zeros(self.shape).index_copy_(0, self.index, self.values)

    def around(self, values: Tensor) -> Rows:
        """The same rows with other values."""
        return Rows(values, self.index, self.shape[0])

    def __tensor_flatten__(self):
        return ["values"], (self.index, self.shape[0])

    @staticmethod
    def __tensor_unflatten__(inner, rest, outer_size, outer_stride):
        return Rows(inner["values"], *rest)

    def __repr__(self, *, tensor_contents=None):
        return f"Rows({list(self.values.shape)} of {list(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _BY_VALUE:
            raise NotImplementedError(
                f"{func}: not for Rows, a gradient of which {len(_first(args).index)} rows exist; "
                "use its .values and .index, or to_dense()"
            )
        first = _first(args)
        if func in _SUMS:
            _check_sum(func, *args[:2])
        if func is aten.copy_.default and not isinstance(args[1], Rows):
            raise RuntimeError("copy_: wanted Rows for Rows, got a whole gradient")
        values = tree_map_only(Rows, lambda r: r.values, (args, kwargs))
        out = func(*values[0], **values[1])
        if func in _IN_PLACE:
            return first if args[0] is first else None  # the ops on lists return nothing
        if isinstance(out, Tensor) and out.shape == first.values.shape:
            return first.around(out)
        return out


def _check_sum(func, a: Tensor, b: Tensor) -> None:
    if not (isinstance(a, Rows) and isinstance(b, Rows)):
        raise RuntimeError(
            f"{func}: a gradient of chosen rows and a whole one meet in one .grad; wanted the "
            "weight in linear layers alone, and no optimizer.step() between the forward and the "
            "backward of a micro-batch"
        )
    if a.index is not b.index:
        raise RuntimeError(
            f"{func}: these gradients have rows that were chosen at different times; wanted no "
            "optimizer.step() between the forward and the backward of a micro-batch"
        )


def _first(args) -> Rows:
    return next(a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Rows))


_SUMS = {aten.add.Tensor, aten.add_.Tensor}
_IN_PLACE = {
    aten.add_.Tensor, aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar,
    aten.zero_.default, aten.copy_.default, aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
}  # fmt: skip
_BY_VALUE = _IN_PLACE | {
    aten.add.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar,
    aten.neg.default, aten.detach.default, aten.clone.default, aten._to_copy.default,
    aten.zeros_like.default, aten.linalg_vector_norm.default, aten.abs.default, aten.isnan.default,
    aten.isinf.default, aten.isfinite.default, aten.norm.Scalar,
    aten._foreach_norm.Scalar,
}  # fmt: skip
