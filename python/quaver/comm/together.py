"""An error on one rank is one on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import UsageError
from .heartbeat import RankFailure
from .transport import Transport

__all__ = ["together"]


@contextmanager
def together(
    transport: Transport,
    device: torch.device | str = "cpu",
    kind: type[Exception] = UsageError,
) -> Iterator[None]:
    """A block that all ranks enter, and that either none of them or all of them leave by an error:
    those in which it failed by their own, the others by a `kind` that names the first such rank
    and its reason. No rank then waits for one that gave up."""
    failure = None
    try:
        yield
    except RankFailure:  # no message would arrive
        raise
    except Exception as error:
        failure = error
    reason = None if failure is None else str(failure) or type(failure).__name__
    reasons = transport.all_gather_object(reason, device)
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise kind(f"rank {rank}: {reason}")
