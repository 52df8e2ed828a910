"""Sums over subsets of elements and the step that they scale (Subset-Norm), bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

# kSubsetLanes, kSubsetPiece and kStridedPiece of subset.h.
LANES, PIECE, STRIDED_PIECE = 32, 1 << 14, 128


def _in_order(terms: Tensor) -> Tensor:
    """Sums the last axis from the first to the last."""
    total = torch.zeros(terms.shape[:-1])
    for term in terms.unbind(-1):
        total = total + term
    return total


def _padded(x: Tensor, width: int) -> Tensor:
    """x cut into rows of that width, with zeros behind the last."""
    return torch.nn.functional.pad(x, (0, -x.numel() % width)).view(-1, width)


def _consecutive(squares: Tensor) -> Tensor:
    """The sum of one subset of consecutive elements: of its pieces in order, each of lanes that are
    added in a tree."""
    pieces = []
    for piece in squares.split(PIECE):
        lanes = _in_order(_padded(piece, LANES).T)
        while lanes.numel() > 1:
            lanes = lanes[: lanes.numel() // 2] + lanes[lanes.numel() // 2 :]
        pieces.append(lanes[0])
    return _in_order(torch.stack(pieces))


def subset_sums(grad: Tensor, width: int) -> Tensor:
    """The sums of squares of every `width` elements that follow each other, or of every -width-th
    element: float32, flat."""
    squares = grad.float().flatten() * grad.float().flatten()
    if width < 0:
        pieces = [_in_order(piece.T) for piece in squares.view(-1, -width).split(STRIDED_PIECE)]
        return _in_order(torch.stack(pieces, -1)) if pieces else torch.zeros(-width)
    subsets = [_consecutive(s) for s in squares.split(width)] if width and len(squares) else []
    return torch.stack(subsets) if subsets else torch.zeros(0)


def subset_adamw(w: Tensor, m: Tensor, v: Tensor, g: Tensor, width: int, t: int, lr, beta1, beta2,
                 eps, weight_decay) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Step t of AdamW in float32 under a second moment of subsets (flat, float32 or bfloat16; m
    likewise, of w's shape): weight in float32, exp_avg, exp_avg_sq."""

    def f32(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float64).float()

    kept, added = f32(beta2) * v.float(), f32(1 - beta2) * subset_sums(g, width)
    values = kept + added
    root = values.double().sqrt().float() * f32(
        (1 - beta2**t) ** -0.5
    )  # torch's f32 root is not exact
    rate = f32(lr / (1 - beta1**t)) / (root + f32(eps))
    n = w.numel()
    rate = rate.repeat(n // -width) if width < 0 else rate.repeat_interleave(width)[:n]
    average = f32(beta1) * m.float() + f32(1 - beta1) * g.float()
    new = f32(1 - lr * weight_decay) * w.float() - rate.view(w.shape) * average
    return new, average.to(m.dtype), values.to(v.dtype)
