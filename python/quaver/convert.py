"""Make the parts of an unmodified model that we know FP8, and back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from . import recipe as recipes
from . import structure
from .nn.cast import Holder
from .nn.linear import Linear
from .nn.mlp import MLP
from .nn.norm import Norm
from .nn.swap import swap, swap_back
from .nn.weight import convert_weight, set_dtype
from .ops import FLOATS
from .tensor import ScaledTensor, is_sharded


@dataclass(frozen=True)
class Report:
    """What `convert` did. `converted`: {module name: "linear", "norm" or "mlp"}; `left`: {module
    name: why it stayed as it was}."""

    converted: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = list(self.converted.values())
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        lines = [f"converted {', '.join(counts) or 'nothing'}"]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name or "the model")
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left {', '.join(names[:3])}{more}: {why}")
        return "\n".join(lines)


_reports: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


def convert_report(model: nn.Module) -> Report:
    """What the last `convert` of this model made FP8, and what it left and why. Empty for a model
    that was never converted, restored, or is a copy."""
    return _reports.get(model, Report())


def convert(
    model: nn.Module,
    recipe: str | recipes.Recipe = "fp8lm-o2",
    skip: Iterable[str] = ("lm_head",),
) -> nn.Module:
    """Make every nn.Linear of `model` multiply in FP8, in place; returns the model.

    Under a recipe with FP8 activations ("coat"), norms that feed those layers alone and MLPs of the
    forms in nn/mlp.py become FP8 too. They are found by what they compute, so that models of any
    library convert unmodified; what is not recognised stays as it is, and `convert_report` tells
    why.

    Modules keep their identity, class (but for their forward), names, hooks and mode; `state_dict`
    keeps its keys, and gains the amax histories of delayed scaling. Under recipes with a
    low-precision master the weights become new Parameters, so build the optimizer afterwards.
    Weights tied between linear layers stay tied; a layer tied to anything else (an embedding, say)
    is left alone.

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
    report = Report()
    _convert_linear(model, chosen, skip, report)
    if chosen.activation is not None:
        if chosen.activation.norm:
            _convert_norms(model, chosen, skip, report)
        if chosen.activation.mlp:
            _convert_mlps(model, chosen, skip, report)
    _share_casts(model)
    _reports[model] = report
    return model


def _convert_linear(model, chosen, skip, report) -> None:
    targets = {}
    for name, module in model.named_modules():
        other = (type(module) is Linear and module.rule != chosen.linear) or (
            isinstance(module, (Norm, MLP))
            and (module.rule, module.activation) != (chosen.linear, chosen.activation)
        )
        if other:
            raise ValueError(
                f"convert: {name or 'the model'} was converted by another recipe; restore it first"
            )
        if type(module) is Linear:
            report.converted[name] = "linear"
        elif not isinstance(module, nn.Linear):
            continue
        elif type(module) is not nn.Linear:
            report.left[name] = f"it is a {type(module).__name__}, a linear layer of another kind"
        elif not isinstance(module.weight, nn.Parameter):
            # nn.utils.weight_norm
            report.left[name] = "its weight is computed by a hook"
        elif _matches(name, skip):
            report.left[name] = "it is skipped"
        elif is_sharded(module.weight):
            raise ValueError(
                f"convert: {name or 'the model'} is sharded over ranks; convert before sharding"
            )
        elif module.weight.dtype not in FLOATS:
            raise TypeError(
                f"convert: {name or 'the model'} has a weight of {module.weight.dtype}; wanted "
                "float32, float16 or bfloat16"
            )
        else:
            targets[id(module)] = name, module
    tied_elsewhere = {
        id(parameter)
        for module in model.modules()
        if id(module) not in targets
        for parameter in module.parameters(recurse=False)
    }
    weights: dict[int, tuple[nn.Parameter, torch.dtype]] = {}
    for name, module in targets.values():
        old = module.weight
        if id(old) in tied_elsewhere:
            report.left[name] = "its weight is shared with a module that is not converted"
            continue
        if id(old) not in weights:
            dtype = old.dtype
            weights[id(old)] = convert_weight(old, chosen.linear), dtype
        module.__class__ = Linear
        module.adopt(chosen, *weights[id(old)])
        report.converted[name] = "linear"


def _convert_norms(model, chosen, skip, report) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for path, parent in model.named_modules():
        for child, norm in parent.named_children():
            name = f"{path}.{child}" if path else child
            if isinstance(norm, Norm):
                report.converted[name] = "norm"
                continue
            if not structure.is_norm(norm):
                continue
            if _matches(name, skip):
                report.left[name] = "it is skipped"
                continue
            try:
                form = structure.norm_form(norm)
                structure.check_readers(parent, child, form.width)
            except structure.NotRecognized as why:
                report.left[name] = str(why)
                continue
            Norm.adopt(norm, chosen, form.width, form.eps, form.centered, form.offset, device)
            report.converted[name] = "norm"


def _convert_mlps(model, chosen, skip, report) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MLP):
            report.converted[name] = "mlp"
            continue
        if not structure.mlp_candidate(module):
            continue
        if _matches(name, skip):
            report.left[name] = "it is skipped"
            continue
        try:
            plan = structure.mlp_plan(module)
        except structure.NotRecognized as why:
            report.left[name] = str(why)
            continue
        MLP.adopt(module, chosen, plan)
        report.converted[name] = "mlp"


def _share_casts(model) -> None:
    """Lets linear layers of one module share the cast of what they read alike."""
    for module in model.modules():
        if isinstance(module, (nn.Sequential, Holder, MLP)):  # in a Sequential each reads another
            continue
        widths = [child.in_features for child in _held(module) if isinstance(child, Linear)]
        callable_ = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if callable_ and len(set(widths)) < len(widths):
            swap(module, Holder)


def _held(module: nn.Module):
    """The children of a module, and the elements of lists and dicts of modules in it."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _held(child)
        else:
            yield child


def restore(model: nn.Module) -> nn.Module:
    """Undo `convert` in place: modules as they were, with plain weights of the dtype that they had;
    returns the model."""
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Holder):
            swap_back(module)
        if isinstance(module, (Norm, MLP)):
            module.restore()
        if type(module) is not Linear:
            continue
        old = module.weight
        if id(old) not in weights:
            weights[id(old)] = _plain_weight(old, module.plain_dtype)
        module.weight = weights[id(old)]
        module.restore()
        module.__class__ = nn.Linear
    _reports.pop(model, None)
    return model


def _plain_weight(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if isinstance(weight, ScaledTensor):
        return nn.Parameter(weight.detach().dequantize(), weight.requires_grad)
    if weight.dtype != dtype:
        set_dtype(weight, dtype)
    return weight


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    last = name.rpartition(".")[2]
    return any(last == p or fnmatchcase(name, p) for p in patterns)
