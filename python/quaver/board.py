"""The lines of a run's metrics as logs of TensorBoard and of Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .errors import UsageError
from .settings import RunSettings

__all__ = ["Board", "writers"]

FIGURES = ("val_loss", "loss", "lr", "grad_norm", "tokens_per_s")


def writers(settings: RunSettings) -> tuple[Callable, ...]:
    """The kinds of logs that the flags want: each makes one from a training's name, its folder for
    logs, its configuration and the step after which it starts; a log has `add_scalar` and `close`.
    UsageError where a package is missing."""
    found = []
    if settings.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "--tensorboard needs `tensorboard`: pip install quaver[train]"
            ) from None
        found.append(
            lambda name, folder, config, start: SummaryWriter(folder, purge_step=start + 1)
        )
    if settings.wandb is not None:
        try:
            import wandb
        except ImportError:
            raise UsageError("--wandb needs the package `wandb`: pip install wandb") from None
        found.append(partial(_Wandb, wandb, settings))
    return tuple(found)


class _Wandb:
    """A run of Weights & Biases. A training that is resumed is a further run of its group."""

    def __init__(self, wandb, settings: RunSettings, name: str, folder: Path, config, start: int):
        group = folder.parents[1].name
        try:
            self.run = wandb.init(
                project=settings.wandb, group=group, name=f"{group}/{name}", config=config
            )
        except Exception as error:  # of many types; without a login, say
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(f"--wandb {settings.wandb}: {lines[0]}") from None

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.run.log({key: value}, step=step)

    def close(self) -> None:
        self.run.finish()


class Board:
    """The logs of a training, of all `writers`; the other arguments are theirs."""

    def __init__(self, writers: tuple[Callable, ...], *of: object):
        self._logs = [writer(*of) for writer in writers]

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error) -> None:
        for log in self._logs:
            log.close()

    def write(self, line: dict) -> None:
        """A step's line of metrics."""
        figures = [(key, line.get(key)) for key in FIGURES]
        for key, value in (*figures, *_probe_scalars(line.get("probe", {}))):
            for log in self._logs:
                if value is not None:
                    log.add_scalar(key, value, line["step"])


def _probe_scalars(probe: dict) -> Iterator[tuple[str, float]]:
    """("probe/TENSOR/FIGURE", number) for every figure that a probe has."""
    for tensor, figures in probe.items():
        k = figures.get("k", {})
        for key, value in (figures | {f"k_{part}": k[part] for part in k}).items():
            if isinstance(value, float):
                yield f"probe/{tensor}/{key}", value
