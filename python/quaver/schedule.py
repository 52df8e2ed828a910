"""The learning rate of each step, and which parameters decay."""

from __future__ import annotations

import math

from torch import nn

from .settings import RunSettings

__all__ = ["learning_rate", "parameter_groups"]

WEIGHT_DECAY = 0.1


def learning_rate(step: int, settings: RunSettings) -> float:
    """The rate of step 1..steps: a linear warmup, then a cosine down to a tenth."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay for matrices alone: it pulls norms and biases to values that mean nothing."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
