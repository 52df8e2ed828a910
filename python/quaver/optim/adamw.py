"""AdamW over plain and FP8 parameters: one call, one pass over each state, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, placement
from ..recipe import Recipe, SubsetNorm, Subspace
from ..tensor import ScaledTensor, any_sharded, local, locals_of
from . import packed, subspace
from .base import Item, Optimizer
from .composed import ComposedStep
from .hyper import HyperTable
from .moments import MOMENTS, Remainder, remainder_slot, remainders_of, rounding_of
from .states import scaling
from .subset import SubsetSums

EMAS = ("exp_avg", "exp_avg_sq")


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101; reference.adamw is the formula) with the states of a recipe (FP8-LM,
    arXiv 2310.18313; COAT, arXiv 2410.19313).

    Converted weights (ScaledTensors) have their moments in the recipe's codecs and are themselves
    the master weight; their FP8 GEMM copies are written in the same pass. All other parameters
    (norms, biases, embeddings) keep f32 moments, unless the recipe has `plain_moments`, as "coat"
    does: a model needs no conversion for that. Under a recipe of 4 bits ("adamw-4bit",
    "adamw-4bit-block", "adamw-4bit-factor") plain parameters of more than 4096 values have two
    codes a byte (optim/packed.py), and the others float32. f16 masters round their update by
    the recipe's `master_rounding`, bf16 and f16 parameters by its `bf16_master`; the 16 bits of
    "remainder" and the 8 of "remainder8" are the state "remainder". The noise of stochastic
    rounding is a function of (index of the parameter, step, element), in which errors of successive
    steps cancel: a run has the same bits on every machine and number of ranks. A step with a
    non-finite gradient changes nothing and is counted in `skipped`. Of FSDP2's parameters each rank
    steps its shard, with the scales of the whole tensor: the codes of all shards are those of one
    process, and all ranks skip alike.

    A CUDA graph may capture `step()`: its number and hyperparameters are read on the device. After
    a change of hyperparameters call `write_hyper()` before the next replay.

    Args:
        params: parameters or groups, as torch's optimizers take them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: >= 0, decoupled.
        recipe: a name or a Recipe.
        fused, capturable: taken for what passes them to any optimizer; the step is always both.
        foreach, amsgrad, maximize, differentiable: None or False; there is no such step.

    Raises:
        ValueError: hyperparameters out of range, an option without meaning here, an unknown recipe
            or codec, a state dict that is not of this recipe and these parameters.
        RuntimeError: sparse gradients, gradients on another device than their parameter, parameters
            that changed their shape or dtype between steps.
    """

    name = "AdamW"

    def __init__(self, params, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 recipe: str | Recipe = "fp8lm-o2", *, fused: bool | None = None,
                 capturable: bool = False, foreach: bool | None = None, amsgrad: bool = False,
                 maximize: bool = False, differentiable: bool = False):  # fmt: skip
        del fused, capturable
        for option, value in {"foreach": foreach, "amsgrad": amsgrad, "maximize": maximize,
                              "differentiable": differentiable}.items():  # fmt: skip
            if value:
                raise ValueError(f"AdamW: {option}={value} is not supported; leave it out")
        self._hyper = HyperTable()
        self._whole: dict[Tensor, bool] = {}  # parameters that keep a value for each element
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, recipe)
        self._composed = ComposedStep(self.recipe)

    def __getstate__(self) -> dict:
        mine = {"_hyper": HyperTable(), "_composed": ComposedStep(self.recipe)}
        return {**super().__getstate__(), **mine, "_whole": self._whole}

    def add_param_group(self, group: dict) -> None:
        if not group.get("compress", True):
            params = group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            group = {**group, "params": params}
            self._whole |= dict.fromkeys(params, True)
        super().add_param_group(group)

    def check_options(self, group: dict) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if not float(lr) >= 0:
            raise ValueError(f"AdamW: lr must be >= 0, got {lr}")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"AdamW: betas must be in [0, 1), got {group['betas']}")
        if not group["eps"] >= 0:
            raise ValueError(f"AdamW: eps must be >= 0, got {group['eps']}")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"AdamW: weight_decay must be >= 0, got {group['weight_decay']}")
        if type(group.get("compress", True)) is not bool:
            raise ValueError(f"AdamW: compress must be True or False, got {group['compress']!r}")
        rule = self.recipe.exp_avg_sq
        if isinstance(rule, SubsetNorm) and rule.dtype == torch.bfloat16 and beta2 > 1 - 2**-8:
            raise ValueError(
                f"AdamW: a SubsetNorm in bfloat16 needs beta2 <= {1 - 2**-8}, got {beta2}: a value "
                "that changes by less than half an ulp stays where it is; wanted dtype=float32"
            )

    def describe(self) -> str:
        r = self.recipe
        master = "" if r.bf16_master == "nearest" else f", bf16_master {r.bf16_master}"
        return f"{r.name} (exp_avg {r.exp_avg}, exp_avg_sq {r.exp_avg_sq}{master})"

    # States

    def _has_rules(self, p: Tensor) -> bool:
        """Whether a moment of p is not one value for each element."""
        matrix = self.recipe.composed and p.dim() > 1 and p.numel() > 0
        return matrix and not self._whole.get(p, False)

    def _is_composed(self, p: Tensor) -> bool:
        """Whether the fused step does not know p's moments."""
        return self._has_rules(p) and isinstance(self.recipe.exp_avg, Subspace)

    def _is_packed(self, p: Tensor) -> bool:
        """Whether p's moments have 4 bits."""
        return self.recipe.packed and p.numel() > packed.LEAST and not self._whole.get(p, False)

    def _path(self, p: Tensor) -> int:
        """Which step p takes: 0 the fused one, 1 that of 4 bits, 2 the composed one."""
        return 1 if self._is_packed(p) else 2 * self._is_composed(p)

    def _subsets(self, p: Tensor) -> int:
        rule = self.recipe.exp_avg_sq
        subsets = isinstance(rule, SubsetNorm) and self._has_rules(p)
        return SubsetSums(rule).width(p) if subsets else 0

    def slots(self, p: Tensor) -> dict:
        if self._has_rules(p):
            return self._composed_slots(p)
        if self._is_packed(p):
            return packed.slots(p, self.recipe.exp_avg_sq) | self._remainder(p)
        if self.recipe.composed or self.recipe.packed:
            return dict.fromkeys(EMAS, MOMENTS["f32"]) | self._remainder(p)
        low = isinstance(local(p), ScaledTensor) or self.recipe.plain_moments
        slots = {key: MOMENTS[getattr(self.recipe, key) if low else "f32"] for key in EMAS}
        return slots | self._remainder(p)

    def _composed_slots(self, p: Tensor) -> dict:
        first, second = self.recipe.exp_avg, self.recipe.exp_avg_sq
        slots = (
            subspace.slots(first) if isinstance(first, Subspace) else {"exp_avg": MOMENTS[first]}
        )
        composed = isinstance(second, SubsetNorm)
        slots["exp_avg_sq"] = SubsetSums(second) if composed else MOMENTS[second]
        return slots | self._remainder(p)

    def _remainder(self, p: Tensor) -> dict[str, Remainder]:
        return remainder_slot(self._rounding(local(p)))

    def _check_parameter(self, p: Tensor) -> None:
        super()._check_parameter(p)
        if getattr(p, "_fsdp_flattened", False) and (self.recipe.composed or self.recipe.packed):
            raise ValueError(
                f"AdamW: recipe {self.recipe.name} keeps moments of matrices, and FSDP1 flattens "
                "them; use a recipe with f32 states, or quaver.distributed.ddp"
            )
        if not (self._has_rules(p) or self._is_packed(p)):
            return
        if isinstance(local(p), ScaledTensor) or placement.shard_of(p) is not None:
            raise ValueError(
                f"AdamW: recipe {self.recipe.name} is for plain parameters that are whole on a "
                "rank; got a converted weight or a shard of tensor parallelism"
            )

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._composed.forget()

    def _rounding(self, p: Tensor) -> str:
        """The rounding of the update of p, this rank's part, one of a recipe's."""
        if isinstance(p, ScaledTensor):
            return self.recipe.master_rounding
        return rounding_of(p, self.recipe.bf16_master)

    # The step

    def _read(self, items: list[Item]) -> tuple[list[Item], Tensor]:
        if not isinstance(self.recipe.exp_avg_sq, SubsetNorm):
            return super()._read(items)
        subsets = [self._subsets(item.parameter) for item in items]
        amaxes, sums = ops.subset_sums(locals_of([item.grad for item in items]), subsets)
        return [item._replace(sums=s) for item, s in zip(items, sums, strict=True)], amaxes

    def update(self, device: torch.device, items: list[Item], amaxes: Tensor) -> None:
        one_path = not (self.recipe.packed or self.recipe.composed)
        paths = [] if one_path else [self._path(item.parameter) for item in items]
        if any(paths):
            order = sorted(range(len(items)), key=paths.__getitem__)
            items, paths = [items[i] for i in order], sorted(paths)
            amaxes = torch.stack([amaxes[i] for i in order])
        params = [item.parameter for item in items]
        groups = {id(item.group): item.group for item in items}
        row_of = {key: _row(group) for key, group in groups.items()}
        table = self._hyper.on(device, params, [row_of[id(item.group)] for item in items])
        if not any(paths):
            return self._update_fused(items, amaxes, table, self._skipped[device])
        usable = amaxes.isfinite().all()
        amaxes = torch.where(usable, amaxes, torch.inf)
        fused, others = paths.count(0), paths.count(2)
        kept = len(items) - others
        skipped = torch.zeros_like(self._skipped[device])  # is counted once
        if fused:
            self._update_fused(items[:fused], amaxes[:fused], table[:fused], skipped)
        if kept > fused:
            part = items[fused:kept]
            how = [self._rounding(local(item.parameter)) for item in part]
            second = self.recipe.exp_avg_sq
            packed.step(part, second, amaxes[fused:kept], table[fused:kept], skipped, how)
        for item, row in zip(items[kept:], table[kept:], strict=True):
            self._composed.step(item, usable, row, self._rounding(local(item.parameter)))
        self._skipped[device] += ~usable

    def _update_fused(self, items: list[Item], amaxes: Tensor, hyper: Tensor,
                      skipped: Tensor) -> None:  # fmt: skip
        wholes = [item.parameter for item in items]
        params = locals_of(wholes)
        sharded = any_sharded(wholes)
        states = [item.state for item in items]
        firsts, seconds, steps = (locals_of([s[key] for s in states]) for key in (*EMAS, "step"))
        copies = [_fused_copies(p) for p in params]
        rounding = [self._rounding(p) for p in params]
        ops.adam_(
            params,
            firsts,
            seconds,
            locals_of([item.grad for item in items]),
            grad_amax=amaxes,
            steps=steps,
            hyper=hyper,
            skipped=skipped,
            scalings=[scaling(t) for t in (*params, *firsts, *seconds)],
            copies=[None if c is None else (c.q, c.qt, c.scale) for c in copies],
            remainders=locals_of(remainders_of(states)),
            seeds=[
                item.ordinal if how == "stochastic" else -1
                for item, how in zip(items, rounding, strict=True)
            ],
            first_elements=[placement.first_element(p) for p in wholes] if sharded else (),
            subsets=[self._subsets(p) for p in wholes] if self.recipe.composed else (),
            subset_sums=[item.sums for item in items] if self.recipe.composed else (),
        )
        if sharded:
            moments = [item.state[key] for item in items for key in EMAS]
            placement.whole_amaxes_([*wholes, *moments])
        torch.autograd.graph.increment_version(wholes)
        for p, c in zip(wholes, copies, strict=True):
            if c is not None:
                c.version = p._version
            elif isinstance(p, ScaledTensor):
                p.refresh_copies()  # compiled graphs read the copies, and check no version

    def write_hyper(self) -> None:
        """Brings the device's copy of the hyperparameters up to date, for a captured `step()`:
        no Python runs inside a graph's replay."""
        self._hyper.rewrite({p: _row(g) for g in self.param_groups for p in g["params"]})


def _row(group: dict) -> list[float]:
    return [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]]


def _fused_copies(p: Tensor):
    """Copies that adam_ can write: e4m3, unpadded, and up to date."""
    copies = p.__dict__.get("fp8_weight")
    if copies is None or not isinstance(p, ScaledTensor) or copies.q.shape != p.shape:
        return None
    if copies.q.dtype != torch.float8_e4m3fn:
        return None
    return copies if copies.version == p._version else None
