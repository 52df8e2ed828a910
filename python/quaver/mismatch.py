"""Warns of optimizers that do not fit the model that `convert` made."""

from __future__ import annotations

import threading
import warnings
import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .recipe import Recipe
from .tensor import ScaledTensor, local

# The old parameters that are still alive. Without an optimizer that holds them they are freed.
_replaced: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# {layer: recipe}. By layer, because torch swaps no tensor that has weak references.
_layers: weakref.WeakKeyDictionary[nn.Module, Recipe] = weakref.WeakKeyDictionary()
_checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_hook = None
_lock = threading.Lock()


def mark_replaced(old: nn.Parameter, new: nn.Parameter) -> None:
    """Records that `new` took the place of `old` in a model, unless they are one."""
    if old is not new:
        _replaced[old] = None


def mark_converted(layer: nn.Module, recipe: Recipe) -> None:
    """Records the recipe by which a layer was converted."""
    global _hook
    with _lock:
        _layers[layer] = recipe
        if _hook is None:  # torch's own hook for all optimizers
            _hook = register_optimizer_step_pre_hook(_check)


def mark_restored(layer: nn.Module) -> None:
    with _lock:
        _layers.pop(layer, None)


def _check(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    if _replaced:
        _warn_of_replaced(optimizer)
    if optimizer not in _checked:
        _checked.add(optimizer)
        _warn_of_other_recipe(optimizer)


def _warn_of_replaced(optimizer: torch.optim.Optimizer) -> None:
    stale = [p for group in optimizer.param_groups for p in group["params"] if p in _replaced]
    if stale:
        for p in stale:  # once for each
            del _replaced[p]
        warnings.warn(
            f"{type(optimizer).__name__}: {len(stale)} of its parameters are not the model's any "
            "more, because quaver.convert or restore made new ones; build the optimizer afterwards",
            stacklevel=4,
        )


def _warn_of_other_recipe(optimizer: torch.optim.Optimizer) -> None:
    recipe = getattr(optimizer, "recipe", None)
    if not isinstance(recipe, Recipe):
        return
    with _lock:
        recipes = {
            id(p): converted
            for layer, converted in _layers.items()
            for p in layer.parameters(recurse=False)
            if p.dim() > 1  # biases have the moments of plain parameters
        }
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        converted = recipes.get(id(p))
        # A recipe of the same name was derived from the model's, with other states on purpose.
        same = converted is None or converted.name == recipe.name
        if same or _rules(p, converted) == _rules(p, recipe):
            continue
        wanted, got = (", ".join(_rules(p, r)) for r in (converted, recipe))
        warnings.warn(
            f"{type(optimizer).__name__}: recipe {recipe.name!r} steps converted weights by {got}; "
            f"the model was converted by {converted.name!r}, which has {wanted}",
            stacklevel=4,
        )
        return


def _rules(p: nn.Parameter, recipe: Recipe) -> tuple[str, ...]:
    """The rules by which `recipe` stores the moments of p and rounds p."""
    scaled = isinstance(local(p), ScaledTensor)
    low = scaled or recipe.plain_moments or recipe.packed
    moments = (recipe.exp_avg, recipe.exp_avg_sq) if low else ("f32", "f32")
    if scaled:
        return *moments, recipe.master_rounding
    return (*moments, recipe.bf16_master) if p.dtype == torch.bfloat16 else moments
