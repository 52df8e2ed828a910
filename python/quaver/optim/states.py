"""The table of state codecs: how an optimizer stores one state of one weight.

Each row makes the zero state for a parameter; the arithmetic is include/quaver/codec.h's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensor import ScaledTensor


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda p: torch.zeros(p.shape, dtype=dtype, device=p.device)


def _tensor_scaled(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def zeros(p: Tensor) -> ScaledTensor:
        scale = torch.ones((), device=p.device)
        codes = torch.zeros(p.shape, dtype=dtype, device=p.device)
        return ScaledTensor(codes, scale, torch.zeros_like(scale), torch.float32)

    return zeros


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "f32": _plain(torch.float32),
    "e4m3-tensor": _tensor_scaled(torch.float8_e4m3fn),
    "f16-tensor": _tensor_scaled(torch.float16),
}
