"""The model and the optimizer of one training, on this rank, from its settings."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from . import distributed, models, optimizers
from .convert import convert
from .errors import UsageError
from .hf.start import Start
from .recipe import Recipe
from .schedule import parameter_groups
from .settings import Settings

__all__ = ["build_model", "build_optimizer", "is_fsdp", "shard"]


def is_fsdp(settings: Settings, world: distributed.World) -> bool:
    """Whether FSDP2 shards the model."""
    return settings.parallel.kind == "fsdp" and world.size > 1


def build_model(
    settings: Settings, config: models.Config | Start, recipe: Recipe, world: distributed.World
) -> nn.Module:
    """The model of `config` with the weights of the seed, or of a folder, converted by `recipe` and
    split over ranks. Raises UsageError where it cannot be."""
    torch.manual_seed(settings.seed)
    try:
        # Initialised on the CPU: the same values whatever the device.
        started = isinstance(config, Start)
        model = (config.build() if started else models.build(config)).to(world.device)
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes beyond any memory
        reason = str(error).splitlines()[0]
        raise UsageError(f"--model {settings.model} cannot be built: {reason}") from None
    model = convert(model, recipe=recipe)
    try:
        if world.tensor is not None:
            distributed.parallelize(model, world.tensor, fp8_sum=recipe.fp8_sum)
        if is_fsdp(settings, world):
            shard(model, recipe)
    except ValueError as error:
        raise UsageError(f"--parallel {settings.parallel}: {error}") from None
    return model


def shard(model: nn.Module, recipe: Recipe, mesh: DeviceMesh | None = None) -> None:
    """FSDP2 of a model under a recipe, in place, over `mesh` or all ranks. Raises ValueError where
    it is refused."""
    if recipe.linear is not None:
        distributed.fully_shard(model, mesh)
        return
    # Without FP8, FSDP2 sends weights and gradients in the autocast dtype.
    from torch.distributed.fsdp import MixedPrecisionPolicy  # a second to import

    low = recipe.autocast == torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=recipe.autocast, reduce_dtype=torch.float32)
    gradient = "bf16" if low else "f32"
    distributed.fully_shard(model, mesh, gradient=gradient, mp_policy=policy)


def build_optimizer(
    settings: Settings,
    config: models.Config | Start,
    recipe: Recipe,
    world: distributed.World,
    model: nn.Module,
    name: str | None,
) -> torch.optim.Optimizer:
    """The optimizer of --optimizer `name` for a model of `build_model`; None is AdamW with the
    states of `recipe`. Raises UsageError, naming it, where it does not take the model."""
    setting = optimizers.Setting(
        model=model,
        recipe=recipe,
        groups=parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        dim=config.dim,
        zero=settings.parallel.kind == "zero",
        sharded=is_fsdp(settings, world),
        world=world,
    )
    if name is None:
        return optimizers.adamw(setting, recipe)
    try:
        return optimizers.build(name, setting)
    except ValueError as error:
        ranks = "" if world.size == 1 else f", --parallel {settings.parallel}"
        raise UsageError(
            f"--optimizer {name} with --recipe {recipe.name}{ranks}: {error}"
        ) from None
