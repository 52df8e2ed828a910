"""Swap nn.Linear for quaver.nn.Linear in an unmodified model, and back."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from . import recipe as recipes
from .nn.linear import Linear, convert_weight
from .ops import FLOATS
from .tensor import ScaledTensor, is_sharded


def convert(
    model: nn.Module,
    recipe: str | recipes.Recipe = "fp8lm-o2",
    skip: Iterable[str] = ("lm_head",),
) -> nn.Module:
    """Make every nn.Linear of `model` multiply in FP8, in place; returns the model.

    Modules keep their identity, names, hooks and mode. Under recipes with a low-precision master
    the weights become new Parameters, so build the optimizer afterwards. Weights tied between
    linear layers stay tied; a layer tied to anything else (an embedding, say) is left alone.

    Args:
        recipe: a name or a Recipe; one without FP8 linear layers leaves the model as it is.
        skip: names to leave alone: a module's full name, its last part, or a pattern ("*.gate").

    Raises:
        TypeError: `skip` is a string, the model is no module, or a weight is, say, float64.
        ValueError: an unknown recipe, a model that was converted by another one, or a sharded one.
    """
    if isinstance(skip, str):
        raise TypeError(f"convert: skip must be several names, got the string {skip!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    chosen = recipes.get(recipe)
    if chosen.linear is None:
        return model
    skip = tuple(skip)
    targets = {}
    for name, module in model.named_modules():
        if type(module) is Linear and module.rule != chosen.linear:
            raise ValueError(
                f"convert: {name or 'the model'} was converted by another recipe; restore it first"
            )
        # A weight that is no Parameter of the module is computed by a hook (nn.utils.weight_norm).
        own = type(module) is nn.Linear and isinstance(module.weight, nn.Parameter)
        if own and not _matches(name, skip):
            if is_sharded(module.weight):
                raise ValueError(
                    f"convert: {name or 'the model'} is sharded over ranks; convert before sharding"
                )
            if module.weight.dtype not in FLOATS:
                raise TypeError(
                    f"convert: {name or 'the model'} has a weight of {module.weight.dtype}; wanted "
                    "float32, float16 or bfloat16"
                )
            targets[id(module)] = module
    tied_elsewhere = {
        id(parameter)
        for module in model.modules()
        if id(module) not in targets
        for parameter in module.parameters(recurse=False)
    }
    weights: dict[int, nn.Parameter] = {}
    for module in targets.values():
        old = module.weight
        if id(old) in tied_elsewhere:
            continue
        if id(old) not in weights:
            weights[id(old)] = convert_weight(old, chosen.linear)
        module.__class__ = Linear
        module.adopt(chosen, weights[id(old)])
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `convert` in place: plain nn.Linear with decoded weights; returns the model."""
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if type(module) is not Linear:
            continue
        old = module.weight
        if id(old) not in weights:
            plain = old
            if isinstance(old, ScaledTensor):
                plain = nn.Parameter(old.detach().dequantize(), old.requires_grad)
            weights[id(old)] = plain
            plain.__dict__.pop("fp8_weight", None)
        module.weight = weights[id(old)]
        del module.input_history, module.grad_history, module.history_before
        del module.rule, module.fp8_weight
        module.__class__ = nn.Linear
    return model


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    last = name.rpartition(".")[2]
    return any(last == p or fnmatchcase(name, p) for p in patterns)
