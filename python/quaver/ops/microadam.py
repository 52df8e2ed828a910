"""The step of MicroAdam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake import fake
from .gradient import parts

_ops = torch.ops.quaver


def micro_adam_(
    weights: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    errors: list[Tensor],
    ranges: list[Tensor],
    grads: list[Tensor],
    *,
    grad_amax: Tensor,
    steps: list[Tensor],
    hyper: Tensor,
    skipped: Tensor,
    kept: Sequence[int],
    error_blocks: Sequence[int],
    remainders: Sequence[Tensor | None] = (),
    seeds: Sequence[int] = (),
) -> None:
    """One step of MicroAdam (arXiv 2405.15593, algorithm 1) of n parameters in place, by one pass
    over each, or two where an error block is no part of 4096 elements.

    The formula is reference.micro_adam's, in float32. If any of `grad_amax` is not finite nothing
    changes, and `skipped` counts up. All tensors are on one device, which reads step counts and
    hyperparameters: a CUDA graph may capture the call.

    Args:
        weights: n contiguous float32, bfloat16 or float16 tensors of any shapes.
        indices: n int16 [window, row], places inside of blocks of 4096 flat elements. A row holds
            `kept` places of each whole block, then those of the rest.
        values: n bfloat16 [window, row].
        errors: n uint8 of (elements + 1) / 2: two 4-bit codes a byte, the first in the low bits.
        ranges: n bfloat16 [error blocks, 2]: the values of codes 0 and 15.
        grads: n gradients of the weights' shapes, plain or ScaledTensors with one scale.
        grad_amax: float32 [n], each decoded gradient's largest magnitude.
        steps: n int64 of one element, the steps taken, which this counts up.
        hyper: float64 [n, 6], rows of lr, beta1, beta2, eps, weight_decay, alpha.
        skipped: int64 of one element.
        kept: n counts of values that a whole block keeps; 0 where there is none.
        error_blocks: n counts of flat elements that share a range: a power of two from 16 to 4096,
            or a larger multiple of 16.
        remainders: n tensors of the weights' shapes: the low bits of masters whose high bits are
            bfloat16 weights, int16 of float32 masters or int8 of 24-bit ones; None for none.
        seeds: n keys of the noise by which bfloat16 and float16 weights round stochastically; -1
            rounds to nearest.

    Raises:
        RuntimeError or ValueError: lists of different lengths, mixed devices, another dtype or
            size, a state that is not contiguous, a step count out of range.
    """
    grad_values, grad_scales, _ = parts(list(grads))
    none = grad_amax.new_empty(0)
    _ops.micro_adam_(
        weights,
        indices,
        values,
        errors,
        ranges,
        grad_values,
        grad_scales,
        grad_amax,
        steps,
        hyper,
        skipped,
        [none if r is None else r for r in remainders],
        kept,
        error_blocks,
        seeds,
    )


@fake("micro_adam_")
def _(*args, **kwargs):
    return None
