"""torchtitan (0.3): a converter of its model configs, and its container of optimizers over AdamW.

Imported by those who use it alone: `quaver[torchtitan]`.

    spec = model_registry("8B", converters=[QuaverConverter.Config(recipe="tensorwise")])
    Trainer.Config(model_spec=spec, optimizer=adamw(lr=3e-4), ...)
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import recipe as recipes
from .convert import HEAD, convert, convert_report
from .nn.linear import LINEARS
from .optim import AdamW

try:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
    from torchtitan.models.common.linear import Linear
    from torchtitan.protocols.model import ModelConfigConverter
    from torchtitan.tools.logging import logger
except ImportError as error:
    raise ImportError(
        f"quaver.torchtitan needs torchtitan 0.3: pip install quaver[torchtitan] ({error})"
    ) from error

__all__ = ["QuaverConverter", "QuaverOptimizers", "adamw"]

LINEARS.add(Linear)
OURS = "quaver.AdamW"  # an optimizer_name of ParamGroupConfig


class QuaverConverter(ModelConfigConverter):
    """Converts a model by a recipe where torchtitan builds it, on the meta device.

    Config:
        recipe: the name of one whose weights stay plain, "tensorwise" or "coat". "coat" makes
            linear weights bfloat16 and FSDP2 takes one dtype: set `training.dtype="bfloat16"`.
        skip: names to leave alone, as `quaver.convert` takes them. By default heads, routers of
            experts and layers with less than 16 outputs.

    Raises:
        ValueError: an unknown recipe; one with f16 masters, which torchtitan would fill after
            sharding, each shard by its own scale; tensor parallelism, when the config of the run
            is read; parameters of two dtypes, or whatever convert refuses, when a model is built.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        recipe: str = "tensorwise"
        skip: list[str] = field(default_factory=lambda: list(HEAD))

    def __init__(self, config: Config):
        self.config = config
        linear = recipes.get(config.recipe).linear
        if linear is not None and linear.master == "f16-tensor":
            raise ValueError(
                f"QuaverConverter: recipe {config.recipe} keeps f16 masters, which torchtitan "
                'would initialise after it has sharded them; use "tensorwise" or "coat", or a loop '
                "of your own with quaver.distributed.fully_shard"
            )

    def convert(self, model_config):
        """The config of the converted model: of a subclass of `model_config`'s class, with the
        same fields, so that later converters and torchtitan find what they look for."""
        kept = {f.name: getattr(model_config, f.name) for f in dataclasses.fields(model_config)}
        return _converting(type(model_config))(**kept, quaver=self.config)


@functools.cache
def _converting(kind: type) -> type:
    """The subclass of a config's class whose `build` converts."""

    @dataclass(kw_only=True, slots=True)
    class Converting(kind):
        quaver: QuaverConverter.Config

        # A class with slots is made anew by `dataclass`, which super() would miss.
        def build(self, **kwargs) -> nn.Module:
            return _convert(kind.build(self, **kwargs), self.quaver)

        def update_from_config(self, *, config, **kwargs) -> None:
            if config.parallelism.tensor_parallel_degree > 1:
                raise ValueError(
                    "QuaverConverter: torchtitan's tensor parallelism cuts layers by the names of "
                    "nn.Linear's arguments, and not those of FP8 layers; set "
                    "parallelism.tensor_parallel_degree=1"
                )
            kind.update_from_config(self, config=config, **kwargs)

    Converting.__name__ = Converting.__qualname__ = f"Quaver{kind.__qualname__}"
    return Converting


def _convert(model: nn.Module, config: QuaverConverter.Config) -> nn.Module:
    convert(model, config.recipe, tuple(config.skip))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"QuaverConverter: recipe {config.recipe} leaves parameters of {found}, and FSDP2 "
            'takes one dtype; set training.dtype="bfloat16"'
        )
    logger.info("quaver: %s", convert_report(model))
    return model


class QuaverOptimizers(OptimizersContainer):
    """torchtitan's container, in which the groups named "quaver.AdamW" are stepped by
    `quaver.AdamW`; the others as ever. `adamw` makes a Config of it.

    FP8 states are in torchtitan's checkpoints as codes and scales. A run that is resumed by its
    CheckpointManager has the bits of one that was not stopped.

    Config:
        recipe: the name of a recipe, for AdamW.
        exp_avg, exp_avg_sq: where given, the states of all parameters, in place of the recipe's:
            "f32", or with one scale a tensor "e4m3-tensor" or "f16-tensor". (FSDP2's shards would
            cut the groups of the others.)
        bf16_master: where given, the rounding of bf16 parameters, in place of the recipe's.

    Raises:
        ValueError: an unknown recipe or state, whatever AdamW refuses, or
            `implementation="fused_opt_states_bf16"`, which is for torch's Adam.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        recipe: str = "tensorwise"
        exp_avg: str = ""
        exp_avg_sq: str = ""
        bf16_master: str = ""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                'QuaverOptimizers: implementation="fused_opt_states_bf16" is for torch\'s Adam; '
                'use "fused" with exp_avg="e4m3-tensor" and exp_avg_sq="f16-tensor"'
            )
        self._recipe = _recipe(config)
        super().__init__(config, model_parts=model_parts)

    def _resolve_optimizer_factory(self, name: str):
        if name == OURS:
            return functools.partial(AdamW, recipe=self._recipe)
        return OptimizersContainer._resolve_optimizer_factory(name)


def _recipe(config: QuaverOptimizers.Config) -> recipes.Recipe:
    chosen = recipes.get(config.recipe)
    fields = ("exp_avg", "exp_avg_sq", "bf16_master")
    given = {name: getattr(config, name) for name in fields if getattr(config, name)}
    if given.keys() & {"exp_avg", "exp_avg_sq"}:
        given["plain_moments"] = True
    return dataclasses.replace(chosen, **given)


def adamw(
    lr: float = 8e-4,
    *,
    recipe: str = "tensorwise",
    exp_avg: str = "",
    exp_avg_sq: str = "",
    bf16_master: str = "",
    **options: Any,
) -> QuaverOptimizers.Config:
    """The counterpart of torchtitan's `default_adamw`: one group of all parameters.

    Args:
        lr: the step size.
        recipe, exp_avg, exp_avg_sq, bf16_master: as QuaverOptimizers.Config has them.
        options: for `quaver.AdamW`: betas (0.9, 0.95), eps 1e-8, weight_decay 0.1 by default.
    """
    group = ParamGroupConfig(
        pattern=".*", optimizer_name=OURS, optimizer_kwargs={"lr": lr} | options
    )
    return QuaverOptimizers.Config(
        param_groups=[group],
        recipe=recipe,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        bf16_master=bf16_master,
    )
