"""FP8 across ranks, on stock torch.distributed."""

from .all_reduce import all_reduce_mean, reduce_scatter_mean
from .health import RankFailure
from .transport import Transport

__all__ = ["RankFailure", "Transport", "all_reduce_mean", "reduce_scatter_mean"]
