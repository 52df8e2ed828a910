"""What the FP8 modules share: padding, poisoned scales, casts that arrive ready, class swaps."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tensor import ScaledTensor

ALIGNMENT = 16  # of every GEMM dimension, for the tensor cores
HISTORY_STATE = 17  # count and 16 amaxes; scale.h


def pad(x: Tensor) -> Tensor:
    rows, cols = (-n % ALIGNMENT for n in x.shape)
    return F.pad(x, (0, cols, 0, rows)) if rows or cols else x


def poison(scale: Tensor, amax: Tensor) -> Tensor:
    """The scale, or NaN where the amax is not finite: FP8 saturates an infinity to a number, which
    would pass for a sound one all the way into the weights."""
    return scale + (amax - amax)


def activation(q, qt, scale, amax, shape, dtype: torch.dtype) -> ScaledTensor:
    """The tensor of `shape` that a fused op cast into both padded GEMM layouts."""
    rows, cols = math.prod(shape[:-1]), shape[-1]
    if q.shape != (rows, cols):
        q = q[:rows, :cols].contiguous()
    return ScaledTensor(q.view(shape), poison(scale, amax), None, dtype, qt=qt)


def ready_cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    """Both GEMM layouts and the scale of an x that its producer cast to `dtype`, else None."""
    if not isinstance(x, ScaledTensor) or x.qt is None or x.qdata.dtype != dtype:
        return None
    rows = math.prod(x.shape[:-1])
    return pad(x.qdata.reshape(rows, x.shape[-1])), x.qt, x.scale


def cast_history(module: nn.Module, history: Tensor | None, anonymous: bool) -> Tensor | None:
    """The history that a forward cast of `module` reads and updates.

    Evaluation leaves no trace in it and casts just in time. Activation checkpointing runs a forward
    again inside the backward: it reads the history as the forward found it, so that its codes are
    the forward's, and leaves no second trace.
    """
    history = history if module.training else None
    if history is None or anonymous:
        return history
    if torch._C._current_graph_task_id() != -1:
        return None if module.history_before is None else module.history_before.clone()
    module.history_before = history.clone()
    return history


def keep_f32(module: nn.Module, *histories: str) -> None:
    """After a change of the module's dtype: amaxes are not rounded."""
    for name in histories:
        state = getattr(module, name)
        if state is not None and state.dtype != torch.float32:
            setattr(module, name, state.float())


class Swapped(nn.Module):
    """A module whose class `convert` replaced: its own class still, with another forward."""

    def __reduce_ex__(self, protocol):
        mixin, base = type(self).__bases__
        return _blank, (mixin, base), self.__dict__


@functools.cache
def swapped_class(mixin: type, base: type) -> type:
    return type(base.__name__, (mixin, base), {"__module__": mixin.__module__})


def swap(module: nn.Module, mixin: type) -> None:
    module.__class__ = swapped_class(mixin, type(module))


def swap_back(module: nn.Module) -> None:
    module.__class__ = type(module).__bases__[1]


def _blank(mixin: type, base: type) -> nn.Module:
    cls = swapped_class(mixin, base)
    return cls.__new__(cls)
