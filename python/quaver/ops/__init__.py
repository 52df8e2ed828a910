"""Typed wrappers over torch.ops.quaver, each beside its fake kernel for torch.compile.

Scales are decode multipliers, float32, on the tensor's device: x ~= scale * q.
"""

import torch

from .activation import (
    Activated,
    Grouped,
    Normalized,
    activate,
    activate_backward,
    normalize,
    normalize_backward,
)
from .adam4 import adam_4bit_
from .all_reduce import bucket_length, pack, reduce_shards, share_scales
from .fused_layouts import activate_backward_layouts, activate_layouts, normalize_layouts
from .gemm import gemm, sm_margin
from .gradient import amaxes, grad_norm, none_like, parts
from .microadam import micro_adam_
from .nf4 import nf4_decode, nf4_encode
from .optimizer import adam_, encode_state, subset_sums
from .quantize import cast_layouts, cast_transpose, dequantize, quantize
from .rotate import rotate

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

__all__ = [
    "FLOATS",
    "Activated",
    "Grouped",
    "Normalized",
    "activate",
    "activate_backward",
    "activate_backward_layouts",
    "activate_layouts",
    "adam_",
    "adam_4bit_",
    "amaxes",
    "bucket_length",
    "cast_layouts",
    "cast_transpose",
    "dequantize",
    "encode_state",
    "gemm",
    "grad_norm",
    "micro_adam_",
    "nf4_decode",
    "nf4_encode",
    "none_like",
    "normalize",
    "normalize_backward",
    "normalize_layouts",
    "pack",
    "parts",
    "quantize",
    "reduce_shards",
    "rotate",
    "share_scales",
    "sm_margin",
    "subset_sums",
]
