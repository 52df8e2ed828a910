"""The local ops of the all-reduce: shared scales, buckets, sums of shards."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake import fake
from .gradient import parts

_ops = torch.ops.quaver


BUCKET_ALIGNMENT = 16  # kBucketAlignment of all_reduce.h


def bucket_length(numel: int) -> int:
    """The elements of a bucket that a tensor of `numel` elements takes, padding included."""
    return -(-numel // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT


def share_scales(
    amaxes: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, mu: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decode scales for the values of every rank, and for their sum (FP8-LM, equation 4).

    Args:
        amaxes: float32 [ranks, tensors], the same on every rank.
        dtype: float8_e4m3fn or float8_e5m2.
        mu: float32 [tensors]. With it, partial sums of mu * value are to stay in the format
            (equation 3) and both scales are one. Without, a sum cannot overflow its scale.

    Returns:
        Two float32 [tensors], powers of two; 1 where an amax is not finite.
    """
    return _ops.share_scales(amaxes, mu, dtype)


@fake("share_scales")
def _(amaxes, mu, dtype):
    scales = amaxes.new_empty([amaxes.shape[1]], dtype=torch.float32)
    return scales, torch.empty_like(scales)


def pack(
    tensors: list[Tensor],
    dtype: torch.dtype,
    length: int,
    scales: Tensor | None = None,
) -> Tensor:
    """One bucket [length] of `dtype` with all tensors, each encoded once by its place in `scales`.

    Tensor i follows tensor i - 1 at the next multiple of 16 places; between and behind them are
    zeros. Tensors are plain or ScaledTensors with one scale. FP8 needs `scales`, float32 [tensors];
    other types are scaled by 1 without. Raises RuntimeError where they do not fit.
    """
    values, own, _ = parts(tensors)
    return _ops.pack(values, own, scales, dtype, length)


@fake("pack")
def _(tensors, tensor_scales, scales, dtype, length):
    return tensors[0].new_empty([length], dtype=dtype)


def reduce_shards(
    shards: Tensor,
    sizes: list[int],
    first: int = 0,
    scales: Tensor | None = None,
    sum_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over ranks of one shard of their buckets: f32, in rank order.

    Args:
        shards: [ranks, length] codes of any format; length a multiple of 16.
        sizes: elements of each tensor of the bucket (see `pack`).
        first: the shard's first place in the bucket, a multiple of 16.
        scales: float32 [tensors], decode scales of the codes; None for 1.
        sum_scales: float32 [tensors], decode scales of the result; None for 1.
        dtype: of the result: the codes' (default) or float32.

    Returns:
        The shard of the sum [length]; float32 [tensors], the amax of the sums of each tensor's part
        in the shard, before they were encoded; int32 [tensors], how many results are at FP8's
        finite maximum.
    """
    return _ops.reduce_shards(shards, scales, sum_scales, sizes, first, dtype or shards.dtype)


@fake("reduce_shards")
def _(shards, scales, sum_scales, sizes, first, dtype):
    out = shards.new_empty([shards.shape[1]], dtype=dtype)
    amax = shards.new_empty([len(sizes)], dtype=torch.float32)
    return out, amax, torch.empty_like(amax, dtype=torch.int32)
