"""NF4 (QLoRA, arXiv 2305.14314, appendix E) and its double quantisation, bit for bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import encode

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_encode(x: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Packed codes and the largest magnitude of each block; see ops.nf4_encode."""
    flat = x.detach().float().flatten()
    groups = F.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    absmax = groups.abs().amax(1)
    y = (groups * (1 / absmax.clamp(min=1e-38))[:, None]).flatten()[: len(flat)]
    levels = torch.tensor(NF4_LEVELS)
    code = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)
    code = torch.where(y.isnan(), 0, code).to(torch.uint8)
    code = F.pad(code, (0, len(code) % 2), value=7)
    return code[0::2] << 4 | code[1::2], absmax


def nf4_decode(codes: Tensor, absmax: Tensor, numel: int, dtype: torch.dtype, block: int = 64):
    """The values of `nf4_encode`'s codes, flat."""
    code = torch.stack([codes >> 4, codes & 15], 1).flatten()[:numel].long()
    y = torch.tensor(NF4_LEVELS)[code] * absmax.repeat_interleave(block)[:numel]
    return encode(y, dtype) if dtype == torch.float16 else y.to(dtype)


def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type (arXiv 2110.02861), ascending: in each of
    seven decades the middles of 2^i equal steps, their negatives, 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))
