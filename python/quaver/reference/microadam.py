"""MicroAdam (arXiv 2405.15593, algorithm 1): f32 bit for bit, or f64 without 16-bit storage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOP_BLOCK = 4096
MOST_FEEDBACK = 2.0**100


def micro_adam_state(
    numel: int, density: float, window: int, error_block: int, dtype=torch.float32
) -> dict[str, Tensor]:
    """The state before the first step. In f64 `value` and `error_range` are f64 too, so that no
    rounding but that of the 4-bit codes remains."""
    row = sum(math.ceil(len(b) * density) for b in torch.empty(numel).split(TOP_BLOCK) if len(b))
    stored = torch.bfloat16 if dtype == torch.float32 else dtype
    return {
        "index": torch.zeros(window, row, dtype=torch.int16),
        "value": torch.zeros(window, row, dtype=stored),
        "error": torch.zeros((numel + 1) // 2, dtype=torch.uint8),
        "error_range": torch.zeros(-(-numel // error_block), 2, dtype=stored),
    }


def decode_error(state: dict[str, Tensor], numel: int, error_block: int, dtype=torch.float32):
    """The values of an error's codes, flat."""
    codes = torch.stack([state["error"] & 15, state["error"] >> 4], 1).flatten()[:numel].to(dtype)
    low, level = _codec(state["error_range"], numel, error_block, dtype)
    return low + level * codes


def _codec(ranges: Tensor, numel: int, error_block: int, dtype):
    low, high = ranges.to(dtype).unbind(1)
    level = (high - low) / torch.tensor(15.0, dtype=dtype)
    return (x.repeat_interleave(error_block)[:numel] for x in (low, level))


def round_outwards(x: Tensor, up: bool) -> Tensor:
    """The nearest bf16 not below x (`up`) or not above it; x itself in f64."""
    if x.dtype == torch.float64:
        return x
    bits = x.view(torch.int32)
    away = (bits & 0xFFFF != 0) & ((bits >= 0) if up else (bits < 0))
    return ((bits >> 16) + away.int()).to(torch.int16).view(torch.bfloat16)


def micro_adam(
    w: Tensor, state: dict[str, Tensor], g: Tensor, t: int, lr, beta1, beta2, eps,
    weight_decay=0.0, alpha=0.0, *, density: float, error_block: int,
) -> Tensor:  # fmt: skip
    """Step t (from 1): writes `state` and returns the new weight, f32 or f64 as w is."""
    dtype, n, shape = w.dtype, w.numel(), w.shape
    scalar = lambda x: torch.tensor(x, dtype=dtype)  # noqa: E731
    a = g.to(dtype).flatten() + scalar(1 - alpha) * decode_error(state, n, error_block, dtype)
    a = a.clamp(-MOST_FEEDBACK, MOST_FEEDBACK)

    window = len(state["index"])
    slot, blocks, at = (t - 1) % window, [], 0
    for start in range(0, n, TOP_BLOCK):
        block = a[start : start + TOP_BLOCK]
        kept = math.ceil(len(block) * density)
        places = block.abs().sort(descending=True, stable=True).indices[:kept].sort().values
        state["index"][slot, at : at + kept] = places.to(torch.int16)
        state["value"][slot, at : at + kept] = block[places].to(state["value"].dtype)
        block[places] -= state["value"][slot, at : at + kept].to(dtype)  # a view of `a`
        blocks += [start] * kept
        at += kept

    for i, part in enumerate(a.split(error_block) if n else ()):
        state["error_range"][i, 0] = round_outwards(part.amin(), up=False)
        state["error_range"][i, 1] = round_outwards(part.amax(), up=True)
    low, level = _codec(state["error_range"], n, error_block, dtype)
    codes = ((a - low) / torch.where(level > 0, level, 1) + 0.5).clamp(0, 15).to(torch.uint8)
    codes = torch.cat([codes, codes.new_zeros(n % 2)])
    state["error"].copy_(codes[0::2] | codes[1::2] << 4)

    first, second = torch.zeros(2, n, dtype=dtype)
    for r in range(min(t, window)):
        age = (slot - r) % window
        place = state["index"][r].long() + torch.tensor(blocks, dtype=torch.long)
        value = state["value"][r].to(dtype)
        first[place] += scalar(beta1**age) * value
        second[place] += scalar(beta2**age) * (value * value)
    c1, c2 = ((1 - beta) / (1 - beta**t) for beta in (beta1, beta2))
    root = second.double().sqrt().to(dtype)  # correctly rounded, as torch's f32 sqrt is not always
    denominator = root * scalar(math.sqrt(c2)) + scalar(eps)
    update = scalar(lr * c1) * (first / denominator)
    update = torch.where(denominator == 0, 0, update)
    error = decode_error(state, n, error_block, dtype) if alpha else torch.zeros_like(a)
    step = update + scalar(lr * alpha) * error
    return (scalar(1 - lr * weight_decay) * w.flatten() - step).view(shape)
