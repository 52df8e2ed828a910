"""Optimizer states, and the step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import FLAT_BLOCK, Layout
from ..tensor import ScaledTensor
from .fake import fake

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


@fake("adam_")
def _(*args, **kwargs):
    return None
