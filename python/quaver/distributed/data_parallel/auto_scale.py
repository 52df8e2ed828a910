"""Auto-scaling: the headroom of a ring's partial sums (FP8-LM, arXiv 2310.18313, equation 3).

Only the `ring` has it: its sums are FP8 all the way. `two_shot` sums in f32 and cannot overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AutoScale", "AutoScaleRule"]


@dataclass(frozen=True)
class AutoScaleRule:
    """mu is halved for the next step where more than `threshold` of a tensor's values are at FP8's
    maximum after the reduction, and else grows so that it doubles in `doubling` steps. It starts at
    1/sqrt(N) and stays within [least, most]: at 1/N (least=None) no sum can overflow, beyond 1 the
    largest value itself would.
    """

    threshold: float = 1e-5
    backoff: float = 0.5
    doubling: int = 1000
    least: float | None = None
    most: float = 1.0

    def __post_init__(self):
        good = 0 < self.backoff < 1 and self.doubling > 0 and 0 <= self.threshold < 1
        if not good or not (self.least is None or 0 < self.least <= self.most):
            raise ValueError(f"AutoScaleRule: out of range: {self}")


class AutoScale:
    """mu of `sizes`, the numbers of values of some tensors: float32 [tensors], on `device`."""

    def __init__(self, sizes: list[int], ranks: int, rule: AutoScaleRule, device="cpu"):
        self.rule = rule
        self.least = 1 / ranks if rule.least is None else rule.least
        start = min(max(1 / math.sqrt(ranks), self.least), rule.most)
        self.mu = torch.full((len(sizes),), start, dtype=torch.float32, device=device)
        allowed = [rule.threshold * n for n in sizes]
        self._allowed = torch.tensor(allowed, dtype=torch.float32, device=device)
        self._growth = 2.0 ** (1.0 / rule.doubling)

    @torch.no_grad()
    def update(self, saturated: Tensor, finite: Tensor) -> None:
        """Adapts mu to one reduction. `saturated`: int32 [tensors], values at the maximum.
        `finite`: bool [tensors]; False leaves that mu as it is. The host does not wait."""
        over = saturated > self._allowed
        mu = torch.where(over, self.mu * self.rule.backoff, self.mu * self._growth)
        mu = mu.clamp(self.least, self.rule.most)
        self.mu.copy_(torch.where(finite, mu, self.mu))
