"""A step to plan: the parts of a training put together as `quaver train` does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .. import distributed, optimizers
from .. import recipe as recipes
from ..convert import convert
from ..errors import UsageError
from ..parallel import Parallel
from ..schedule import parameter_groups
from ..settings import BETAS, RATE
from .ledger import Peak
from .simulated import HostValues, mesh_of, routed, single_sequences, spread
from .sources import Source
from .step import Training, materialise, measure, recompute_blocks

__all__ = ["Job", "quiet"]


@dataclass(frozen=True)
class Job:
    """A step to plan, of one rank."""

    found: Source
    recipe: recipes.Recipe
    optimizer: str | None
    parallel: Parallel
    world: distributed.World
    release: bool
    recompute: bool

    def run(self, batch: int, length: int) -> tuple[dict, Peak, int]:
        """The report and the peak of a step, and the number of parameters of the whole model."""
        with self.simulated() as (training, count):
            report, peak = measure(training, batch, length)
        return report, peak, count

    @contextmanager
    def simulated(self) -> Iterator[tuple[Training, int]]:
        """The training on fake tensors, in their mode, and the number of parameters of the whole
        model. Raises UsageError where a part refuses another."""
        from torch._subclasses.fake_tensor import FakeTensorMode  # half a second to import

        model = self.found.build()
        try:
            convert(model, self.recipe)
        except (TypeError, ValueError) as error:
            raise UsageError(f"plan: {self.found.name}: {error}") from None
        count = sum(p.numel() for p in model.parameters())
        mesh = mesh_of(self.world)  # made of real numbers
        with FakeTensorMode(), HostValues(), quiet(), single_sequences(), routed():
            materialise(model)
            yield self.training(model, mesh), count

    def training(self, model: nn.Module, mesh: DeviceMesh | None = None) -> Training:
        """The training of a converted model. Raises UsageError where a part refuses another."""
        spread(model, self.recipe, self.parallel, self.world, mesh)
        if self.recompute:
            recompute_blocks(model)
        optimizer = self._build_optimizer(model)
        links = () if self.world.tensor is None else (self.world.tensor,)
        if self._is_fsdp:
            links += (distributed.transport_of(model),)
        elif self.world.size > 1:
            reducer = distributed.ddp(model, optimizer=optimizer, group=self.world.data_group)
            links += (reducer.transport,)
        # Casts are needed where a parameter has another dtype.
        low = self.recipe.autocast
        low = low if any(p.dtype != low for p in model.parameters()) else None
        return Training(model, optimizer, self.found.name, low, self.release, links)

    @property
    def _is_fsdp(self) -> bool:
        return self.parallel.kind == "fsdp" and self.world.size > 1

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of `quaver train --optimizer`."""
        name, chosen = self.optimizer, self.recipe
        setting = optimizers.Setting(
            model=model,
            recipe=chosen,
            groups=[g for g in parameter_groups(model) if g["params"]],
            lr=RATE,
            betas=BETAS,
            dim=self.found.width,
            zero=self.parallel.kind == "zero",
            sharded=self._is_fsdp,
            world=self.world,
        )
        try:
            if name is None:
                return optimizers.adamw(setting, chosen)
            return optimizers.build(name, setting)
        except ValueError as error:
            what = f"optimizer {name or 'adamw'} with recipe {chosen.name}"
            ranks = f", parallel {self.parallel}" if self.world.size > 1 else ""
            raise UsageError(f"plan: {what}{ranks}: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from logging the traceback of an op that is refused, which is raised too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
