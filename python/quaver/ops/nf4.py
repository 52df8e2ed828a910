"""NF4 codes (QLoRA, arXiv 2305.14314) of frozen weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake import fake

_ops = torch.ops.quaver


def nf4_encode(x: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """The NF4 codes of x and the largest magnitude of each `block` flat elements.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        block: flat elements that share a magnitude: a power of two from 64 to 4096.

    Returns:
        codes: uint8 [(elements + 1) / 2], two a byte, the even element's in the high bits.
        absmax: float32 [blocks], NaN of a block with a NaN.

    Raises:
        RuntimeError or ValueError: another dtype or block, named with what came.
    """
    return _ops.nf4_encode(x, block)


def nf4_decode(
    codes: Tensor, absmax: Tensor, numel: int, dtype: torch.dtype, block: int = 64
) -> Tensor:
    """`numel` values of codes as `nf4_encode` gives them, flat.

    Args:
        codes: uint8 [(numel + 1) / 2].
        absmax: float32 [blocks].
        numel: elements that the codes are of.
        dtype: float32, float16 (saturating) or bfloat16, to nearest even.

    Raises:
        RuntimeError or ValueError: other sizes, dtypes or devices, named with what came.
    """
    return _ops.nf4_decode(codes, absmax, numel, dtype, block)


@fake("nf4_encode")
def _(x, block=64):
    n = x.numel()
    codes = x.new_empty([(n + 1) // 2], dtype=torch.uint8)
    return codes, x.new_empty([(n + block - 1) // block], dtype=torch.float32)


@fake("nf4_decode")
def _(codes, absmax, numel, dtype, block=64):
    return codes.new_empty([numel], dtype=dtype)
