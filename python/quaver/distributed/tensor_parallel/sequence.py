"""Sequence shards: gather them, or sum partial results into them, over a tensor-parallel group.

The sequence is the last axis but one; rank r holds the r-th of equal runs of it. Sums are taken in
f32 in rank order, so that every backend gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...comm.transport import Transport
from ...layout import FLAT_BLOCK
from ...nn.cast import matrix, nan_unless_finite, pad, transpose_codes

_ops = torch.ops.quaver


def gather(x: Tensor, transport: Transport) -> Tensor:
    """The sequence [..., S, C] of shards x [..., S / ranks, C]."""
    return start_gather(x, transport)()


def start_gather(x: Tensor, transport: Transport) -> Callable[[], Tensor]:
    """`gather`, under way: the call of what this returns waits for it."""
    pending = transport.all_gather(x, "activation")
    return lambda: _moved(pending.wait(), 0, -3).flatten(-3, -2).view(x.dtype)


def start_gather_codes(
    codes: Tensor, scale: Tensor | None, transport: Transport
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """`start_gather` of codes, and of their scales where those are not the tensor's."""
    pending = start_gather(codes, transport)
    if scale is None or scale.dim() == 0:
        return lambda: (pending(), scale)
    scales = start_gather(scale, transport)
    return lambda: (pending(), scales())


def own(x: Tensor, transport: Transport) -> Tensor:
    """This rank's shard of the sequence x."""
    return _runs(x, transport)[transport.rank].contiguous().view(x.dtype)


def sum_scatter(
    x: Tensor, transport: Transport, wire_dtype: torch.dtype | None, out: torch.dtype
) -> Tensor:
    """This rank's shard [..., S / ranks, C] of the sum over ranks of x [..., S, C], in dtype `out`.

    An exchange and a sum in f32 in rank order. `wire_dtype`: an FP8 format that x is sent in, with
    one scale on all ranks (FP8-LM, arXiv 2310.18313, section 2.3), or None for x's own dtype.
    """
    scale = None
    if wire_dtype is not None:
        x, scale = shared_cast(x, wire_dtype, None, transport)
        scale = scale.reshape(1)
    runs = _runs(x, transport).contiguous()
    shape, n = runs.shape[1:], runs[0].numel()
    runs = runs.view(transport.size, n)
    padded = F.pad(runs, (0, ops.bucket_length(n) - n)).view(x.dtype)
    lengths = [padded.shape[1]] * transport.size
    received = transport.all_to_all(padded.flatten(), lengths, "activation").wait()
    result = out if out == x.dtype else torch.float32
    total, _, _ = ops.reduce_shards(received, [n], 0, scale, None, result)
    return total[:n].view(shape).to(out)


def shared_amax(x: Tensor, transport: Transport) -> Tensor:
    """The largest magnitude on any rank, f32 0-D; infinite where any rank holds a NaN."""
    amax = largest(x).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return transport.max(amax, "scale").wait()


def largest(x: Tensor) -> Tensor:
    """The largest magnitude here, f32 0-D; 0 of an empty tensor."""
    if not x.numel():
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return torch.linalg.vector_norm(x, float("inf")).float()


def shared_cast(
    x: Tensor,
    dtype: torch.dtype,
    history: Tensor | None,
    transport: Transport,
    grain: str = "tensor",
) -> tuple[Tensor, Tensor]:
    """FP8 codes of x, and the decode scale, from the amax of all ranks: what one process would
    choose for the whole tensor. The scale is NaN where a value on any rank is not finite.

    Scales of rows or blocks are this rank's own. They are powers of two whatever the recipe: a
    product that sums over the sequence needs the codes under scales along the other axis, and
    between powers of two a code only moves its exponent (DeepSeek-V3, arXiv 2412.19437, 3.5.1)."""
    if grain != "tensor":
        codes, scale, amax = _ops.quantize(x, dtype, None, None, grain, FLAT_BLOCK, True, False, 0)
        return codes, nan_unless_finite(scale, amax)
    amax = shared_amax(x, transport)
    # The op that chooses scales and keeps histories, given the largest value alone.
    _, scale, _ = _quantize(amax.reshape(1), dtype, None, history)
    codes, _, _ = _quantize(x, dtype, scale, None)
    return codes, nan_unless_finite(scale, amax)


def operand(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The operand [M, C] of a product, padded, of the codes [..., S, C] of a sequence."""
    q = pad(matrix(codes))
    if scale.dim() == 0:
        return q, scale
    scale = matrix(scale)
    return q, F.pad(scale, (0, 0, 0, len(q) - len(scale)), value=1.0)


def transposed(codes: Tensor, scale: Tensor, grain: str) -> tuple[Tensor, Tensor]:
    """The operand [C, M] of the product that sums over the sequence, and its scale or scales."""
    if grain == "tensor":
        return transpose_codes(pad(matrix(codes))), scale
    values = _ops.dequantize(codes, scale, torch.float32, grain, FLAT_BLOCK)
    return _ops.cast_layouts(matrix(values), codes.dtype, grain, False, True, True)[2:]


def _quantize(x, dtype, scale, history):
    return _ops.quantize(x, dtype, scale, history)


def _moved(x: Tensor, source: int, target: int) -> Tensor:
    """movedim, of FP8 as bytes: torch does not copy and join FP8 everywhere."""
    return (x.view(torch.uint8) if x.element_size() == 1 else x).movedim(source, target)


def _runs(x: Tensor, transport: Transport) -> Tensor:
    """[ranks, ..., S / ranks, C], a view; of FP8, of its bytes."""
    ranks = transport.size
    if x.dim() < 2 or x.shape[-2] % ranks:
        raise ValueError(
            f"tensor parallel: the sequence (the last axis but one of {list(x.shape)}) must be "
            f"divisible by the {ranks} ranks"
        )
    return _moved(x.unflatten(-2, (ranks, x.shape[-2] // ranks)), -3, 0)
