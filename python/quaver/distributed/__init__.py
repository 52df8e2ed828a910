"""FP8 across ranks."""

from . import traffic
from .fsdp import fully_shard, sync_scales

__all__ = ["fully_shard", "sync_scales", "traffic"]
