"""FP8 across ranks, on stock torch.distributed."""

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
    "gather_state",
    "init",
    "load",
    "parallelize",
    "reduce_scatter_mean",
    "save",
    "scatter_state",
    "tensor_parallel",
    "zero_partition",
]
