"""The optimizers of `quaver train --optimizer`, by name: how each is built for a model.

`adamw` and every recipe of AdamW alone (`recipe.step_names`), so that a new one is known here too;
`microadam`; `grass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from . import distributed, optim, recipe
from .nn import LinearBase

__all__ = ["Setting", "build", "label", "labels", "names", "rate"]

SUBSET_RATE = 10.0  # a sum of squares is larger than their mean, so that steps are shorter


@dataclass(frozen=True)
class Setting:
    """The values that an optimizer is built of. `recipe` is what the model was converted by;
    `groups` are its parameters, those that decay first; `dim` is its width; `zero` and `sharded`
    say whether --parallel spreads states over ranks, and whether FSDP2 shards the model."""

    model: nn.Module
    recipe: recipe.Recipe
    groups: list[dict]
    lr: float
    betas: tuple[float, float]
    dim: int
    zero: bool
    sharded: bool
    world: distributed.World

    @property
    def options(self) -> dict:
        return {"lr": self.lr, "betas": self.betas}

    @property
    def rank(self) -> int:
        """The rank of a projection: a quarter of the width, as in the papers."""
        return max(1, self.dim // 4)


def adamw(s: Setting, states: recipe.Recipe) -> torch.optim.Optimizer:
    """AdamW with the states of a recipe; spread over ranks where --parallel or the recipe has it.
    Raises ValueError as AdamW and ZeroAdamW do."""
    options = {**s.options, "recipe": states}
    if s.zero or (states.replica and not s.sharded):
        return distributed.ZeroAdamW(s.groups, group=s.world.data_group, **options)
    return optim.AdamW(s.groups, **options)


def _with_f32_moments(chosen: recipe.Recipe) -> recipe.Recipe:
    return replace(chosen, exp_avg="f32", exp_avg_sq="f32", plain_moments=False)


def _plain(s: Setting) -> torch.optim.Optimizer:
    return adamw(s, _with_f32_moments(s.recipe))


def _step_recipe(name: str) -> Callable[[Setting], torch.optim.Optimizer]:
    def make(s: Setting) -> torch.optim.Optimizer:
        states = recipe.get(name)
        if isinstance(states.exp_avg, recipe.Subspace):
            states = replace(states, exp_avg=replace(states.exp_avg, rank=s.rank))
        groups = _embeddings_apart(s) if states.composed else s.groups
        return adamw(replace(s, groups=groups), states)

    return make


def _embeddings_apart(s: Setting) -> list[dict]:
    """The groups with matrices that no linear layer multiplies by in one of their own, whose
    moments have a value for each element."""
    linear = (nn.Linear, LinearBase)
    weights = {m.weight for m in s.model.modules() if isinstance(m, linear)}
    matrices, *others = s.groups
    inside = [p for p in matrices["params"] if p in weights]
    outside = [p for p in matrices["params"] if p not in weights]
    apart = [{**matrices, "params": outside, "compress": False}] if outside else []
    return [{**matrices, "params": inside}, *apart, *others]


def _microadam(s: Setting) -> torch.optim.Optimizer:
    _refuse_zero("MicroAdam", s)
    return optim.MicroAdam(s.groups, s.lr)  # its own betas: the window cuts the sums as it is


def _grass(s: Setting) -> torch.optim.Optimizer:
    _refuse_zero("Grass", s)
    first, *others = s.groups
    # Rows drawn by their norms lose less in a run from scratch than always the largest (docs/
    # optimizers.md), and a run of a thousand steps should choose several times.
    choice = {"rank": s.rank, "select": "sample", "every": 100}
    options = {**choice, "recipe": _with_f32_moments(s.recipe), **s.options}
    made = optim.Grass(s.model, weight_decay=first["weight_decay"], **options)
    if not any(made.is_projected(p) for p in first["params"]):
        raise ValueError(
            "Grass: no linear layer of the model holds a whole weight of its own, as under tensor "
            "parallelism, so that all parameters would take AdamW; wanted dp=N, or adamw"
        )
    # Grass takes the model, whose layers it teaches, as one group: the others leave it.
    (whole,) = made.param_groups
    whole["params"] = first["params"]
    for group in others:
        made.add_param_group(group)
    return made


def _refuse_zero(name: str, s: Setting) -> None:
    if s.zero:
        raise ValueError(f"{name}: its states are not spread over ranks; wanted dp=N, got zero=N")


@dataclass(frozen=True)
class Choice:
    """`rate`: the peak learning rate over AdamW's where --lr does not say."""

    make: Callable[[Setting], torch.optim.Optimizer]
    rate: float = 1.0


def _step_choice(name: str) -> Choice:
    subsets = isinstance(recipe.get(name).exp_avg_sq, recipe.SubsetNorm)
    return Choice(_step_recipe(name), SUBSET_RATE if subsets else 1.0)


def _choices() -> dict[str, Choice]:
    return {
        "adamw": Choice(_plain),
        **{name: _step_choice(name) for name in recipe.step_names()},
        "microadam": Choice(_microadam),
        "grass": Choice(_grass),
    }


def names() -> list[str]:
    """The optimizers by which a model trains."""
    return list(_choices())


def _get(name: str) -> Choice:
    found = _choices()
    if name not in found:
        raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(found)}")
    return found[name]


def rate(name: str) -> float:
    """The peak learning rate of an optimizer over AdamW's. ValueError on an unknown name, listing
    the known ones."""
    return _get(name).rate


def build(name: str, setting: Setting) -> torch.optim.Optimizer:
    """The optimizer of that name. The decay of a step, lr x weight_decay, is AdamW's at the default
    rates. Raises ValueError for an unknown name, and for a model, recipe or kind of --parallel that
    the optimizer does not take."""
    choice = _get(name)
    groups = [{**g, "weight_decay": g["weight_decay"] / choice.rate} for g in setting.groups]
    return choice.make(replace(setting, groups=groups))


def label(recipe_name: str, optimizer: str | None) -> str:
    """The name of a training in a run: of its folder, its row and its curve."""
    return recipe_name if optimizer is None else f"{recipe_name}+{optimizer}"


def labels() -> Iterator[str]:
    """All names that `label` gives."""
    for name in recipe.names():
        yield from (label(name, optimizer) for optimizer in (None, *names()))
