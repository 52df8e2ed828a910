"""MicroAdam: Adam over the largest elements of the last gradients, the rest fed back in 4 bits."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import ops
from ..placement import shard_of
from ..recipe import Recipe
from ..tensor import ScaledTensor, is_sharded
from .base import Item, Optimizer
from .hyper import HyperTable
from .moments import Part, Remainder, remainder_slot, remainders_of, rounding_of

TOP_BLOCK = 4096  # kTopBlock of microadam.h: flat elements among which the largest are kept
ERROR_UNIT = 16  # kErrorUnit
MOST_ERROR_BLOCK = 2**30
RECIPE = Recipe("micro-adam", autocast=None, bf16_master="stochastic")
STORAGE = ("density", "window", "error_block")


def kept_of(numel: int, density: float) -> tuple[int, int]:
    """How many values a whole block of a tensor keeps (0 where there is none), and a row of the
    ring: at least one of each block."""
    whole, rest = divmod(numel, TOP_BLOCK)
    kept = math.ceil(TOP_BLOCK * density) if whole else 0
    return kept, whole * kept + math.ceil(rest * density)


class MicroAdam(Optimizer):
    """Adam over a window of sparse gradients (MicroAdam, arXiv 2405.15593, algorithm 1).

        a = g + (1 - alpha) error
        keep the `density` largest |a| of each block of 4096 flat elements, for `window` steps
        error = what is left of a, in 4 bits
        p <- (1 - lr weight_decay) p - lr (c1 z1 / (sqrt(c2 z2) + eps) + alpha error)

    z1 and z2 are sums of beta1^age value and beta2^age value^2 over the steps kept, and
    c_i = (1 - beta_i) / (1 - beta_i^t). With density 1 the first `window` steps are AdamW's. After
    them the window cuts the sums, z2's by far more: under a steady gradient the step is 3.75 times
    AdamW's at t = 400 and the default betas. lr is to be tuned for MicroAdam itself.

    A parameter's state is `index` int16 and `value` bfloat16 [window, kept], `error` uint8 (two
    codes a byte) and `error_range` bfloat16 [error blocks, 2]: 0.96 bytes a parameter by default,
    0.90 with error_block=100_000. What rounding a kept value to bfloat16 takes off stays in the
    error, which the paper drops; `.grad` is not changed. A step with a non-finite gradient changes
    nothing and is counted in `skipped`. A CUDA graph may capture `step()`: after a change of
    hyperparameters call `write_hyper()` before the next replay.

    Under `distributed.ddp` the mean gradient is compressed, alike on all ranks. States in blocks of
    flat elements would be cut by FSDP2 and tensor parallelism, which are refused.

    Args:
        params: float32, bfloat16 or float16 parameters or groups, as torch's optimizers take them.
        lr: step size, >= 0; a float or a tensor of one element.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: >= 0, decoupled.
        density: the share of elements kept of each gradient, in (0, 1]; at least one of a block.
        window: gradients kept, >= 1.
        error_block: flat elements whose errors share a range: a power of two from 16 to 4096, or a
            larger multiple of 16 up to 2^30.
        alpha: the share of the error that the update applies at once, in [0, 1).
        bf16_master: the rounding of bfloat16 and float16 parameters, as Recipe's: "stochastic",
            "nearest", "remainder" (2 more bytes, an exact float32 master of a bfloat16 one) or
            "remainder8" (1 more byte, a master of 24 bits).

    Raises:
        ValueError: options out of range, a parameter of another dtype, one that is sharded or whose
            storage has scales, a state dict that is not of these options and parameters.
        RuntimeError: as AdamW's `step`.
    """

    name = "MicroAdam"

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *,
                 density: float = 0.01, window: int = 10, error_block: int = 64,
                 alpha: float = 0.0, bf16_master: str = "stochastic"):  # fmt: skip
        _check_storage(density, window, error_block)
        self.density, self.window, self.error_block = float(density), window, error_block
        self._hyper = HyperTable()
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                    "alpha": alpha}  # fmt: skip
        super().__init__(params, defaults, dataclasses.replace(RECIPE, bf16_master=bf16_master))

    def __getstate__(self) -> dict:
        kept = {key: getattr(self, key) for key in STORAGE}
        return {**super().__getstate__(), **kept, "_hyper": HyperTable()}

    def check_options(self, group: dict) -> None:
        own = [key for key in STORAGE if key in group]
        if own:
            raise ValueError(
                f"MicroAdam: {own[0]} is one for all groups; give it to the optimizer, or build "
                "one for each group"
            )
        beta1, beta2 = group["betas"]
        if not float(group["lr"]) >= 0:
            raise ValueError(f"MicroAdam: lr must be >= 0, got {group['lr']}")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"MicroAdam: betas must be in [0, 1), got {group['betas']}")
        for key in ("eps", "weight_decay"):
            if not group[key] >= 0:
                raise ValueError(f"MicroAdam: {key} must be >= 0, got {group[key]}")
        if not 0 <= group["alpha"] < 1:
            raise ValueError(f"MicroAdam: alpha must be in [0, 1), got {group['alpha']}")

    def _check_parameter(self, p: Tensor) -> None:
        if is_sharded(p) or shard_of(p) is not None:
            raise ValueError(
                "MicroAdam: wanted whole parameters, got a shard of FSDP2 or tensor parallelism, "
                "which cuts blocks of flat elements; use distributed.ddp, or AdamW"
            )
        if isinstance(p, ScaledTensor):
            raise ValueError(
                f"MicroAdam: wanted plain parameters, got one stored as {p.qlayout}; convert the "
                "model by a recipe whose weights stay plain, as \"coat\", or use AdamW"
            )  # fmt: skip
        super()._check_parameter(p)

    def describe(self) -> str:
        return (
            f"micro-adam (density {self.density}, window {self.window}, error_block "
            f"{self.error_block}, bf16_master {self.recipe.bf16_master})"
        )

    def slots(self, p: Tensor) -> dict[str, Part | Remainder]:
        n = p.numel()
        ring = (self.window, kept_of(n, self.density)[1])
        slots = {
            "index": Part(torch.int16, ring),
            "value": Part(torch.bfloat16, ring),
            "error": Part(torch.uint8, ((n + 1) // 2,)),
            "error_range": Part(torch.bfloat16, (-(-n // self.error_block), 2)),
        }
        return slots | remainder_slot(self._rounding(p))

    def _rounding(self, p: Tensor) -> str:
        """The rounding of p's update, one of a recipe's."""
        return rounding_of(p, self.recipe.bf16_master)

    def update(self, device: torch.device, items: list[Item], amaxes: Tensor) -> None:
        params, states = [i.parameter for i in items], [i.state for i in items]
        rounding = [self._rounding(p) for p in params]
        ops.micro_adam_(
            params,
            *([s[key] for s in states] for key in ("index", "value", "error", "error_range")),
            [item.grad for item in items],
            grad_amax=amaxes,
            steps=[s["step"] for s in states],
            hyper=self._hyper.on(device, params, [_row(item.group) for item in items]),
            skipped=self._skipped[device],
            kept=[kept_of(p.numel(), self.density)[0] for p in params],
            error_blocks=[self.error_block] * len(items),
            remainders=remainders_of(states),
            seeds=[
                item.ordinal if how == "stochastic" else -1
                for item, how in zip(items, rounding, strict=True)
            ],
        )
        torch.autograd.graph.increment_version(params)

    def write_hyper(self) -> None:
        """Brings the device's copy of the hyperparameters up to date, for a captured `step()`:
        no Python runs inside a graph's replay."""
        self._hyper.rewrite({p: _row(g) for g in self.param_groups for p in g["params"]})


def _row(group: dict) -> list[float]:
    return [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"],
            group["alpha"]]  # fmt: skip


def _check_storage(density: float, window: int, error_block: int) -> None:
    if isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"MicroAdam: density must be in (0, 1], got {density}")
    if type(window) is not int or window < 1:
        raise ValueError(f"MicroAdam: window must be an int >= 1, got {window!r}")
    whole = type(error_block) is int and error_block % ERROR_UNIT == 0
    if not (
        whole
        and ERROR_UNIT <= error_block <= MOST_ERROR_BLOCK
        and (TOP_BLOCK % error_block == 0 or error_block > TOP_BLOCK)
    ):
        raise ValueError(
            f"MicroAdam: error_block must be a power of two from {ERROR_UNIT} to {TOP_BLOCK}, or "
            f"a larger multiple of {ERROR_UNIT} up to {MOST_ERROR_BLOCK}, got {error_block!r}"
        )
