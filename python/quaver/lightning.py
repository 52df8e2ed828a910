"""Lightning: a precision plugin whose Trainer converts the model, and resumes it bit for bit.

Imported by those who use it alone: `quaver[lightning]`. It is for the package `lightning`, whose
classes are others than those of `pytorch_lightning`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import recipe as recipes
from .convert import HEAD, convert
from .grad import clip_grad_norm_
from .nn.linear import LinearBase
from .nn.norm import Norm
from .nn.state_dict import SUFFIX, master_scale
from .tensor import ScaledTensor

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.strategies import ModelParallelStrategy
except ImportError as error:
    raise ImportError("quaver.lightning needs Lightning: pip install quaver[lightning]") from error

__all__ = ["QuaverPrecision"]

HISTORIES = ("input_history", "grad_history", "output_history", "channel_amax")
KEY = "QuaverPrecision"  # of its entry in a checkpoint, which Lightning takes from the class

# Modules whose state_dict() leaves out what convert adds.
_plain_keys: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class QuaverPrecision(Precision):
    """Trains a LightningModule in FP8: `Trainer(plugins=[QuaverPrecision("coat")])`.

    The model is converted (`quaver.convert`) where Lightning prepares it, before
    `configure_optimizers`, which returns `quaver.AdamW(self.parameters(), recipe=...)` or any other
    optimizer. What is not FP8 runs in the recipe's autocast dtype. One device, `strategy="ddp"` and
    ModelParallelStrategy (FSDP2) are served. Under the last the model is sharded in
    `configure_model`, and converted there before, by a recipe of plain weights ("tensorwise",
    "coat"); FP8 states have one scale a tensor. Others that shard the model are refused.

    A checkpoint's "state_dict" has the keys and values of the plain model, so that
    `load_from_checkpoint` and a Trainer without the plugin read it. What FP8 needs beside them, the
    amax histories and the scales of f16 masters, is under "QuaverPrecision"; a resumed run has the
    bits of one that was not interrupted.

    Args:
        recipe: a name or a Recipe, as convert takes it.
        skip, frozen: as convert takes them.

    Raises:
        ValueError: an unknown recipe, whatever convert refuses, a strategy that shards the model in
            another way, a checkpoint of another recipe; under ModelParallelStrategy a model that
            is not converted by this recipe, or a recipe of f16 masters or delayed scaling.
        TypeError: a module that is no LightningModule. With Fabric call `quaver.convert` before
            `fabric.setup`.
    """

    precision = "bf16-mixed"

    def __init__(self, recipe: str | recipes.Recipe = "coat", skip: Iterable[str] = HEAD,
                 *, frozen: str | None = None):  # fmt: skip
        super().__init__()
        self.recipe = recipes.get(recipe)
        self.skip, self.frozen = skip if isinstance(skip, str) else tuple(skip), frozen
        self.model: LightningModule | None = None

    def __repr__(self) -> str:
        # Lightning's own refusals, such as FSDPStrategy's, name a plugin by it.
        return (
            f"QuaverPrecision({self.recipe.name!r}), which serves one device, DDPStrategy and "
            "ModelParallelStrategy (FSDP2)"
        )

    def convert_module(self, module: nn.Module) -> nn.Module:
        if not isinstance(module, LightningModule):
            raise TypeError(
                f"QuaverPrecision: wanted a LightningModule, got a {type(module).__name__}; with "
                "Fabric call quaver.convert before fabric.setup"
            )
        self.model = module
        strategy = module.trainer.strategy
        if strategy.restore_checkpoint_after_setup:  # they load their shards themselves
            self._check_sharded(module, strategy)
        else:
            convert(module, self.recipe, self.skip, frozen=self.frozen)
        if module not in _plain_keys:
            _plain_keys.add(module)
            module.register_state_dict_post_hook(_leave_out_added)
        return module

    def _check_sharded(self, module: nn.Module, strategy: object) -> None:
        """Raises ValueError unless the strategy found a model that it can train and store."""
        name, rule = type(strategy).__name__, self.recipe.linear
        if not isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                f"QuaverPrecision: {name} shards the model in its own way; use "
                "ModelParallelStrategy (FSDP2) or DDPStrategy, or a loop of your own with "
                "quaver.distributed.fully_shard and quaver.distributed.save"
            )
        if rule is None:
            return
        if rule.master == "f16-tensor" or rule.scaling == "delayed":
            raise ValueError(
                f"QuaverPrecision: {name} stores no f16 masters and amax histories, which recipe "
                f"{self.recipe.name} has; use tensorwise or coat, or a loop of your own with "
                "quaver.distributed.fully_shard and quaver.distributed.save"
            )
        rules = [layer.rule for layer in module.modules() if isinstance(layer, LinearBase)]
        if not rules or any(found != rule for found in rules):
            raise ValueError(
                f"QuaverPrecision: {name} wants a model that is sharded already; in "
                f"configure_model call quaver.convert(self, {self.recipe.name!r}) and then "
                "torch.distributed.fsdp.fully_shard"
            )

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        device = "cpu" if self.model is None else self.model.device.type
        dtype = self.recipe.autocast
        with torch.autocast(device, dtype, enabled=dtype is not None):
            yield

    def clip_grad_by_norm(self, optimizer, clip_val) -> None:
        clip_grad_norm_(self.main_params(optimizer), clip_val)

    # Checkpoints

    def state_dict(self) -> dict:
        return {"recipe": self.recipe.name, "added": _added(self.model) if self.model else {}}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Gives the converted model the codes and histories of the checkpoint, whose values
        Lightning loaded into the plain one."""
        mine = checkpoint.get(KEY)
        if mine is None:  # of a run without FP8: its values are all there is
            return
        if mine["recipe"] != self.recipe.name:
            raise ValueError(
                f"QuaverPrecision: the checkpoint is of recipe {mine['recipe']!r}, the plugin's is "
                f"{self.recipe.name!r}; resume by the same, or start from the values alone, by "
                "load_from_checkpoint"
            )
        if mine["added"]:
            values = checkpoint["state_dict"] | mine["added"]
            self.model.load_state_dict(values, strict=self.model.strict_loading)


def _added(model: nn.Module) -> dict[str, Tensor]:
    """The entries that convert adds to a state dict."""
    found = {}
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, (LinearBase, Norm)):
            histories = {key: getattr(layer, key, None) for key in HISTORIES}
            found |= {prefix + k: h.detach().clone() for k, h in histories.items() if h is not None}
        if isinstance(layer, LinearBase) and isinstance(layer.weight, ScaledTensor):
            found[f"{prefix}weight{SUFFIX}"] = master_scale(layer.weight)
    return found


def _leave_out_added(model: nn.Module, state_dict: dict, prefix: str, metadata: dict) -> None:
    for name in _added(model):
        state_dict.pop(prefix + name, None)
