"""The learning rate of each step, and which parameters decay."""

from __future__ import annotations

import math

from torch import nn

from .settings import WEIGHT_DECAY, RunSettings

__all__ = ["learning_rate", "parameter_groups"]


def learning_rate(step: int, settings: RunSettings) -> float:
    """The rate of step 1..steps: a linear warmup, then by --schedule a cosine or a line down to a
    tenth, or the peak."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "linear":
        return settings.lr * (1 - 0.9 * progress)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> list[dict]:
    """Weight decay for matrices alone: it pulls norms and biases to values that mean nothing."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
