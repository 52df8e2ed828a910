"""Moments of Adam that are not one value for each element, as frozen data; recipe.py has others."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def check(recipe, **choices) -> None:
    """Raises ValueError naming the first field of `recipe` whose value is none of its choices."""
    for field, allowed in choices.items():
        value = getattr(recipe, field)
        # Types are compared too: True == 1, and a tensor compares elementwise.
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise ValueError(
                f"{type(recipe).__name__}: {field} must be one of "
                f"{', '.join(map(str, allowed))}, got {value!r}"
            )


@dataclass(frozen=True)
class SubsetNorm:
    """Adam's second moment with one value for each subset of a parameter (arXiv 2411.07120,
    section 3): the moving average of the subset's sum of squared gradients. A sum and not a mean:
    the learning rate is about ten times Adam's.

    Args:
        size: of a subset of consecutive elements; None takes the smaller axis of a matrix, so that
            there is one value for each index of the larger.
        dtype: float32 or bfloat16, of the stored values.

    Raises:
        ValueError: a field with a value that is none of its choices.
    """

    size: int | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check(self, dtype=(torch.float32, torch.bfloat16))
        if self.size is not None:
            check_count(self, "size")


@dataclass(frozen=True)
class Subspace:
    """Momentum in a subspace of a matrix, and none in its complement (arXiv 2411.07120, section 4).

    The smaller axis of a matrix, of length d, is projected on `rank` directions. The first moment
    is kept of the projected gradient alone; the update's numerator is that moment, projected back,
    plus the part of the gradient that the projection loses.

    Args:
        rank: of the subspace; where it is above d, d.
        every: steps after which the subspace is chosen anew, from the gradient of that step.
        projector: "svd" takes the leading singular vectors of the gradient, "topk" its rows (or
            columns) of largest norm, "srht" a subsampled randomized Hadamard transform (a cosine
            transform where d is no power of two), "random" an orthonormal basis of Gaussian
            vectors. The last two depend on the parameter's place and the count of refreshes alone.
        refresh: "reset" starts the moment and its bias correction anew, "carry" projects the moment
            on the new subspace.
        paper_bias: divides the whole numerator by 1 - beta1^t, the complement too, as the authors'
            code does; by default the moment alone.
        dtype: float32 or bfloat16, of the stored moment and basis.

    Raises:
        ValueError: a field with a value that is none of its choices.
    """

    rank: int = 128
    every: int = 200
    projector: str = "svd"
    refresh: str = "reset"
    paper_bias: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check(
            self,
            projector=("svd", "srht", "topk", "random"),
            refresh=("reset", "carry"),
            paper_bias=(True, False),
            dtype=(torch.float32, torch.bfloat16),
        )
        check_count(self, "rank")
        check_count(self, "every")


def check_count(recipe, field: str) -> None:
    value = getattr(recipe, field)
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(
            f"{type(recipe).__name__}: {field} must be an int from 1 to 2^31 - 1, got {value!r}"
        )
