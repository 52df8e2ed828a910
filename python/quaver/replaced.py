"""Warns of optimizers that step parameters which `convert` or `restore` took out of their model."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

# The old parameters that are still alive. Without an optimizer that holds them they are freed.
_replaced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_hook = None


def mark_replaced(old: nn.Parameter, new: nn.Parameter) -> None:
    """Records that `new` took the place of `old` in a model, unless they are one."""
    global _hook
    if old is new:
        return
    _replaced[old] = None
    if _hook is None:  # torch's own hook for all optimizers
        _hook = register_optimizer_step_pre_hook(_warn)


def _warn(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    if not _replaced:
        return
    stale = [p for group in optimizer.param_groups for p in group["params"] if p in _replaced]
    if stale:
        for p in stale:  # once for each
            del _replaced[p]
        warnings.warn(
            f"{type(optimizer).__name__}: {len(stale)} of its parameters are not the model's any "
            "more, because quaver.convert or restore made new ones; build the optimizer afterwards",
            stacklevel=3,
        )
