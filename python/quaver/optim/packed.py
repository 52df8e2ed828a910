"""Adam's moments in 4 bits (Li, Chen & Zhu, arXiv 2309.01507): their slots, and their step."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..layout import FLAT_BLOCK
from ..ops.adam4 import SECONDS
from ..tensor import ScaledTensor, locals_of
from .base import Item
from .moments import Part, remainders_of

LEAST = 4096  # a parameter of so many values or fewer keeps f32 moments
MOST_AXES = 8  # kMaxAxes of adam4.h


def second_of(p: Tensor, second: str) -> str:
    """The form of p's second moment under a recipe's: vectors have blocks."""
    return second if 2 <= p.dim() <= MOST_AXES else "linear4"


def slots(p: Tensor, second: str) -> dict[str, Part]:
    """The slots of p's two moments: codes two a byte, the first in the low bits, and scales."""
    n, second = p.numel(), second_of(p, second)
    codes = Part(torch.uint8, ((n + 1) // 2,))
    blocks = Part(torch.float32, (-(-n // FLAT_BLOCK),))
    first = {"exp_avg": codes, "exp_avg_scale": blocks}
    if second == "factor":
        rows, cols = p.shape[:-1], (*p.shape[:-2], p.shape[-1])
        return first | {
            "exp_avg_sq_row": Part(torch.float32, tuple(rows)),
            "exp_avg_sq_col": Part(torch.float32, cols),
        }
    scales = blocks if second == "linear4" else Part(torch.float32, (sum(p.shape),))
    return first | {"exp_avg_sq": codes, "exp_avg_sq_scale": scales}


def step(items: list[Item], second: str, amaxes: Tensor, hyper: Tensor, skipped: Tensor,
         rounding: list[str]) -> None:  # fmt: skip
    """Steps the items by adam_4bit_, whose hyper, amaxes and skipped these are. `rounding` is of
    each weight, one of a recipe's."""
    params, states = [item.parameter for item in items], [item.state for item in items]
    forms = [second_of(p, second) for p in params]
    none = torch.empty(0, dtype=torch.uint8, device=skipped.device)
    usable = amaxes.isfinite().all() if "factor" in forms else None
    ops.adam_4bit_(
        params,
        [s["exp_avg"] for s in states],
        [s["exp_avg_scale"] for s in states],
        [s.get("exp_avg_sq", none) for s in states],
        [
            _factors(item, usable, row) if form == "factor" else item.state["exp_avg_sq_scale"]
            for item, form, row in zip(items, forms, hyper, strict=True)
        ],
        locals_of([item.grad for item in items]),
        grad_amax=amaxes,
        steps=[s["step"] for s in states],
        hyper=hyper,
        skipped=skipped,
        seconds=[SECONDS[form] for form in forms],
        remainders=remainders_of(states),
        seeds=[
            item.ordinal if how == "stochastic" else -1
            for item, how in zip(items, rounding, strict=True)
        ],
    )
    torch.autograd.graph.increment_version(params)


def _factors(item: Item, usable: Tensor, hyper: Tensor) -> Tensor:
    """Updates the means of a factored second moment, unless the step is skipped, and returns the
    factors whose products it is: row / mean(row) and col, flat."""
    grad = item.grad.dequantize() if isinstance(item.grad, ScaledTensor) else item.grad
    beta2 = torch.where(usable, hyper[2], 1.0)
    keep, add = beta2.float(), (1 - beta2).float()
    means = []
    for key, axis in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
        norm = torch.linalg.vector_norm(grad, dim=axis, dtype=torch.float32)
        # A norm that is not finite is of a step that is skipped: 0 times it is not 0.
        mean = torch.where(usable, norm.square() / grad.shape[axis], 0.0)
        means.append(item.state[key].mul_(keep).add_(mean * add))
    row, col = means
    tiny = torch.finfo(torch.float32).tiny  # where all gradients were 0
    return torch.cat([(row / row.mean(-1, keepdim=True).clamp_min(tiny)).flatten(), col.flatten()])
