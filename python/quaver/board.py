"""The lines of a run's metrics as TensorBoard logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UsageError

__all__ = ["Board", "summary_writer"]


def summary_writer() -> Callable:
    """torch's SummaryWriter; UsageError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs `tensorboard`: pip install quaver[train]") from None
    return SummaryWriter


class Board:
    """Logs in `folder` by `writer`, a SummaryWriter, from the step after `start` on; none where
    `writer` is None."""

    def __init__(self, writer: Callable | None, folder: Path, start: int):
        self._logs = None if writer is None else writer(folder, purge_step=start + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error) -> None:
        if self._logs is not None:
            self._logs.close()

    def write(self, line: dict) -> None:
        """A step's line of metrics."""
        if self._logs is None:
            return
        for key in ("val_loss", "loss", "lr", "grad_norm", "tokens_per_s"):
            if line.get(key) is not None:
                self._logs.add_scalar(key, line[key], line["step"])
        for key, value in _probe_scalars(line.get("probe", {})):
            self._logs.add_scalar(key, value, line["step"])


def _probe_scalars(probe: dict) -> Iterator[tuple[str, float]]:
    """("probe/TENSOR/FIGURE", number) for every figure that a probe has."""
    for tensor, figures in probe.items():
        k = figures.get("k", {})
        for key, value in (figures | {f"k_{part}": k[part] for part in k}).items():
            if isinstance(value, float):
                yield f"probe/{tensor}/{key}", value
