"""FP8 across ranks, on stock torch.distributed."""

from .all_reduce import all_reduce_mean, reduce_scatter_mean
from .auto_scale import AutoScale, AutoScaleRule
from .checkpoint import load, save
from .ddp import DataParallel, ddp
from .health import RankFailure
from .launch import World, init
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
    "init",
    "load",
    "reduce_scatter_mean",
    "save",
    "zero_partition",
]
