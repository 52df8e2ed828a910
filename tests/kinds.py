"""ScaledTensors of every kind."""

import torch
from helpers import FP8, randn
from torch import nn

import quaver as qv

E4M3, F16 = FP8[0], torch.float16
KINDS = {
    "e4m3": lambda: qv.quantize(randn(6, 8)),
    "f16": lambda: qv.quantize(randn(6, 8), F16),
    "weight": lambda: nn.Parameter(qv.quantize(randn(6, 8), F16)),
    "blocks": lambda: qv.quantize(randn(6, 8), granularity="block", block=4),
    "state": lambda: qv.optim.encode_state(randn(6, 8), "e4m3-expand").tensor,
}
