"""Optimizer states, and the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import FLAT_BLOCK, Layout
from ..tensor import ScaledTensor
from .fake import fake
from .gradient import parts

_ops = torch.ops.quaver


def encode_state(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, expand: bool = True):
    """Encode x in groups of 128 flat elements with one float32 scale each, as Adam's moments are.

    Without `expand` a group is x ~= scale * q with scale = amax / finite_max. With it the group's
    dynamic range is first expanded to the format's: see "Dynamic range expansion" in codec.h (COAT,
    arXiv 2410.19313, section 4). Rounds to nearest, but nothing else than zero to zero; infinity
    saturates, NaN stays NaN.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        dtype: float8_e4m3fn or float8_e5m2.

    Raises:
        RuntimeError: other types.
    """
    q, scale = _ops.encode_state(x, dtype, expand)
    return ScaledTensor(q, scale, None, torch.float32, Layout.of(dtype, "flat", expand=expand))


@fake("encode_state")
def _(x, dtype, expand):
    groups = (x.numel() + FLAT_BLOCK - 1) // FLAT_BLOCK
    return x.new_empty(x.shape, dtype=dtype), x.new_empty([groups], dtype=torch.float32)


@fake("decode_state")
def _(q, scale, expand):
    return q.new_empty(q.shape, dtype=torch.float32)


def adam_(
    weights: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    *,
    grad_amax: Tensor,
    steps: list[Tensor],
    hyper: Tensor,
    skipped: Tensor,
    scalings: Sequence[int] = (),
    copies: Sequence[tuple[Tensor, Tensor, Tensor] | None] = (),
    remainders: Sequence[Tensor | None] = (),
    seeds: Sequence[int] = (),
    first_elements: Sequence[int] = (),
    subsets: Sequence[int] = (),
    subset_sums: Sequence[Tensor | None] = (),
) -> None:
    """One AdamW step of n parameters in place, each state read and written once.

    Computes reference.adamw in float32 over what the states decode to. Their new scales come from
    bounds of the new amaxes, so that one pass is enough. If any of `grad_amax` is not finite
    nothing changes, and `skipped` counts up. All tensors are on one device, which reads step
    counts and hyperparameters: a CUDA graph may capture the call.

    Args:
        weights: n contiguous float32, bfloat16 or float16 tensors, or float16 ScaledTensors with
            one scale and an amax, of any shapes.
        exp_avgs, exp_avg_sqs: n moments of the weights' shapes each, contiguous float32, or
            ScaledTensors: float16, float8_e4m3fn or float8_e5m2 with one scale and an amax, or FP8
            of grain "flat". Where `subsets` has a count, float32 or bfloat16.
        grads: n gradients of the weights' shapes, plain or ScaledTensors with one scale.
        grad_amax: float32 [n], each decoded gradient's largest magnitude.
        steps: n int64 of one element, the steps taken, which this counts up.
        hyper: float64 [n, 5], rows of lr, beta1, beta2, eps, weight_decay.
        skipped: int64 of one element.
        scalings: 3n codes of how weights, exp_avgs and exp_avg_sqs are scaled: 0 as a whole, 1 by
            flat blocks of 128, 2 by such blocks after expansion. Default: all 0.
        copies: n triples (q, qt, scale): float8_e4m3fn codes [N, K] and [K, N] and a float32, which
            receive the GEMM copies of a float16 ScaledTensor weight; None for none.
        remainders: n tensors of the weights' shapes: the low bits of masters whose high bits are
            bfloat16 weights, int16 of float32 masters or int8 of 24-bit ones; None for none.
        seeds: n keys of the noise by which bfloat16 and float16 weights round stochastically, a
            function of (seed, step, element); -1 rounds to nearest.
        first_elements: n flat indices of the weights' first elements in whole tensors of which
            they are shards, for the noise. Default: all 0.
        subsets: n counts by which elements share values of a second moment, as `subset_sums` takes
            them. Default: all 0.
        subset_sums: n tensors of this gradient's sums, as `subset_sums` gives them; None for none.

    Raises:
        RuntimeError or ValueError: lists of different lengths, mixed devices, another dtype, a
            state that is not contiguous, a scale without an amax or where the format takes none, a
            step count out of range.
    """
    values, scales, amaxes = parts([*weights, *exp_avgs, *exp_avg_sqs])
    grad_values, grad_scales, _ = parts(list(grads))
    none = grad_amax.new_empty(0)
    _ops.adam_(
        values,
        scales,
        amaxes,
        grad_values,
        grad_scales,
        grad_amax,
        steps,
        hyper,
        skipped,
        [none if c is None else c[k] for k in range(3) for c in copies] if any(copies) else [],
        [none if r is None else r for r in remainders],
        [none if s is None else s for s in subset_sums],
        scalings,
        seeds,
        first_elements,
        subsets,
    )


@fake("adam_")
def _(*args, **kwargs):
    return None


def subset_sums(grads: list[Tensor], subsets: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The sums of squared gradients over subsets of elements (Subset-Norm, arXiv 2411.07120), and
    each gradient's amax, from one read. The order of a sum, in float32, depends on shapes alone.

    Args:
        grads: n gradients, plain or ScaledTensors with one scale.
        subsets: n counts by which elements form subsets: k for every k elements that follow each
            other, -k for every k-th element (a column of a matrix with k), 0 for none.

    Returns:
        The amaxes (float32 [n]; a non-finite value gives a non-finite one, a non-finite scale NaN),
        and n tensors of the sums: float32 [subsets].

    Raises:
        RuntimeError or ValueError: no gradients, mixed devices, another dtype, a count that is
            minus no divisor of the gradient's size.
    """
    amax, sums = _ops.subset_sums(*parts(grads), subsets)
    return amax, list(
        sums.split([_subset_count(*pair) for pair in zip(grads, subsets, strict=True)])
    )


def _subset_count(grad: Tensor, width: int) -> int:
    return -width if width <= 0 else -(-grad.numel() // width)


@fake("subset_sums")
def _(grads, scales, amaxes, subsets):
    counts = [_subset_count(*pair) for pair in zip(grads, subsets, strict=True)]
    first = grads[0]
    return tuple(first.new_empty([n], dtype=torch.float32) for n in (len(grads), sum(counts)))
