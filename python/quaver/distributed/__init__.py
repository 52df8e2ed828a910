"""FP8 across ranks, on stock torch.distributed."""

import importlib

from .all_reduce import all_reduce_mean, reduce_scatter_mean
from .auto_scale import AutoScale, AutoScaleRule
from .checkpoint import load, save
from .ddp import DataParallel, ddp
from .health import RankFailure
from .transport import Transport
from .zero import ZeroAdamW, zero_partition

__all__ = [
    "AutoScale",
    "AutoScaleRule",
    "DataParallel",
    "RankFailure",
    "Transport",
    "ZeroAdamW",
    "all_reduce_mean",
    "ddp",
    "fully_shard",
    "load",
    "reduce_scatter_mean",
    "save",
    "sync_scales",
    "zero_partition",
]

_FSDP = ("fully_shard", "sync_scales")


def __getattr__(name):
    # FSDP2 and DTensors take a second to import: only for those who use them.
    if name not in _FSDP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.fsdp"), name)
