"""FP8 across ranks, on stock torch.distributed."""

import importlib

from ..comm.heartbeat import RankFailure
from ..comm.transport import KINDS, Transport, compare
from . import tensor_parallel
from .checkpoint import load, save
from .data_parallel.all_reduce import all_reduce_mean, reduce_scatter_mean
from .data_parallel.auto_scale import AutoScale, AutoScaleRule
from .data_parallel.ddp import DataParallel, ddp
from .data_parallel.zero import ZeroAdamW, zero_partition
from .launch import World, init
from .tensor_parallel import gather_state, parallelize, scatter_state

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
    return getattr(importlib.import_module(f"{__name__}.fsdp.fsdp"), name)
