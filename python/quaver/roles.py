"""Layers that FP8 does not suit, by their role or their form, and the share of a model that is
FP8."""

from __future__ import annotations

import warnings
from collections.abc import Container

from torch import nn

from .nn.norm import Norm
from .structure import is_lazy

LEAST = 16  # values of an output; Hopper's products take 16 or more
LITTLE = 0.5  # share of the weights below which a conversion is hardly one
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def by_role(model: nn.Module) -> dict[str, str]:
    """{name: reason} of heads, routers and gates: their outputs are the logits of tokens, labels or
    experts, where a rounding changes a choice, and their products are small."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inner = [prefix + n for n in _heads(module)]
        found |= dict.fromkeys(inner, "it is the model's head")
        if any(n.endswith("experts") for n in module._modules):
            gates = [n for n in module._modules if "gate" in n.lower() or "router" in n.lower()]
            inner = [prefix + n for gate in gates for n in _within(module, gate)]
            found |= dict.fromkeys(inner, "it chooses between experts")
        if isinstance(module, nn.Linear) and module.out_features < LEAST:
            found.setdefault(
                name, f"its output has {module.out_features} values, as a score's or a gate's has"
            )
    return found


def _within(module: nn.Module, child: str) -> list[str]:
    """The names, in `module`, of a child and of all that it holds."""
    inner = module._modules[child]
    return [child, *(f"{child}.{n}" for n, _ in inner.named_modules() if n)] if inner else [child]


def _heads(module: nn.Module) -> list[str]:
    """The names of linear layers outside of the body of a model of transformers, which names it."""
    body = getattr(module, "base_model_prefix", None)
    if not isinstance(body, str) or body not in module._modules:
        return []
    linear = (n for n, m in module.named_modules() if isinstance(m, nn.Linear))
    return [n for n in linear if not n.startswith(f"{body}.")]


def why_matrices_stay(module: nn.Module) -> str | None:
    """The reason for a module with matrices that it does not multiply as a linear layer."""
    if isinstance(module, (*EMBEDDINGS, Norm)):
        return None
    for name, p in module.named_parameters(recurse=False):
        if is_lazy(p):
            return "it has no shape yet; run a batch through the model, then convert"
        if p.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
            return f"{name} is a stack of matrices (experts?), which no FP8 layer multiplies"
        if p.dim() >= 2:
            return f"it is a {type(module).__name__}, no linear layer, and multiplies by {name}"
    return None


def share_of(model: nn.Module, converted: Container[str], apart: Container[str]) -> float:
    """The values of converted weights divided by those of all matrices, except for embeddings and
    the modules of `apart`; 1 where there are none."""
    seen: set[int] = set()
    fp8 = total = 0
    for name, module in model.named_modules():
        if isinstance(module, EMBEDDINGS) or name in apart:
            continue
        for p in module.parameters(recurse=False):
            if id(p) in seen or nn.parameter.is_lazy(p) or p.dim() < 2:
                continue
            seen.add(id(p))
            total += p.numel()
            fp8 += p.numel() * (name in converted)
    return fp8 / total if total else 1.0


def check_share(share: float, report: object, empty: bool, allow_empty: bool) -> None:
    """Raises ValueError where nothing was converted and that is not allowed; warns where little."""
    if empty and not allow_empty:
        raise ValueError(
            f"convert: no layer of the model became FP8; {report}\n"
            "Pass allow_empty=True where that is right"
        )
    if share < LITTLE and not empty:
        warnings.warn(
            f"convert: only {share:.0%} of the weights are FP8, embeddings and heads apart; "
            f"{report}",
            stacklevel=4,
        )
