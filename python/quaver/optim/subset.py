"""Subset-Norm: a second moment with one value for each subset of a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import recipe


@dataclass(frozen=True)
class SubsetSums:
    """The slot of a SubsetNorm's values: float32 or bfloat16, [R, 1] or [1, C] of a parameter whose
    matrix is [R, C], or [subsets]."""

    rule: recipe.SubsetNorm
    is_flat = True

    def shape(self, p: Tensor) -> tuple[int, ...]:
        if self.rule.size is not None:
            return (math.ceil(p.numel() / self.rule.size),)
        rows, cols = matrix_shape(p)
        return (rows, 1) if rows >= cols else (1, cols)

    def width(self, p: Tensor) -> int:
        """The subsets as `ops.adam_` takes them."""
        if self.rule.size is not None:
            return self.rule.size
        rows, cols = matrix_shape(p)
        return cols if rows >= cols else -cols

    def zeros(self, p: Tensor) -> Tensor:
        """The values of a parameter before its first step."""
        return torch.zeros(self.shape(p), dtype=self.rule.dtype, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a moment of p."""
        wanted = (self.rule.dtype, torch.Size(self.shape(p)))
        return isinstance(value, Tensor) and (value.dtype, value.shape) == wanted

    def spread(self, values: Tensor, p: Tensor) -> Tensor:
        """Values of subsets (float32, flat), so that they broadcast with the gradient's matrix
        [R, C]."""
        if self.rule.size is None:
            return values.view(self.shape(p))
        return values.repeat_interleave(self.rule.size)[: p.numel()].view(matrix_shape(p))

    def __str__(self) -> str:
        return f"subset sums in {str(self.rule.dtype).removeprefix('torch.')}"


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """[R, C] of a parameter seen as a matrix: the first axis and all others."""
    return p.shape[0], math.prod(p.shape[1:])
