"""FP8 across ranks, on stock torch.distributed."""

from .all_reduce import all_reduce_mean, reduce_scatter_mean
from .auto_scale import AutoScale, AutoScaleRule
from .ddp import DataParallel, ddp
from .health import RankFailure
from .transport import Transport

__all__ = [
    "AutoScale",
    "AutoScaleRule",
    "DataParallel",
    "RankFailure",
    "Transport",
    "all_reduce_mean",
    "ddp",
    "reduce_scatter_mean",
]
