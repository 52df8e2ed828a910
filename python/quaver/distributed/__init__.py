"""FP8 across ranks, on stock torch.distributed."""

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
    "load",
    "reduce_scatter_mean",
    "save",
    "zero_partition",
]
