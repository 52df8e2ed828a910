"""FP8 across ranks."""

from . import traffic
from .checkpoint import load, save
from .fsdp import fully_shard, sync_scales

__all__ = ["fully_shard", "load", "save", "sync_scales", "traffic"]
