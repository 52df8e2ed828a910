"""Tensor and sequence parallelism (plan.py)."""

from .plan import (
    ColumnParallel,
    GatherInput,
    LocalHeads,
    RowParallel,
    SequenceParallel,
    Split,
    default_plan,
    parallelize,
)
from .state import gather_state, scatter_state

__all__ = [
    "ColumnParallel",
    "GatherInput",
    "LocalHeads",
    "RowParallel",
    "SequenceParallel",
    "Split",
    "default_plan",
    "gather_state",
    "parallelize",
    "scatter_state",
]
