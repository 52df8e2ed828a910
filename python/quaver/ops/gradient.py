"""Gradients: norm, amax and sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import Rows
from ..tensor import ScaledTensor
from .fake import fake

_ops = torch.ops.quaver


def none_like(t: Tensor) -> Tensor:
    """The empty tensor that stands for none in list arguments."""
    return t.new_empty(0, dtype=torch.float32)


def parts(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Values, scales and amaxes of plain and scaled tensors, as the list ops take them."""
    if not tensors:
        return [], [], []
    tensors = [t.values if isinstance(t, Rows) else t for t in tensors]
    first = tensors[0]
    none = none_like(first.qdata if isinstance(first, ScaledTensor) else first)
    values, scales, amaxes = [], [], []
    for t in tensors:
        scaled = isinstance(t, ScaledTensor)
        amax = t.amax if scaled else None
        values.append(t.qdata if scaled else t)
        scales.append(t.scale if scaled else none)
        amaxes.append(none if amax is None else amax)
    return values, scales, amaxes


def grad_norm(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two-norm over all gradients (0-D float32) and each one's amax (float32 [n]), in one call.

    Non-finite values show in both, those that FP8 saturated away included. Raises ValueError where
    there is no gradient.
    """
    if not grads:
        raise ValueError("grad_norm: no gradients")
    return _ops.grad_norm(*parts(grads))


def amaxes(tensors: list[Tensor]) -> Tensor:
    """Each tensor's largest magnitude, float32 [n]: the stored amax where there is one, else read
    from the values. A non-finite value gives a non-finite amax. Raises ValueError where there is no
    tensor."""
    carried = [t.amax if isinstance(t, ScaledTensor) else None for t in tensors]
    plain = [t for t, amax in zip(tensors, carried, strict=True) if amax is None]
    if len(plain) == len(tensors):
        return grad_norm(plain)[1]
    read = iter(grad_norm(plain)[1].unbind() if plain else ())
    found = [next(read) if amax is None else amax for amax in carried]
    return torch.stack([amax if amax.dim() == 0 else amax.reshape(()) for amax in found])


@fake("grad_norm")
def _(grads, scales, amaxes):
    norm = grads[0].new_empty([], dtype=torch.float32)
    return norm, grads[0].new_empty([len(grads)], dtype=torch.float32)


@fake("accumulate_")
def _(q, scale, amax, other, other_scale=None, other_amax=None):
    return None
