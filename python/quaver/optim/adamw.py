"""AdamW over plain and FP8 parameters: one call, one pass over each state, no host sync."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .. import ops, placement
from .. import recipe as recipes
from ..tensor import ScaledTensor, is_sharded, local
from .states import STATES, scaling

MASTERS = ("nearest", "stochastic", "remainder")

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with the states of a recipe (FP8-LM, arXiv 2310.18313; COAT, arXiv
    2410.19313).

    Converted weights (ScaledTensors) have their moments in the recipe's codecs and are themselves
    the master weight; their FP8 GEMM copies are written in the same pass. All other parameters
    (norms, biases, embeddings) keep f32 moments, unless the recipe has `plain_moments`, as "coat"
    does: a model needs no conversion for that. A bf16 parameter takes its update as the recipe's
    `bf16_master` says; the 16 bits of "remainder" are its state "master". A step with a non-finite
    gradient changes nothing and is counted in `skipped`. Of FSDP2's parameters each rank steps its
    shard, with the scales of the whole tensor: the codes of all shards are those of one process,
    and all ranks skip alike.

    A CUDA graph may capture `step()`: its number and hyperparameters are read on the device. After
    a change of hyperparameters call `write_hyper()` before the next replay.

    Args:
        params: parameters or groups, as torch's optimizers take them.
        lr: step size; weight_decay is decoupled.
        recipe: a name or a Recipe.

    Raises:
        ValueError: hyperparameters out of range, an unknown recipe or codec, a state dict that is
            not of this recipe and these parameters.
        RuntimeError: sparse gradients, gradients on another device than their parameter, parameters
            that changed their shape or dtype between steps.
    """

    def __init__(self, params, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 recipe="fp8lm-o2"):  # fmt: skip
        self.recipe = recipes.get(recipe)
        self._check_recipe()
        self._skipped: dict[torch.device, Tensor] = {}
        self._hyper: dict[torch.device, tuple[list, list, Tensor]] = {}
        self._dtypes: dict[Tensor, torch.dtype] = {}
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict:  # torch's has the groups and states only; for deepcopy
        mine = ("recipe", "_skipped", "_dtypes")
        return {**super().__getstate__(), **{k: getattr(self, k) for k in mine}, "_hyper": {}}

    def _check_recipe(self) -> None:
        for what in ("exp_avg", "exp_avg_sq"):
            name = getattr(self.recipe, what)
            if name not in STATES:
                raise ValueError(
                    f"AdamW: recipe {self.recipe.name}: unknown state codec {name!r} for {what}; "
                    f"there are {', '.join(STATES)}"
                )
        if self.recipe.bf16_master not in MASTERS:
            raise ValueError(
                f"AdamW: recipe {self.recipe.name}: bf16_master must be one of "
                f"{', '.join(MASTERS)}, got {self.recipe.bf16_master!r}"
            )

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, added: dict) -> None:
        lr, (beta1, beta2) = added["lr"], added["betas"]
        if not float(lr) >= 0:
            raise ValueError(f"AdamW: lr must be >= 0, got {lr}")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"AdamW: betas must be in [0, 1), got {added['betas']}")
        if not added["eps"] >= 0:
            raise ValueError(f"AdamW: eps must be >= 0, got {added['eps']}")
        if not added["weight_decay"] >= 0:
            raise ValueError(f"AdamW: weight_decay must be >= 0, got {added['weight_decay']}")
        for p in added["params"]:
            if p.dtype not in ops.FLOATS:
                raise ValueError(
                    f"AdamW: parameters must be float32, bfloat16 or float16, got {p.dtype}"
                )
            flat = [key for key, codec in self._codecs(p).items() if codec.layout.grain == "flat"]
            if flat and is_sharded(p):
                raise ValueError(
                    f"AdamW: recipe {self.recipe.name} keeps {flat[0]} in groups of flat elements, "
                    "which FSDP2's shards would cut; wanted f32 or one scale a tensor"
                )

    @property
    def skipped(self) -> int:
        """Steps skipped because a gradient was not finite. Reading it waits for the device."""
        return sum(int(count) for count in self._skipped.values())

    # States

    def _codecs(self, p: Tensor) -> dict:
        low = isinstance(local(p), ScaledTensor) or self.recipe.plain_moments
        names = (self.recipe.exp_avg, self.recipe.exp_avg_sq) if low else ("f32", "f32")
        return dict(zip(("exp_avg", "exp_avg_sq"), (STATES[n] for n in names), strict=True))

    def _has_remainder(self, p: Tensor) -> bool:
        plain = p.dtype == torch.bfloat16 and not isinstance(local(p), ScaledTensor)
        return plain and self.recipe.bf16_master == "remainder"

    def _state(self, p: Tensor) -> dict:
        state = self.state[p]
        if not state:
            part = local(p)
            state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
            for key, codec in self._codecs(p).items():
                state[key] = placement.like(p, codec.zeros(part))
            if self._has_remainder(p):
                state["master"] = torch.zeros(p.shape, dtype=torch.int16, device=p.device)
        if self._dtypes.setdefault(p, p.dtype) != p.dtype:
            raise RuntimeError(
                f"AdamW: a parameter of shape {list(p.shape)} changed from {self._dtypes[p]} to "
                f"{p.dtype} between steps"
            )
        if state["exp_avg"].shape != p.shape:
            raise RuntimeError(
                f"AdamW: a parameter changed from shape {list(state['exp_avg'].shape)} to "
                f"{list(p.shape)} between steps"
            )
        return state

    # The step

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_device: dict[torch.device, list] = {}
        ordinals = self._ordinals()
        for group in self.param_groups:
            hyper = self._hyper_of(group)
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError("AdamW: sparse gradients are not supported")
                if grad.device != p.device:
                    raise RuntimeError(
                        f"AdamW: a gradient on {grad.device} for a parameter on {p.device}"
                    )
                by_device.setdefault(p.device, []).append((p, hyper, self._state(p), ordinals[p]))
        for device, items in by_device.items():
            self._step_device(device, items)
        return loss

    def _step_device(self, device: torch.device, items: list) -> None:
        wholes, hyper, states, ordinals = (list(column) for column in zip(*items, strict=True))
        sharded = any(is_sharded(p) for p in wholes)
        params, grads = wholes, [p.grad for p in wholes]
        if sharded:
            params, grads = ([local(t) for t in column] for column in (params, grads))
            states = [{k: local(v) for k, v in s.items()} for s in states]
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        grad_amax = placement.agree(self._amax(grads), wholes)
        copies = [self._fused_copies(p) for p in params]
        firsts, seconds = ([s[key] for s in states] for key in MOMENTS)
        ops.adam_(
            params,
            firsts,
            seconds,
            grads,
            grad_amax=grad_amax,
            steps=[s["step"] for s in states],
            hyper=self._hyper_on(device, wholes, hyper),
            skipped=self._skipped[device],
            scalings=[scaling(t) for t in (*params, *firsts, *seconds)],
            copies=[None if c is None else (c.row, c.col, c.scale) for c in copies],
            remainders=self._remainders(params, states),
            seeds=self._seeds(params, ordinals),
            first_elements=[placement.first_element(p) for p in wholes] if sharded else (),
        )
        if sharded:
            moments = [self.state[p][key] for p in wholes for key in MOMENTS]
            placement.whole_amaxes_([*wholes, *moments])
        torch.autograd.graph.increment_version(wholes)
        for p, c in zip(wholes, copies, strict=True):
            if c is not None:
                c.version = p._version
            elif isinstance(p, ScaledTensor):
                p.refresh_copies()  # a compiled graph would not find out

    def _remainders(self, params: list[Tensor], states: list[dict]) -> list[Tensor | None]:
        # By the rule and not by the key: other optimizers keep another "master" in these states.
        kept = [self._has_remainder(p) for p in params]
        if not any(kept):
            return []
        return [s["master"] if k else None for s, k in zip(states, kept, strict=True)]

    def _ordinals(self) -> dict[Tensor, int]:
        """Each parameter's index over all groups, from 1, which seeds its stochastic rounding."""
        params = [p for group in self.param_groups for p in group["params"]]
        return {p: i for i, p in enumerate(params, 1)}

    def _seeds(self, params: list[Tensor], ordinals: list[int]) -> list[int]:
        """The Philox seed of each weight that rounds stochastically, -1 for the others."""
        return [
            n if self._rounding(p) == "stochastic" else -1
            for p, n in zip(params, ordinals, strict=True)
        ]

    def _rounding(self, p: Tensor) -> str:
        if isinstance(p, ScaledTensor):
            return self.recipe.master_rounding
        return "nearest" if p.dtype == torch.float32 else self.recipe.bf16_master

    # Hyperparameters live on the device and are written when they change.

    @staticmethod
    def _hyper_of(group: dict) -> list[float]:
        return [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]]

    def _hyper_on(self, device: torch.device, params: list[Tensor], rows: list) -> Tensor:
        kept = self._hyper.get(device)
        if kept is not None and len(kept[1]) == len(rows):
            if kept[1] != rows:
                kept[2].copy_(torch.tensor(rows, dtype=torch.float64))
            self._hyper[device] = (params, rows, kept[2])
            return kept[2]
        table = torch.tensor(rows, dtype=torch.float64).to(device)
        self._hyper[device] = (params, rows, table)
        return table

    def write_hyper(self) -> None:
        """Brings the device's copy of the hyperparameters up to date, for a captured `step()`:
        inside a graph's replay there is no Python that could."""
        row_of = {p: self._hyper_of(group) for group in self.param_groups for p in group["params"]}
        for device, (params, _, _) in list(self._hyper.items()):
            self._hyper_on(device, params, [row_of[p] for p in params])

    @staticmethod
    def _amax(grads: list[Tensor]) -> Tensor:
        """Each gradient's amax, float32 [n]. FP8 gradients carry theirs; plain ones are read."""
        carried = [g.amax if isinstance(g, ScaledTensor) else None for g in grads]
        plain = [g for g, amax in zip(grads, carried, strict=True) if amax is None]
        if len(plain) == len(grads):
            return ops.grad_norm(plain)[1]
        computed = iter(ops.grad_norm(plain)[1].unbind() if plain else ())
        return torch.stack([next(computed) if amax is None else amax for amax in carried])

    @staticmethod
    def _fused_copies(p: Tensor):
        """The FP8 copies that the step can write itself: e4m3 of a master, without padding, and in
        step with it."""
        copies = p.__dict__.get("fp8_weight")
        if copies is None or not isinstance(p, ScaledTensor) or copies.row.shape != p.shape:
            return None
        if copies.row.dtype != torch.float8_e4m3fn:
            return None
        return copies if copies.version == p._version else None

    # State dicts

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but a state keeps the dtype and codes it was saved with. Raises ValueError,
        and changes nothing, where a state is not one of this recipe for its parameter."""
        saved = state_dict["state"]
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        if len(ids) == len(params):  # else torch says what is wrong
            for i, p in zip(ids, params, strict=True):
                if saved.get(i):
                    self._check_saved(i, saved[i], p)
        super().load_state_dict(state_dict)
        self._dtypes.clear()
        for i, p in zip(ids, params, strict=True):
            if i not in saved:
                continue
            self.state[p] = {
                k: copy.deepcopy(v).to(p.device) if isinstance(v, Tensor) else copy.deepcopy(v)
                for k, v in saved[i].items()
            }

    def _check_saved(self, i: int, state: dict, p: Tensor) -> None:
        def refuse(what: str) -> None:
            raise ValueError(f"AdamW: the state of parameter {i} {what}")

        remainder = {"master"} if self._has_remainder(p) else set()
        wanted = {"step", "exp_avg", "exp_avg_sq"} | remainder
        if set(state) != wanted:
            refuse(f"has {', '.join(sorted(state))}; wanted {', '.join(sorted(wanted))}")
        step = state["step"]
        if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim():
            refuse(f"counts its steps in {type(step).__name__}, wanted one int64 tensor")
        for key, codec in self._codecs(p).items():
            if not codec.fits(state[key], p):
                name = getattr(self.recipe, key) if not codec.plain else "f32"
                refuse(
                    f"has {key} {_describe(state[key])}; recipe {self.recipe.name} keeps it as "
                    f"{name} of shape {list(p.shape)}"
                )
        low = state.get("master")
        if low is not None and (low.dtype != torch.int16 or low.shape != p.shape):
            refuse(f"has master {_describe(low)}; wanted int16 of shape {list(p.shape)}")


def _describe(state: object) -> str:
    if not isinstance(state, Tensor):
        return f"a {type(state).__name__}"
    kind = state.qlayout if isinstance(state, ScaledTensor) else state.dtype
    return f"{kind} of shape {list(state.shape)}"
