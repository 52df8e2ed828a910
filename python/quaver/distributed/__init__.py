"""FP8 across ranks, on stock torch.distributed."""

import importlib

from .all_reduce import all_reduce_mean, reduce_scatter_mean
from .health import RankFailure
from .transport import Transport

__all__ = [
    "RankFailure",
    "Transport",
    "all_reduce_mean",
    "fully_shard",
    "load",
    "reduce_scatter_mean",
    "save",
    "sync_scales",
]

# FSDP2, DTensors and their checkpoints take a second to import: only for those who use them.
_LATE = {"fully_shard": "fsdp", "sync_scales": "fsdp", "save": "checkpoint", "load": "checkpoint"}


def __getattr__(name):
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
