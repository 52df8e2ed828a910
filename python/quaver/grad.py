"""Gradients: the norm, the finite check and clipping, for plain and FP8 gradients alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import placement
from .rows import Rows
from .tensor import ScaledTensor, locals_of


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; returns the norm before.

    The norm is of whole gradients: ranks that hold parts of the parameters (FSDP2, tensor parallel,
    ZeRO) get the same, and must all call this with all parameters of the model. An FP8 gradient is
    scaled through its scale: its codes are not touched and lose nothing. Where the norm is not
    finite the gradients stay as they are, and the optimizer skips the step.

    Raises:
        ValueError: norm_type other than 2 or inf, or a negative max_norm.
        RuntimeError: a non-finite norm, with error_if_nonfinite.
    """
    if norm_type not in (2.0, float("inf")):
        raise ValueError(f"clip_grad_norm_: norm_type must be 2 or inf, got {norm_type}")
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be >= 0, got {max_norm}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = placement.grad_norm(parameters, norm_type)
    grads = locals_of([p.grad for p in parameters if p.grad is not None])
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"clip_grad_norm_: the gradient norm is {norm.item()}")
    if grads:
        clip_by_norm_(grads, norm, max_norm)
    return norm


def clip_by_norm_(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients whose norm is `norm` (0-D float32); none where it is not finite."""
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    scaled = [g for g in grads if isinstance(g, ScaledTensor)]
    plain = [g for g in grads if not isinstance(g, ScaledTensor)]
    plain = [g.values if isinstance(g, Rows) else g for g in plain]
    factors = [g.scale for g in scaled] + [g.amax for g in scaled if g.amax is not None]
    torch._foreach_mul_(factors + plain, factor)
