"""The mean of gradients over ranks, in FP8 on the wire (FP8-LM, arXiv 2310.18313, section 2.1).

`two_shot`: one gather of all amaxes, one encode with shared scales, an exchange of FP8 shards, a
sum in f32 in rank order, one encode of the sum, a gather. Two roundings whatever the number of
ranks, and identical bytes on all of them. The scale of the sum comes from the amaxes that are known
already: it fits the sum of what every rank may have stored, so it needs no further message and
nothing can overflow. It is per tensor, so a result does not depend on the bucket. (Prior art for
the exchange and gather: ColossalAI's FP8 communication, pull request 5928.)

`ring`: the paper's form. Partial sums pass the ring in FP8 and are rounded, and saturated, at
every hop; mu makes room for them. Where in the ring an element's sum begins depends on its place in
the bucket. NCCL's own FP8 sum where the backend has it, in NCCL's order.

A protocol is a generator: it yields each Pending message and is sent the result, so the same code
serves blocking calls and overlap with backward.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ... import ops
from ...comm.transport import Pending, Transport
from ...nn.cast import nan_unless_finite
from ...tensor import ScaledTensor

__all__ = [
    "ALGORITHMS",
    "FP8",
    "Protocol",
    "Reduced",
    "all_reduce_mean",
    "reduce_scatter_mean",
    "reduce_to_owners",
    "ring",
    "run",
    "two_shot",
    "upload",
]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ALGORITHMS = ("two_shot", "ring")

Protocol = Generator[Pending, Tensor, "Reduced"]


@dataclass
class Reduced:
    """`tensors`: the means, None where another rank owns one. `saturated`: int32 [tensors], results
    at FP8's maximum over all ranks, where the protocol counts them."""

    tensors: list[Tensor | None]
    saturated: Tensor | None = None


def run(protocol: Protocol) -> Reduced:
    """Drives a protocol to its end, waiting for every message."""
    try:
        pending = next(protocol)
        while True:
            pending = protocol.send(pending.wait())
    except StopIteration as end:
        return end.value


def upload(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host values as a 1-D tensor. From pinned memory, because a copy from pageable memory blocks
    the host until the stream has come to it."""
    found = torch.tensor(values, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _mean_amax(amax: Tensor, amaxes: Tensor, ranks: int) -> Tensor:
    """amax of the mean; NaN where some rank's values are not finite, because FP8 would hide it."""
    return torch.where(amaxes.isfinite().all(0), amax / ranks, torch.nan)


def _views(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The tensors of a bucket, as views of it."""
    views, at = [], 0
    for t in like:
        views.append(flat[at : at + t.numel()].view(t.shape))
        at += ops.bucket_length(t.numel())
    return views


def _scaled(codes: list[Tensor], scales: Tensor, amaxes: Tensor, like: list[Tensor]):
    parts = zip(codes, scales.unbind(), amaxes.unbind(), like, strict=True)
    return [ScaledTensor(q, s, a, t.dtype) for q, s, a, t in parts]


def _shard_length(tensors: list[Tensor], ranks: int) -> int:
    total = sum(ops.bucket_length(t.numel()) for t in tensors)
    return ops.bucket_length(math.ceil(total / ranks))


def two_shot(tensors: list[Tensor], dtype: torch.dtype, transport: Transport) -> Protocol:
    """The mean of every tensor in `dtype`: FP8 (as ScaledTensors), or the tensors' own type."""
    ranks, low = transport.size, dtype in FP8
    shard = _shard_length(tensors, ranks)
    sizes = [t.numel() for t in tensors]
    if low:
        amaxes = yield transport.all_gather(ops.amaxes(tensors), "scale")
        scales, sum_scales = ops.share_scales(amaxes, dtype)
    else:  # a plain sum is divided by N
        scales, sum_scales = (
            None,
            torch.full(
                (len(tensors),), float(ranks), dtype=torch.float32, device=tensors[0].device
            ),
        )
    bucket = ops.pack(tensors, dtype, shard * ranks, scales)
    shards = yield transport.all_to_all(bucket, [shard] * ranks, "gradient")
    mine, amax, _ = ops.reduce_shards(shards, sizes, shard * transport.rank, scales, sum_scales)
    if not low:
        gathered = yield transport.all_gather(mine, "gradient")
        return Reduced(_views(gathered.view(-1), tensors))
    # One message for the shards and for the exact amaxes of their sums, which the optimizer reads.
    rows = yield transport.all_gather(torch.cat([_bytes(mine), _bytes(amax)]), "gradient")
    codes = rows[:, :shard].reshape(-1).view(dtype)
    amax = rows[:, shard:].contiguous().view(torch.float32).amax(0)
    amax = _mean_amax(amax, amaxes, ranks)
    return Reduced(_scaled(_views(codes, tensors), sum_scales / ranks, amax, tensors))


def ring(tensors: list[Tensor], dtype: torch.dtype, transport: Transport, mu: Tensor) -> Protocol:
    """The mean in FP8 by a ring of FP8 sums; mu is float32 [tensors]."""
    ranks, rank = transport.size, transport.rank
    shard = _shard_length(tensors, ranks)
    sizes = [t.numel() for t in tensors]
    amaxes = yield transport.all_gather(ops.amaxes(tensors), "scale")
    scales, _ = ops.share_scales(amaxes, dtype, mu)
    bucket = ops.pack(tensors, dtype, shard * ranks, scales)
    if transport.sums_fp8:
        bucket = yield transport.sum(bucket, "gradient")
    if ranks == 1 or transport.sums_fp8:
        # Encoding again with the same scale keeps the codes, and counts what is saturated.
        codes, amax, saturated = ops.reduce_shards(bucket[None], sizes, 0, scales, scales)
        amax = _mean_amax(amax, amaxes, ranks)
        means = _scaled(_views(codes, tensors), scales / ranks, amax, tensors)
        return Reduced(means, saturated)
    bucket = bucket.view(ranks, shard)
    # The sum of chunk c starts at rank c + 1 and ends at rank c.
    total = bucket[(rank - 1) % ranks]
    for hop in range(1, ranks):
        got = yield transport.shift(total, "gradient")
        chunk = (rank - 1 - hop) % ranks
        total, amax, saturated = ops.reduce_shards(
            torch.stack([got, bucket[chunk]]), sizes, chunk * shard, scales, scales
        )
    notes = torch.cat([_bytes(amax), _bytes(saturated)])
    rows = yield transport.all_gather(torch.cat([_bytes(total), notes]), "gradient")
    codes = rows[:, :shard].reshape(-1).view(dtype)
    notes = rows[:, shard:].contiguous().view(torch.int32).view(ranks, 2, -1)
    amax = notes[:, 0].contiguous().view(torch.float32).amax(0)
    amax = _mean_amax(amax, amaxes, ranks)
    tensors = _scaled(_views(codes, tensors), scales / ranks, amax, tensors)
    return Reduced(tensors, notes[:, 1].sum(0, dtype=torch.int32))


def reduce_to_owners(
    tensors: list[Tensor],
    dtype: torch.dtype,
    transport: Transport,
    owners: list[int],
    result: torch.dtype | None = None,
) -> Protocol:
    """The mean of each whole tensor, on its owner alone (ZeRO): `two_shot` without its gather, and
    with its bits. `result` float32 keeps what FP8 messages add up to."""
    ranks, low = transport.size, dtype in FP8
    result = result or dtype
    order = sorted(range(len(tensors)), key=lambda i: owners[i])
    lengths = [0] * ranks
    for i, t in enumerate(tensors):
        lengths[owners[i]] += ops.bucket_length(t.numel())
    mine = [i for i in order if owners[i] == transport.rank]
    index = upload(mine, torch.int64, tensors[0].device)
    scales = own_scales = None
    if low:
        amaxes = yield transport.all_gather(ops.amaxes(tensors), "scale")
        scales, sum_scales = ops.share_scales(amaxes, dtype)
        own_scales = scales[index]
        scales = scales[upload(order, torch.int64, scales.device)]
    bucket = ops.pack([tensors[i] for i in order], dtype, sum(lengths), scales)
    shards = yield transport.all_to_all(bucket, lengths, "gradient")
    means: list[Tensor | None] = [None] * len(tensors)
    if not mine:
        return Reduced(means)
    encoded = low and result != torch.float32
    divisor = torch.full((len(mine),), float(ranks), dtype=torch.float32, device=tensors[0].device)
    flat, amax, _ = ops.reduce_shards(
        shards,
        [tensors[i].numel() for i in mine],
        0,
        own_scales,
        sum_scales[index] if encoded else divisor,
        result,
    )
    like = [tensors[i] for i in mine]
    found = _views(flat, like)
    if low:
        amax = _mean_amax(amax, amaxes[:, index], ranks)
    if encoded:
        found = _scaled(found, sum_scales[index] / ranks, amax, like)
    elif low:  # NaN where FP8 saturated a value that was not finite
        for value, a in zip(found, amax.unbind(), strict=True):
            value.copy_(nan_unless_finite(value, a))
    for i, mean in zip(mine, found, strict=True):
        means[i] = mean
    return Reduced(means)


def _checked(name: str, tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    tensors = list(tensors)
    if dtype not in FP8:
        raise ValueError(f"{name}: dtype must be float8_e4m3fn or float8_e5m2, got {dtype}")
    for i, t in enumerate(tensors):
        if t.dtype not in ops.FLOATS:
            raise ValueError(f"{name}: tensor {i} must be of {ops.FLOATS}, got {t.dtype}")
        if t.device != tensors[0].device:
            raise ValueError(
                f"{name}: tensors must be on one device, got {tensors[0].device} and {t.device}"
            )
    return tensors


@torch.no_grad()
def all_reduce_mean(
    tensors: Iterable[Tensor],
    dtype: torch.dtype = torch.float8_e4m3fn,
    algorithm: str = "two_shot",
    group: dist.ProcessGroup | None = None,
    mu: Tensor | None = None,
) -> list[ScaledTensor]:
    """The mean of each tensor over the ranks of `group`, in FP8 with one scale a tensor.

    Args:
        tensors: plain (float32, float16, bfloat16) or ScaledTensors with one scale, of the same
            shapes in the same order on every rank; all on one device.
        dtype: float8_e4m3fn or float8_e5m2, on the wire and of the result.
        algorithm: "two_shot" or "ring" (FP8-LM, section 2.1; see this module).
        group: default the default group; without one, a world of one.
        mu: float32 [tensors], for "ring" alone; default 1/sqrt(ranks) (equation 3).

    Returns:
        ScaledTensors with identical bytes on every rank. The 1/N is in their scales. The amax is of
        the mean before it was encoded, and NaN where some rank's values were not finite.

    Raises:
        ValueError: a type, device or algorithm that it does not take.
        RankFailure: a rank that is gone.
    """
    tensors = _checked("all_reduce_mean", tensors, dtype)
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"all_reduce_mean: algorithm must be one of {ALGORITHMS}, got {algorithm!r}"
        )
    if mu is not None and algorithm != "ring":
        raise ValueError(f"all_reduce_mean: mu goes with ring, got algorithm {algorithm!r}")
    if not tensors:
        return []
    transport = Transport(group)
    if algorithm == "two_shot":
        return run(two_shot(tensors, dtype, transport)).tensors
    if mu is None:
        device = tensors[0].device
        start = 1 / math.sqrt(transport.size)
        mu = torch.full((len(tensors),), start, dtype=torch.float32, device=device)
    return run(ring(tensors, dtype, transport, mu)).tensors


@torch.no_grad()
def reduce_scatter_mean(
    tensors: Iterable[Tensor],
    owners: list[int],
    dtype: torch.dtype = torch.float8_e4m3fn,
    group: dist.ProcessGroup | None = None,
    result: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    """The mean of each tensor on the rank that owns it, None elsewhere; FP8 on the wire.

    `result` float32 keeps the f32 sum of the FP8 messages; `dtype` encodes it, with the bits of
    `all_reduce_mean`. Otherwise as `all_reduce_mean`. A float32 result is NaN where some rank's
    values were not finite.
    """
    tensors = _checked("reduce_scatter_mean", tensors, dtype)
    if result not in (torch.float32, dtype):
        raise ValueError(f"reduce_scatter_mean: result must be float32 or {dtype}, got {result}")
    transport = Transport(group)
    bad = [owner for owner in owners if not 0 <= owner < transport.size]
    if len(owners) != len(tensors) or bad:
        raise ValueError(
            f"reduce_scatter_mean: wanted {len(tensors)} ranks below {transport.size}, got {owners}"
        )
    if not tensors:
        return []
    return run(reduce_to_owners(tensors, dtype, transport, owners, result)).tensors
