"""The methods of `quaver tune`: what of a model trains, by which optimizer, and what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .. import distributed, optimizers, recipe
from ..convert import convert
from ..errors import UsageError
from ..hf.pretrained import quiet
from ..nn.frozen import FrozenLinear, check_format
from ..nn.side import SideTuned, side_tune
from ..structure import is_conv1d
from .settings import Settings

__all__ = ["Trained", "build", "build_optimizer", "check_peft", "save", "trained"]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Trained(nn.Module):
    """The parameters of a model that train, by their names: a checkpoint of them is complete, since
    what is frozen comes from --model. No method here has buffers that a step changes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.register_parameter(name.replace(".", "/"), p)


def check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError("--method lora needs the package `peft`: pip install quaver[hf]") from None


def build(method: str, model: nn.Module, settings: Settings) -> nn.Module:
    """`model`, changed in place so that what the method trains, and no more, needs gradients.

    Raises UsageError for a model or options that the method does not take."""
    make = {"qst": _qst, "lora": _lora, "full": _full}[method]
    try:
        return make(model, settings)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--method {method}: {error}") from None


def _qst(model: nn.Module, s: Settings) -> nn.Module:
    return side_tune(
        model, reduction=s.reduction, adapter=s.adapter, backbone=s.backbone, recipe=s.recipe
    )


def _full(model: nn.Module, s: Settings) -> nn.Module:
    chosen = recipe.get(s.recipe)
    return model if chosen.linear is None else convert(model, chosen, skip=("lm_head",))


def _lora(model: nn.Module, s: Settings) -> nn.Module:
    check_peft()
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=s.rank, lora_alpha=2 * s.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with quiet():
        model = get_peft_model(model, options)
    if s.backbone != "keep":
        freeze_base(model, s.backbone)
    return model


def freeze_base(model: nn.Module, format: str) -> None:
    """Encodes the linear layers that PEFT's layers hold, which do not train."""
    check_format("freeze_base", format)
    for module in model.modules():
        layer = getattr(module, "base_layer", None)
        if type(layer) is nn.Linear or (isinstance(layer, nn.Module) and is_conv1d(layer)):
            module.base_layer = FrozenLinear(layer.weight, layer.bias, format, is_conv1d(layer))


def _groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Matrices and vectors apart, as `optimizers` wants them; the first decay."""
    if isinstance(model, SideTuned):
        found = model.side_parameter_groups(lr)
    else:
        found = [{"params": trained(model), "lr": lr}]
    groups = []
    for wide in (True, False):
        for group in found:
            params = [p for p in group["params"] if (p.dim() >= 2) == wide]
            if params:
                decay = weight_decay if wide else 0.0
                groups.append({**group, "params": params, "weight_decay": decay})
    return groups


def build_optimizer(
    model: nn.Module, settings: Settings, world: distributed.World
) -> torch.optim.Optimizer:
    """The optimizer of --optimizer at the rate `settings.lr`, for a model of `build`; bf16
    parameters keep the bits that their updates would lose. Raises UsageError where it does not take
    the model."""
    groups = _groups(model, settings.lr, settings.weight_decay)
    states = replace(recipe.get(settings.recipe), bf16_master="remainder")
    setting = optimizers.Setting(
        model=model,
        recipe=states,
        groups=groups,
        lr=settings.lr,
        betas=settings.betas,
        dim=min(min(p.shape) for p in groups[0]["params"]),
        zero=False,
        sharded=False,
        world=world,
    )
    try:
        return optimizers.build(settings.optimizer, setting)
    except ValueError as error:
        raise UsageError(f"--optimizer {settings.optimizer}: {error}") from None


def save(method: str, model: nn.Module, folder: Path, tokenizer) -> None:
    """Writes what was trained into a new folder: side.safetensors, PEFT's adapter, or a model of
    transformers with its tokenizer."""
    model.save_pretrained(folder)
    if method == "full":
        tokenizer.save_pretrained(folder)
