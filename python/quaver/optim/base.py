"""The base of all optimizers: it collects gradients, skips steps and checks states."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, placement
from .. import recipe as recipes
from ..recipe import Recipe
from ..rows import Rows
from ..tensor import ScaledTensor, is_sharded, local, locals_of
from .moments import Ema
from .parts import joined, parted


class Item(NamedTuple):
    """A parameter that a step updates, with its gradient and state. `ordinal` is its index over all
    groups, from 1, and seeds its stochastic rounding. `sums` are the squares of its gradient summed
    over each subset, where the optimizer keeps second moments of subsets."""

    parameter: Tensor
    grad: Tensor
    state: dict
    group: dict
    ordinal: int
    sums: Tensor | None = None


class Optimizer(torch.optim.Optimizer):
    """Updates all parameters that have a gradient, or none where a gradient is not finite.

    Under FSDP2 each rank steps its shards, and all ranks skip the same steps. A subclass gives
    `check_options`, `slots`, `update` and `describe`.

    Args:
        params: parameters or groups, as torch's optimizers take them.
        defaults: options of groups that do not give their own.
        recipe: a name or a Recipe.

    Raises:
        ValueError: options that `check_options` refuses, a parameter that is not float32, bfloat16
            or float16, an unknown recipe, a shard of FSDP's that would cut the blocks of a state.
    """

    name: str  # of the optimizer, in errors
    takes_rows = False  # whether a gradient may be Rows

    def __init__(self, params, defaults: dict, recipe: str | Recipe):
        self.recipe = recipes.get(recipe)
        self._skipped: dict[torch.device, Tensor] = {}
        self._seen: dict[Tensor, tuple[torch.dtype, torch.Size]] = {}
        self._places: dict[Tensor, tuple[dict, int]] | None = None  # see step_parameter
        super().__init__(params, defaults)

    def __getstate__(self) -> dict:  # torch's has the groups and states only; for deepcopy
        mine = ("recipe", "_skipped", "_seen")
        kept = {k: getattr(self, k) for k in mine}
        return {**super().__getstate__(), **kept, "_places": None}

    def check_options(self, group: dict) -> None:
        """Raises ValueError, naming the option, where one of a group's is out of range."""
        raise NotImplementedError

    def slots(self, p: Tensor) -> dict:
        """The slots of p's state beside its step: {key: object of moments.py}."""
        raise NotImplementedError

    def update(self, device: torch.device, items: list[Item], amaxes: Tensor) -> None:
        """Steps the items, all on `device`. Where any of `amaxes` (float32 [n], of the gradients,
        alike on all ranks) is not finite it changes nothing and counts in `_skipped[device]`."""
        raise NotImplementedError

    def describe(self) -> str:
        """The options that decide how states are stored: optimizers with equal ones can load each
        other's states from checkpoints."""
        raise NotImplementedError

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        self.forget_places()
        added = self.param_groups[-1]
        try:
            self.check_options(added)
            for p in added["params"]:
                self._check_parameter(p)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_parameter(self, p: Tensor) -> None:
        if p.dtype not in ops.FLOATS:
            raise ValueError(
                f"{self.name}: parameters must be float32, bfloat16 or float16, got {p.dtype}"
            )
        flat = [(key, slot) for key, slot in self.slots(p).items() if slot.is_flat]
        if flat and is_sharded(p):
            raise ValueError(
                f"{self._kept(*flat[0])}, which FSDP2's shards would cut; wanted f32, or one scale "
                'a tensor (a Recipe with exp_avg="e4m3-tensor", exp_avg_sq="f16-tensor" and '
                "plain_moments=True)"
            )
        if getattr(p, "_fsdp_flattened", False):
            scaled = [i for i in self.slots(p).items() if isinstance(i[1], Ema) and i[1].is_scaled]
            if flat or scaled:
                raise ValueError(
                    f"{self._kept(*(flat or scaled)[0])}, which FSDP1's flat parameters would cut; "
                    "use FSDP2 (quaver.distributed.fully_shard), or a recipe with f32 states"
                )

    def _kept(self, key: str, slot: object) -> str:
        grouped = isinstance(slot, Ema) and slot.is_flat
        how = "in groups of flat elements" if grouped else f"as {slot}"
        return f"{self.name}: recipe {self.recipe.name} keeps {key} {how}"

    @property
    def skipped(self) -> int:
        """Steps skipped because a gradient was not finite. Reading it waits for the device."""
        return sum(int(count) for count in self._skipped.values())

    # The step

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient; returns the closure's loss.

        Raises:
            RuntimeError: sparse gradients, gradients on another device than their parameter,
                parameters that changed their shape or dtype between steps. Nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_device: dict[torch.device, list[Item]] = {}
        for item in self._collect():
            by_device.setdefault(item.parameter.device, []).append(item)
        for device, items in by_device.items():
            self._update_or_skip(device, items)
        return loss

    @torch.no_grad()
    def step_parameter(self, p: Tensor, usable: Tensor | None = None) -> None:
        """Steps p alone by its gradient, as `step` does, for release_gradients. Where the gradient
        is not finite, or `usable` (bool, 0-D, on its device) is false, nothing changes and
        `skipped` counts up.

        Raises:
            KeyError: p is none of the optimizer's parameters.
            RuntimeError: as `step`.
        """
        if self._places is None:
            ordinals = self._ordinals()
            pairs = [(q, g) for g in self.param_groups for q in g["params"]]
            self._places = {q: (g, ordinals[q]) for q, g in pairs}
        group, ordinal = self._places[p]
        self._update_or_skip(p.device, [self._item(p, group, ordinal)], usable)

    def forget_places(self) -> None:
        """Lets `step_parameter` look for the parameters' groups anew, after groups have changed."""
        self._places = None

    def _update_or_skip(self, device: torch.device, items: list[Item],
                        usable: Tensor | None = None) -> None:  # fmt: skip
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        items, amaxes = self._read(items)
        amaxes = placement.agree(amaxes, [item.parameter for item in items])
        if usable is not None:
            amaxes = torch.where(usable, amaxes, torch.inf)
        self.update(device, items, amaxes)

    def _collect(self) -> list[Item]:
        ordinals = self._ordinals()
        pairs = ((p, group) for group in self.param_groups for p in group["params"])
        return [self._item(p, g, ordinals[p]) for p, g in pairs if p.grad is not None]

    def _item(self, p: Tensor, group: dict, ordinal: int) -> Item:
        grad = p.grad
        if grad.is_sparse:
            raise RuntimeError(f"{self.name}: sparse gradients are not supported")
        if isinstance(grad, Rows) and not self.takes_rows:
            raise RuntimeError(
                f"{self.name}: a gradient has the rows that a Grass chose; call that optimizer's "
                "remove() before another takes its parameters"
            )
        if grad.device != p.device:
            raise RuntimeError(
                f"{self.name}: a gradient on {grad.device} for a parameter on {p.device}"
            )
        return Item(p, grad, self.state_of(p), group, ordinal)

    def _ordinals(self) -> dict[Tensor, int]:
        params = [p for group in self.param_groups for p in group["params"]]
        return {p: i for i, p in enumerate(params, 1)}

    def _read(self, items: list[Item]) -> tuple[list[Item], Tensor]:
        """The items with what one read of their gradients finds, and the gradients' amaxes."""
        return items, ops.amaxes(locals_of([item.grad for item in items]))

    # States

    def state_of(self, p: Tensor) -> dict:
        """p's state, made where there is none. Raises RuntimeError where p has changed its shape
        or dtype since."""
        state = self.state[p]
        if not state:
            self._check_parameter(p)  # it may have become a shard since it was added
            state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
            for key, slot in self.slots(p).items():
                state[key] = placement.like(p, slot.zeros(local(p)))
        now = p.dtype, p.shape
        seen = self._seen.setdefault(p, now)
        if seen != now:
            dtype, shape = seen
            raise RuntimeError(
                f"{self.name}: a parameter changed from {dtype} {list(shape)} to {p.dtype} "
                f"{list(p.shape)} between steps; build the optimizer anew"
            )
        return state

    def state_dict(self) -> dict:
        """torch's, except that an FP8 state of a shard is its parts: "exp_avg.qdata" (bytes),
        "exp_avg.scale" and "exp_avg.amax". What gathers shards, as torch.distributed.checkpoint
        and its clients do, would decode it otherwise, and the codes would be lost."""
        found = super().state_dict()
        return {**found, "state": {i: parted(s) for i, s in found["state"].items()}}

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads as torch does, except that states keep the dtype and codes they were saved with.
        Raises ValueError, and changes nothing, where a state does not fit recipe and parameter."""
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        slots = {i: self.slots(p) for i, p in zip(ids, params, strict=False)}
        saved = {i: joined(s, slots.get(i, {})) for i, s in state_dict["state"].items()}
        state_dict = {**state_dict, "state": saved}
        if len(ids) == len(params):  # else torch raises the error
            for i, p in zip(ids, params, strict=True):
                if saved.get(i):
                    self._check_saved(i, saved[i], p)
        super().load_state_dict(state_dict)
        self.forget_places()
        self._seen.clear()
        for i, p in zip(ids, params, strict=True):
            if i not in saved:
                continue
            self.state[p] = {
                k: copy.deepcopy(v).to(p.device) if isinstance(v, Tensor) else copy.deepcopy(v)
                for k, v in saved[i].items()
            }

    def _check_saved(self, i: int, state: dict, p: Tensor) -> None:
        def refuse(what: str, remedy: str = "") -> None:
            raise ValueError(
                f"{self.name}: the state of parameter {i} {what}"
                + (remedy or "; load it into an optimizer of the recipe that saved it, or start "
                             "without a state")
            )  # fmt: skip

        step = state.get("step")
        if isinstance(step, Tensor) and step.is_floating_point():
            refuse(
                "counts its steps in float32, as torch.optim's optimizers do; wanted one int64 "
                "tensor",
                f"; go on with torch's optimizer, or start {self.name} without a state",
            )
        slots = self.slots(p)
        wanted = {"step", *slots}
        if set(state) != wanted:
            refuse(f"has {', '.join(sorted(state))}; wanted {', '.join(sorted(wanted))}")
        if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim():
            refuse(f"counts its steps in {_describe(step)}; wanted one int64 tensor")
        if not step.is_meta and not 0 <= step.item() < torch.iinfo(torch.int64).max:
            refuse(f"has taken {step.item()} steps; wanted 0 or more")
        for key, slot in slots.items():
            value = state[key]
            if is_sharded(p) and isinstance(value, Tensor) and not is_sharded(value):
                refuse(f"has a whole {key}, its parameter is a shard",
                       "; load it by torch.distributed.checkpoint.state_dict")  # fmt: skip
            if not slot.fits(value, p):
                refuse(f"has {key} {_describe(value)}; recipe {self.recipe.name} keeps it as "
                       f"{slot} of shape {list(p.shape)}")  # fmt: skip


def _describe(state: object) -> str:
    if not isinstance(state, Tensor):
        return f"a {type(state).__name__}"
    kind = state.qlayout if isinstance(state, ScaledTensor) else state.dtype
    return f"{kind} of shape {list(state.shape)}"
