"""AdamW over plain and FP8 parameters: one call, one pass over each state, no host sync."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .. import ops
from .. import recipe as recipes
from ..distributed import sharding
from ..tensor import ScaledTensor, is_sharded, local
from .states import STATES

MOMENTS = ("exp_avg", "exp_avg_sq")


def _shards():
    from ..distributed import shards  # not before torch.distributed is in use

    return shards


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with the states of a recipe (FP8-LM, arXiv 2310.18313).

    Converted weights (ScaledTensors) have their moments in the recipe's codecs and are themselves
    the master weight; their FP8 GEMM copies are written in the same pass. All other parameters
    (norms, biases, embeddings) keep f32 moments. A step with a non-finite gradient changes nothing
    and is counted in `skipped`. Of FSDP2's parameters each rank steps its shard, with the scales of
    the whole tensor: the codes of all shards are those of one process, and all ranks skip alike.

    Args:
        params: parameters or groups, as torch's optimizers take them.
        lr: step size; weight_decay is decoupled.
        recipe: a name or a Recipe.

    Raises:
        ValueError: hyperparameters out of range, an unknown recipe.
        RuntimeError: sparse gradients, gradients on another device than their parameter.
    """

    def __init__(self, params, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 recipe="fp8lm-o2"):  # fmt: skip
        self.recipe = recipes.get(recipe)
        self._skipped: dict[torch.device, Tensor] = {}
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict:  # torch's has the groups and states only; for deepcopy
        return {**super().__getstate__(), "recipe": self.recipe, "_skipped": self._skipped}

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @staticmethod
    def _check(added: dict) -> None:
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
            if p.dtype not in ops.FLOATS or (
                p.dtype == torch.float16 and not isinstance(local(p), ScaledTensor)
            ):
                raise ValueError(
                    f"AdamW: parameters must be float32, bfloat16 or converted, got {p.dtype}"
                )

    @property
    def skipped(self) -> int:
        """Steps skipped because a gradient was not finite. Reading it waits for the device."""
        return sum(int(count) for count in self._skipped.values())

    def _state(self, p: Tensor) -> dict:
        state = self.state[p]
        if not state:
            part = local(p)
            low = isinstance(part, ScaledTensor)
            state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
            for key in MOMENTS:
                zeros = STATES[getattr(self.recipe, key) if low else "f32"](part)
                state[key] = _shards().like(p, zeros) if is_sharded(p) else zeros
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_device: dict[torch.device, list] = {}
        for group in self.param_groups:
            hyper = [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("AdamW: sparse gradients are not supported")
                if p.grad.device != p.device:
                    raise RuntimeError(
                        f"AdamW: a gradient on {p.grad.device} for a parameter on {p.device}"
                    )
                by_device.setdefault(p.device, []).append((p, hyper))
        for device, items in by_device.items():
            self._step_device(device, items)
        return loss

    def _step_device(self, device: torch.device, items: list) -> None:
        wholes = [p for p, _ in items]
        sharded = any(is_sharded(p) for p in wholes)
        params = [local(p) for p in wholes]
        grads = [local(p.grad) for p in wholes]
        states = [{k: local(v) for k, v in self._state(p).items()} for p in wholes]
        hyper = torch.tensor([h for _, h in items], dtype=torch.float64).to(device)
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        grad_amax = sharding.agree_to_skip(self._amax(grads), params)
        if sharded:
            _shards().share_max_(grad_amax, wholes)
        grad_values, grad_scales, _ = ops.parts(grads)
        copies = [self._fused_copies(p) for p in params]
        none = grad_amax.new_empty(0)
        torch.ops.quaver.adam_(
            *ops.parts(params),
            *ops.parts([s["exp_avg"] for s in states]),
            *ops.parts([s["exp_avg_sq"] for s in states]),
            grad_values,
            grad_scales,
            grad_amax,
            [none if c is None else c.row for c in copies],
            [none if c is None else c.col for c in copies],
            [none if c is None else c.scale for c in copies],
            [s["step"] for s in states],
            hyper,
            self._skipped[device],
        )
        if sharded:
            moments = [self.state[p][key] for p in wholes for key in MOMENTS]
            _shards().share_amaxes_([*wholes, *moments])
        for p, c in zip(wholes, copies, strict=True):
            torch.autograd.graph.increment_version(p)
            if c is not None:
                c.version = p._version
            elif isinstance(p, ScaledTensor):
                p.refresh_copies()  # a compiled graph would not find out

    @staticmethod
    def _amax(grads: list[Tensor]) -> Tensor:
        """Each gradient's amax, float32 [n]. FP8 gradients carry theirs; plain ones are read."""
        carried = [g.amax if isinstance(g, ScaledTensor) else None for g in grads]
        plain = [g for g, amax in zip(grads, carried, strict=True) if amax is None]
        computed = iter(ops.grad_norm(plain)[1].unbind() if plain else ())
        return torch.stack([next(computed) if amax is None else amax for amax in carried])

    @staticmethod
    def _fused_copies(p: Tensor):
        """The FP8 copies that the step can write itself: e4m3 of a master, without padding, and in
        step with it."""
        copies = p.__dict__.get("fp8_weight")
        if copies is None or not isinstance(p, ScaledTensor) or copies.row.shape != p.shape:
            return None
        if copies.row.dtype != torch.float8_e4m3fn or copies.channels is not None:
            return None
        return copies if copies.version == p._version else None

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but a state keeps the dtype and codes it was saved with."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(ids, params, strict=True):
            if i not in saved:
                continue
            self.state[p] = {
                k: copy.deepcopy(v).to(p.device) if isinstance(v, Tensor) else copy.deepcopy(v)
                for k, v in saved[i].items()
            }
