"""FSDP2's reduce-scatter of gradients in FP8: each rank encodes its part for each other rank,
all-to-all, and the receiver decodes and sums in f32, in rank order.

One rounding, no scale to agree on, the same bits whatever the timing. Scales are powers of two, one
for 128 values, and are sent as their exponents: 1 + 1/128 bytes a value, against 2 in bf16.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...comm.transport import Transport
from ...nn.linear import LinearBase
from ...placement import transport

FORMATS = ("e4m3", "bf16", "f32")
BLOCK = 128
MANTISSA = 23  # of f32


def encode_e4m3(x: Tensor) -> Tensor:
    """f32 [n, c] as uint8 [n, c + ceil(c / 128)]: codes, then exponents of their scales. A block
    with a value that is not finite has exponent 255: it decodes to NaN."""
    q, scale, amax = torch.ops.quaver.quantize(
        x, torch.float8_e4m3fn, None, None, "block", BLOCK, True, False, 0
    )
    exponent = (scale.view(torch.int32) >> MANTISSA).masked_fill_(~amax.isfinite(), 255)
    return torch.cat([q.view(torch.uint8), exponent.to(torch.uint8)], 1)


def decode_e4m3(message: Tensor, columns: int) -> Tensor:
    """The f32 values of a message of `encode_e4m3`."""
    q, exponent = message.split([columns, message.shape[1] - columns], 1)
    scale = (exponent.to(torch.int32) << MANTISSA).view(torch.float32)
    scale = torch.where(scale.isinf(), torch.nan, scale)
    return torch.ops.quaver.dequantize(
        q.contiguous().view(torch.float8_e4m3fn), scale, torch.float32, "block", BLOCK
    )


class ReduceScatter:
    """The argument of FSDPModule.set_custom_reduce_scatter of `unit`: converted weights' gradients
    are sent as `gradient`, the others as bf16, or f32 where that is f32."""

    def __init__(self, unit: nn.Module, gradient: str):
        self.gradient = gradient
        # The order is FSDP2's of gradients in a message. Whether one is frozen is read later.
        converted = {id(m.weight) for m in unit.modules() if isinstance(m, LinearBase)}
        self.parameters = [(p, id(p) in converted) for p in _own_parameters(unit)]

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        if op != dist.ReduceOp.SUM or async_op:
            raise ValueError(f"reduce-scatter of gradients: wanted a synchronous SUM, got {op}")
        link, n = transport(group), group.size()
        rows = input_tensor.view(n, -1).float()
        low = self._low_precision(rows.shape[1], n)
        rest = _complement(low, rows.shape[1])
        total = output_tensor if output_tensor.dtype == torch.float32 else torch.empty_like(
            output_tensor, dtype=torch.float32)  # fmt: skip
        total.zero_()
        wide = torch.float32 if self.gradient == "f32" else torch.bfloat16
        if low:
            columns = _gather(rows, low)
            fp8 = self.gradient == "e4m3"
            message = encode_e4m3(columns) if fp8 else columns.to(wide)
            for part in _exchange(message, link):
                part = decode_e4m3(part[None], columns.shape[1])[0] if fp8 else part.float()
                _add(total, low, part)
        if rest:
            for part in _exchange(_gather(rows, rest).to(wide), link):
                _add(total, rest, part.float())
        if total is not output_tensor:
            output_tensor.copy_(total)

    def _low_precision(self, columns: int, n: int) -> list[tuple[int, int]]:
        """The spans of a rank's columns that belong to converted weights."""
        spans, at = [], 0
        for p, converted in self.parameters:
            if not p.requires_grad:
                continue
            width = -(-p.shape[0] // n) * (p.numel() // max(p.shape[0], 1))
            if converted:
                spans.append((at, at + width))
            at += width
        # FSDP2 leaves parameters without a gradient out of the columns, and does not report which.
        return spans if at == columns else []


def _own_parameters(unit: nn.Module) -> list[nn.Parameter]:
    """The parameters that FSDP2 manages in `unit`, in its order: children first, units inside
    left out."""
    found: dict[nn.Parameter, None] = {}

    def visit(module):
        for child in module.children():
            if not isinstance(child, FSDPModule):
                visit(child)
        found.update(dict.fromkeys(module.parameters(recurse=False)))

    visit(unit)
    return list(found)


def _complement(spans: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for span in spans for edge in span), end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _gather(rows: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    return torch.cat([rows[:, a:b] for a, b in spans], 1)


def _add(total: Tensor, spans: list[tuple[int, int]], part: Tensor) -> None:
    for (a, b), values in zip(spans, part.split([b - a for a, b in spans]), strict=True):
        total[a:b] += values


def _exchange(message: Tensor, link: Transport) -> Tensor:
    """Row i goes to rank i; row i of the result came from it."""
    return link.all_to_all(message.flatten(), [message.shape[1]] * link.size, "gradient").wait()
