"""The step of Adam with moments of 4 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake import fake
from .gradient import parts

_ops = torch.ops.quaver

SECONDS = {"linear4": 0, "linear4-rank1": 1, "factor": 2}  # Second of adam4.h


def adam_4bit_(
    weights: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    grads: list[Tensor],
    *,
    grad_amax: Tensor,
    steps: list[Tensor],
    hyper: Tensor,
    skipped: Tensor,
    seconds: Sequence[int],
    remainders: Sequence[Tensor | None] = (),
    seeds: Sequence[int] = (),
) -> None:
    """One step of AdamW with moments of 4 bits (arXiv 2309.01507, algorithm 1) of n parameters in
    place, by one pass over each, or two for a rank-1 second moment.

    The formula is reference.adamw_4bit's, in float32. If any of `grad_amax` is not finite nothing
    changes, and `skipped` counts up. All tensors are on one device, which reads step counts and
    hyperparameters: a CUDA graph may capture the call.

    Args:
        weights: n contiguous float32, bfloat16 or float16 tensors of any shapes.
        exp_avgs: n uint8 of (elements + 1) / 2: two 4-bit codes a byte, the first in the low bits.
        exp_avg_scales: n float32, one for each 128 flat elements.
        exp_avg_sqs: as exp_avgs; empty for a factored moment.
        exp_avg_sq_scales: n float32, by `seconds`: 0, one for each 128 flat elements; 1, the maxima
            of the slices along each axis, those of axis 0 first; 2, the factors of this step's
            moment, which are read only: one for each row (all axes but the last), then one for each
            column (all axes but the one before the last).
        grads: n gradients of the weights' shapes, plain or ScaledTensors with one scale.
        grad_amax: float32 [n], each decoded gradient's largest magnitude.
        steps: n int64 of one element, the steps taken, which this counts up.
        hyper: float64 [n, 5], rows of lr, beta1, beta2, eps, weight_decay.
        skipped: int64 of one element.
        seconds: n values of SECONDS; 1 and 2 need 2 to 8 axes.
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
    _ops.adam_4bit_(
        weights,
        exp_avgs,
        exp_avg_scales,
        exp_avg_sqs,
        exp_avg_sq_scales,
        grad_values,
        grad_scales,
        grad_amax,
        steps,
        hyper,
        skipped,
        [none if r is None else r for r in remainders],
        seconds,
        seeds,
    )


@fake("adam_4bit_")
def _(*args, **kwargs):
    return None
