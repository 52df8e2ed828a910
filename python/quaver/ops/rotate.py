"""Rotary positions of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake import fake

_ops = torch.ops.quaver


def rotate(
    parts: Sequence[Tensor], cos: Tensor, sin: Tensor, turned: int, inverse: bool = False
) -> Tensor:
    """Heads turned by their positions (RoFormer, arXiv 2104.09864), side by side with heads that
    are copied: x * cos + swap(x) * sin, where swap exchanges the halves of a head, in float32 and
    rounded once. Autograd does not differentiate it.

    Args:
        parts: 1 to 3 tensors [batch, length, heads, head_dim], float32 or bfloat16, any strides;
            each has a number of heads of its own. head_dim is even.
        cos, sin: float32 [length, head_dim]; the first half of sin is negative.
        turned: the heads, from the first on, that are turned.
        inverse: turn back, which is the gradient: x * cos - swap(x) * sin.

    Returns:
        [batch, length, heads of all parts, head_dim], contiguous.

    Raises:
        RuntimeError or ValueError: other shapes, dtypes or devices, named with what came.
    """
    return _ops.rotate(list(parts), cos, sin, turned, inverse)


@fake("rotate")
def _(parts, cos, sin, turned, inverse=False):
    batch, length, _, head_dim = parts[0].shape
    return parts[0].new_empty([batch, length, sum(t.shape[2] for t in parts), head_dim])
