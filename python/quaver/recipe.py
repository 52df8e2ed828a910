"""Recipes: the one table of what is FP8. Frozen data; nothing branches on a recipe's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class LinearRecipe:
    """How a linear layer multiplies.

    `scaling` of inputs and output gradients is "current" (just in time) or "delayed" (just in
    time for 16 casts, then from the maximum of the last 16 amaxes). `weight_grad` is what the
    backward leaves in `.grad`, and so how micro-batches accumulate: "e4m3", "bf16" or "f32".
    """

    input: torch.dtype = E4M3
    weight: torch.dtype = E4M3
    grad_output: torch.dtype = E5M2
    scaling: str = "current"
    weight_grad: str = "f32"
    master: str = "f32"  # storage of the weight itself: "f32" leaves it alone, or "f16-tensor"


@dataclass(frozen=True)
class ActivationRecipe:
    """What is kept in FP8 between linear layers (COAT, arXiv 2410.19313, section 5).

    `norm` and `mlp`: norms and MLPs give FP8 to the linear layers that read them, and save their
    own inputs for backward in e4m3 groups of 1 x `block` with power-of-two scales.
    `smooth_swiglu`: the product of a gated MLP is divided by a power of two per channel before its
    cast, from the amaxes of the forward before, and the next layer's FP8 weights are multiplied by
    it (arXiv 2409.12517); the weights themselves do not change.
    """

    block: int = 128
    norm: bool = True
    mlp: bool = True
    smooth_swiglu: bool = False


@dataclass(frozen=True)
class Recipe:
    """`autocast` is the dtype of everything that is not FP8; None runs in the model's dtype.
    `exp_avg` and `exp_avg_sq` name state codecs of optim/states.py for converted weights, and with
    `plain_moments` for all other parameters too. `bf16_master` is how a bf16 parameter takes its
    update: "nearest", "stochastic" (unbiased, no further bytes) or "remainder" (16 more bits in the
    optimizer's state, which make it an exact f32 master). `replica` is what distributed.ZeroAdamW
    leaves of a converted weight on every rank, beside the master of its owner; None leaves copies
    of the master. `fp8_sum`: under tensor parallelism partial sums travel in FP8, as gathered
    activations do."""

    name: str
    autocast: torch.dtype | None = torch.bfloat16
    linear: LinearRecipe | None = None
    activation: ActivationRecipe | None = None
    exp_avg: str = "f32"
    exp_avg_sq: str = "f32"
    plain_moments: bool = False
    bf16_master: str = "nearest"
    replica: torch.dtype | None = None
    fp8_sum: bool = False


_FP8LM = LinearRecipe(scaling="delayed", weight_grad="e4m3", master="f16-tensor")
# Just in time: the norm's and the activation's kernel reduces its own amax (Group Scaling).
_COAT = LinearRecipe(scaling="current", weight_grad="e4m3", master="f16-tensor")

_RECIPES = {
    r.name: r
    for r in (
        Recipe("f32", autocast=None),
        Recipe("bf16"),
        Recipe("tensorwise", linear=LinearRecipe()),
        Recipe("fp8lm-o1", linear=_FP8LM),
        Recipe("fp8lm-o2", linear=_FP8LM, exp_avg="e4m3-tensor", exp_avg_sq="f16-tensor"),
        Recipe(
            "fp8lm-o3",
            linear=_FP8LM,
            exp_avg="e4m3-tensor",
            exp_avg_sq="f16-tensor",
            replica=E4M3,
            fp8_sum=True,
        ),
        Recipe(
            "coat",
            linear=_COAT,
            activation=ActivationRecipe(),
            exp_avg="e4m3-expand",
            exp_avg_sq="e4m3-expand",
            plain_moments=True,
            bf16_master="stochastic",
        ),
    )
}


def names() -> list[str]:
    return list(_RECIPES)


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name; a Recipe (say from dataclasses.replace) is returned as it is.

    Raises ValueError on an unknown name, listing the known ones.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in _RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(_RECIPES)}")
    return _RECIPES[recipe]
