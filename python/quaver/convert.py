"""Converts the parts of an unmodified model that have an FP8 form, and restores them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from . import recipe as recipes
from . import structure
from .mismatch import mark_converted, mark_replaced, mark_restored
from .nn.cast import Holder
from .nn.experts import TRAINS, Experts, is_experts, why_experts_stay
from .nn.linear import LINEARS, Conv1D, Linear, LinearBase, SwappedLinear, is_converted
from .nn.mlp import MLP
from .nn.norm import Norm
from .nn.swap import is_wrapped, swap, swap_back
from .nn.weight import convert_weight, freeze_weight, set_dtype
from .ops import FLOATS
from .roles import by_role, check_share, share_of, why_matrices_stay
from .tensor import ScaledTensor, is_sharded

HEAD = ("lm_head",)  # the default of `skip`, allowed for models without such a layer too
SKIPPED = "it is skipped"


@dataclass(frozen=True)
class Report:
    """The result of `convert`. `converted`: {module name: "linear", "norm", "mlp" or "experts"};
    `left`: {module name: the reason why it stayed as it was}; `share`: the part of the weights that
    is FP8, of all matrices except for embeddings and what is left for its role or by `skip`."""

    converted: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    share: float = 0.0

    def __str__(self) -> str:
        kinds = list(self.converted.values())
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        share = f", {self.share:.0%} of the weights" if counts else ""
        lines = [f"converted {', '.join(counts) or 'nothing'}{share}"]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name or "the model")
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left {', '.join(names[:3])}{more}: {why}")
        return "\n".join(lines)


_reports: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


def convert_report(model: nn.Module) -> Report:
    """The report of the last `convert` of this model: the modules that became FP8, and a reason for
    each that stayed. Empty for a model that was never converted, was restored, or is a copy."""
    return _reports.get(model, Report())


def convert(
    model: nn.Module,
    recipe: str | recipes.Recipe = "fp8lm-o2",
    skip: Iterable[str] = HEAD,
    *,
    frozen: str | None = None,
    allow_empty: bool = False,
) -> nn.Module:
    """Make every linear layer of `model` multiply in FP8, in place; returns the model.

    Those are nn.Linear and transformers' Conv1D, and its stacks of experts under recipes with plain
    weights ("tensorwise", "coat"). Under a recipe with FP8 activations ("coat"),
    norms that feed those layers alone and MLPs of the forms in nn/mlp.py become FP8 too. They are
    found by what they compute, so that models of any library convert unmodified; modules that are
    not recognised stay as they are, and `convert_report` gives the reason.

    Modules keep their identity, class (except for their forward), names, hooks and mode;
    `state_dict` keeps its keys, and gains the amax histories of delayed scaling. Parameters stay
    the same plain Parameters, in bf16 under "coat". Under "fp8lm-*" weights of linear layers become
    new ones, so build the optimizer afterwards. Weights tied between linear layers stay tied; a
    layer tied to anything else (an embedding, say) is left alone.

    Args:
        recipe: a name or a Recipe; one without FP8 linear layers leaves the model as it is.
        skip: names to leave alone: a module's full name, its last part, or a pattern ("*.gate").
            By default heads (of transformers' models, and what is called lm_head), routers of
            experts and layers with less than 16 outputs; names given here take their place.
        frozen: "fp8" converts the linear layers whose weight does not need gradients, and no other:
            it becomes e4m3 codes with one scale, 1 byte a value, which forward and backward
            multiply by. So do stacks of experts, under every recipe, with a scale a row (blocks
            under recipes with blocks). Layers that train (LoRA's) stay as they are.
        allow_empty: whether a model in which nothing becomes FP8 is returned as it is.

    Warns where less than half of the weights became FP8, with the reasons of `convert_report`.

    Raises:
        TypeError: `skip` is a string, the model is no module, or a weight is, say, float64.
        ValueError: an unknown recipe, a model that was converted by another one, a sharded one, a
            name in `skip` that fits no layer, `frozen` of a model whose weights all train, or a
            model without a layer that becomes FP8.
    """
    if isinstance(skip, str):
        raise TypeError(f"convert: skip must be several names, got the string {skip!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    chosen = recipes.get(recipe)
    skip = tuple(skip)
    if skip != HEAD:
        _check_skip(model, skip)
    if frozen is not None:
        chosen = _frozen_recipe(model, chosen, frozen)
    if chosen.linear is None:
        return model
    report = Report()
    roles = by_role(model) if skip == HEAD else {}
    _convert_linear(model, chosen, skip, roles, report, frozen is not None)
    _convert_experts(model, chosen, skip, report, frozen is not None)
    if chosen.activation is not None:
        with torch.device("cpu"):  # they are recognised by values; a caller's default may be meta
            if chosen.activation.norm:
                _convert_norms(model, chosen, skip, report)
            if chosen.activation.mlp:
                _convert_mlps(model, chosen, skip, report)
    apart = [n for n, why in report.left.items() if why in (SKIPPED, TRAINS) or n in roles]
    report = replace(report, share=share_of(model, report.converted, apart))
    check_share(report.share, report, not report.converted, allow_empty)
    _share_casts(model)
    _reports[model] = report
    return model


def _frozen_recipe(model: nn.Module, chosen: recipes.Recipe, frozen: str) -> recipes.Recipe:
    """The recipe of layers that do not train: their codes are all that exists of a weight."""
    if frozen != "fp8":
        raise ValueError(f'convert: frozen must be "fp8" or None, got {frozen!r}')
    if chosen.linear is None:
        raise ValueError(f"convert: frozen: recipe {chosen.name!r} has no FP8 linear layers")
    linear = (m for m in model.modules() if isinstance(m, nn.Linear) or structure.is_conv1d(m))
    weights = (layer._parameters.get("weight") for layer in linear)
    if all(weight is None or weight.requires_grad for weight in weights):
        raise ValueError(
            "convert: frozen: every linear layer trains; call model.requires_grad_(False) before, "
            "or PEFT's get_peft_model"
        )
    return replace(chosen, linear=replace(chosen.linear, master="as-is", cache="none"))


def _check_skip(model: nn.Module, skip: tuple[str, ...]) -> None:
    """Raises ValueError for a pattern that matches no module, or only holders of linear layers."""
    for pattern in skip:
        found = [(n, m) for n, m in model.named_modules() if n and _matches(n, (pattern,))]
        if not found:
            raise ValueError(f"convert: skip: no module of the model is called {pattern!r}")
        holders = [n for n, m in found if not structure.mlp_candidate(m) and _holds_linear(m)]
        if len(holders) == len(found):
            raise ValueError(
                f"convert: skip: {pattern!r} is no layer but holds some; '{holders[0]}.*' skips "
                "those"
            )


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(m, (nn.Linear, LinearBase)) for m in module.modules() if m is not module)


def _convert_linear(model, chosen, skip, roles, report, frozen) -> None:
    targets = {}
    for name, module in model.named_modules():
        _check_recipe(name, module, chosen)
        if is_converted(module):
            report.converted[name] = "linear"
            continue
        _check_not_stored_in_fp8(name, module)
        if not isinstance(module, nn.Linear) and not structure.is_conv1d(module):
            why = why_matrices_stay(module)
        else:
            why = _why_linear_stays(name, module, skip) or roles.get(name)
            if why is None and frozen and module.weight.requires_grad:
                why = TRAINS
        if why is not None:
            report.left[name] = why
        elif isinstance(module, nn.Linear) or structure.is_conv1d(module):
            _check_weight(name, module)
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
            convert_one = freeze_weight if frozen else convert_weight
            weights[id(old)] = convert_one(old, chosen.linear), dtype
            mark_replaced(old, weights[id(old)][0])
        if type(module) is nn.Linear:
            module.__class__ = Linear
        else:
            swap(module, SwappedLinear if isinstance(module, nn.Linear) else Conv1D)
        module.convert_in_place(chosen, *weights[id(old)])
        mark_converted(module, chosen)
        report.converted[name] = "linear"


def _convert_experts(model, chosen, skip, report, frozen) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, Experts) and not is_experts(module):
            continue
        why = SKIPPED if _matches(name, skip) else why_experts_stay(module, chosen, frozen)
        if why is not None:
            report.left[name] = why
            continue
        if not isinstance(module, Experts):
            Experts.convert_in_place(module, chosen, frozen)
            mark_converted(module, chosen)
        report.left.pop(name, None)
        report.converted[name] = "experts"


def _check_recipe(name: str, module: nn.Module, chosen: recipes.Recipe) -> None:
    linear = is_converted(module) or isinstance(module, Experts)
    other = (linear and module.rule != chosen.linear) or (
        isinstance(module, (Norm, MLP))
        and (module.rule, module.activation) != (chosen.linear, chosen.activation)
    )
    if other:
        raise ValueError(
            f"convert: {name or 'the model'} was converted by another recipe; restore it first"
        )


def _check_not_stored_in_fp8(name: str, module: nn.Module) -> None:
    """Refuses a layer that another library keeps in FP8, for inference."""
    weight = module._parameters.get("weight")
    codes = weight is not None and weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    if codes and not isinstance(weight, ScaledTensor):
        raise TypeError(
            f"convert: {name or 'the model'} is a {type(module).__name__} with a weight of "
            f"{weight.dtype}; load the folder by quaver.load_pretrained, which decodes it"
        )


def _check_weight(name: str, module: nn.Module) -> None:
    if is_sharded(module.weight):
        raise ValueError(
            f"convert: {name or 'the model'} is sharded over ranks; convert before sharding"
        )
    if module.weight.dtype not in FLOATS:
        raise TypeError(
            f"convert: {name or 'the model'} has a weight of {module.weight.dtype}; wanted "
            "float32, float16 or bfloat16"
        )


def _why_linear_stays(name: str, module: nn.Module, skip: tuple[str, ...]) -> str | None:
    kind = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
        return "its weight is computed, by a parametrization or a hook such as weight_norm"
    if structure.is_lazy(module.weight):
        return "it has no shape yet; run a batch through the model, then convert"
    if isinstance(module, nn.Linear) and type(module) not in LINEARS:
        return f"it is a {kind}, a linear layer of another kind"
    return SKIPPED if _matches(name, skip) else None


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
                report.left[name] = SKIPPED
                continue
            try:
                form = structure.norm_form(norm)
                structure.check_readers(parent, child, form.width)
            except structure.NotRecognized as why:
                report.left[name] = str(why)
                continue
            Norm.convert_in_place(
                norm, chosen, form.width, form.eps, form.centered, form.offset, device
            )
            report.converted[name] = "norm"


def _convert_mlps(model, chosen, skip, report) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MLP):
            report.converted[name] = "mlp"
            continue
        if not structure.mlp_candidate(module):
            continue
        if _matches(name, skip):
            report.left[name] = SKIPPED
            continue
        try:
            plan = structure.mlp_plan(module)
        except structure.NotRecognized as why:
            report.left[name] = str(why)
            continue
        MLP.convert_in_place(module, chosen, plan)
        report.converted[name] = "mlp"


def _share_casts(model) -> None:
    """Lets linear layers of one module share the FP8 cast of an input that they all read."""
    for module in model.modules():
        # Layers of a Sequential read different inputs; lists and dicts have no forward.
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, Holder, MLP)):
            continue
        widths = [child.in_features for child in _held(module) if is_converted(child)]
        if len(set(widths)) < len(widths):
            swap(module, Holder)


def _held(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, and the elements of lists and dicts of modules in it."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _held(child)
        else:
            yield child


def restore(model: nn.Module) -> nn.Module:
    """Undo `convert` in place: modules as they were, with plain weights of the dtype that they had;
    returns the model.

    Raises:
        ValueError: a layer that was parametrized, or a module that was wrapped, after `convert`;
            nothing has changed then.
    """
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and nn.utils.parametrize.is_parametrized(module):
            raise ValueError(
                f"restore: {name or 'the model'} is parametrized; call "
                "torch.nn.utils.parametrize.remove_parametrizations on it first"
            )
        if is_wrapped(module):
            raise ValueError(
                f"restore: {name or 'the model'} was made a {type(module).__name__} after convert; "
                "restore it before"
            )
    weights: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Holder):
            swap_back(module)
        if isinstance(module, (Norm, MLP, Experts)):
            mark_restored(module)
            module.restore()
        if not is_converted(module):
            continue
        old = module.weight
        if id(old) not in weights:
            weights[id(old)] = _plain_weight(old, module)
            mark_replaced(old, weights[id(old)])
        module.weight = weights[id(old)]
        module.restore()
        mark_restored(module)
        if type(module) is Linear:
            module.__class__ = nn.Linear
        else:
            swap_back(module)
    _reports.pop(model, None)
    return model


def _plain_weight(weight: nn.Parameter, layer: LinearBase) -> nn.Parameter:
    if isinstance(weight, ScaledTensor):
        return nn.Parameter(weight.detach().dequantize(), weight.requires_grad)
    if layer.rule.master == "bf16":
        set_dtype(weight, layer.plain_dtype)
    return weight


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    last = name.rpartition(".")[2]
    return any(last == p or fnmatchcase(name, p) for p in patterns)
