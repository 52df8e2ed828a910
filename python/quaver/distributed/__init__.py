"""FP8 across ranks, on stock torch.distributed."""

import importlib

from . import tensor_parallel
from .all_reduce import all_reduce_mean, reduce_scatter_mean
from .auto_scale import AutoScale, AutoScaleRule
from .checkpoint import load, save
from .ddp import DataParallel, ddp
from .health import RankFailure
from .launch import World, init
from .tensor_parallel import parallelize
from .tensor_state import gather_state, scatter_state
from .transport import KINDS, Transport, compare
from .zero import ZeroAdamW, zero_partition

__all__ = [
    "KINDS",
    "AutoScale",
    "AutoScaleRule",
    "DataParallel",
    "RankFailure",
    "Transport",
    "World",
    "ZeroAdamW",
    "all_reduce_mean",
    "compare",
    "ddp",
    "fully_shard",
    "gather_state",
    "init",
    "load",
    "parallelize",
    "reduce_scatter_mean",
    "save",
    "scatter_state",
    "sync_scales",
    "tensor_parallel",
    "transport_of",
    "zero_partition",
]

_FSDP = ("fully_shard", "sync_scales", "transport_of")


def __getattr__(name):
    # FSDP2 and DTensors take a second to import: only for those who use them.
    if name not in _FSDP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.fsdp"), name)
