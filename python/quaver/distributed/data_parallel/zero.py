"""ZeRO over whole tensors (FP8-LM, arXiv 2310.18313, section 2.3, Algorithm 1).

A tensor's master, moments and scales belong to one rank, which alone updates them; a gather after
the step brings every rank the new weights. Under a recipe with an FP8 replica (`fp8lm-o3`) a model
holds a converted weight as e4m3 codes with a scale, and only its owner keeps the f16 master.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import ops, placement
from ... import recipe as recipes
from ...comm.transport import Transport, compare
from ...grad import clip_grad_norm_
from ...nn.weight import GemmWeight
from ...optim import AdamW
from ...tensor import ScaledTensor
from ..replicas import broadcast_values, describe

__all__ = ["ZeroAdamW", "zero_partition"]

ALIGNMENT = 16  # bytes, of every tensor in the gathered weights


def zero_partition(sizes: Iterable[int], world_size: int) -> list[int]:
    """The owner of each tensor: in order of size, descending, each goes to the rank with the least
    so far (Algorithm 1). Ties go to the earlier tensor and the lower rank, so every rank finds the
    same. Raises ValueError for a negative size or a world below 1."""
    sizes = list(sizes)
    if world_size < 1:
        raise ValueError(f"zero_partition: world_size must be positive, got {world_size}")
    if min(sizes, default=0) < 0:
        raise ValueError(f"zero_partition: sizes must not be negative, got {min(sizes)}")
    loads = [(0, rank) for rank in range(world_size)]
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, rank = loads[0]
        owners[i] = rank
        heapq.heapreplace(loads, (load + sizes[i], rank))
    return owners


class _Owned(AdamW):
    """AdamW over the tensors of this rank. All ranks decide together whether a step is skipped, so
    the gradients' amaxes come from outside."""

    amaxes: Tensor
    ordinals: dict[Tensor, int]  # of all ranks' tensors: they round as those of one process

    def _read(self, items):
        return super()._read(items)[0], self.amaxes

    def _ordinals(self):
        return self.ordinals


class ZeroAdamW(torch.optim.Optimizer):
    """qv.AdamW with its states and masters spread over ranks. Collective: all ranks build it with
    the same parameters and then hold rank 0's values, and all call `step`.

        optimizer = qv.distributed.ZeroAdamW(model.parameters(), lr=3e-4, recipe="fp8lm-o3")
        parallel = qv.distributed.ddp(model, optimizer=optimizer)
        ...
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    `param_groups` hold the model's parameters; `state` has what this rank owns, the f16 "master" of
    an FP8 weight included. Weights are loaded before it is built, or with qv.distributed.load.

    Args:
        params, lr, betas, eps, weight_decay, recipe: as qv.AdamW; all parameters on one device.
        stage: 1 leaves whole gradients on every rank, 2 lets `ddp` leave each on its owner.
        group: default the default group; without one, a world of one.

    Raises:
        ValueError: as qv.AdamW; another stage, several devices, ranks that disagree on parameters.
        RankFailure: a rank that is gone.
    """

    def __init__(self, params, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 recipe="fp8lm-o3", *, stage: int = 2,
                 group: dist.ProcessGroup | None = None):  # fmt: skip
        if stage not in (1, 2):
            raise ValueError(f"ZeroAdamW: stage must be 1 or 2, got {stage}")
        self.recipe = recipes.get(recipe)
        self.stage = stage
        self.transport = Transport(group)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        parameters = [p for g in self.param_groups for p in g["params"]]
        device = parameters[0].device
        for i, p in enumerate(parameters):
            if p.device != device:
                raise ValueError(
                    f"ZeroAdamW: parameters must be on one device: 0 is on {device}, {i} on "
                    f"{p.device}"
                )
        mine = {"options": f"stage {stage}, {self.recipe}"}
        mine |= describe({str(i): p for i, p in enumerate(parameters)})
        compare("ZeroAdamW", self.transport.all_gather_object(mine, device))
        broadcast_values(parameters, self.transport)
        sizes = [self._size(p) for p in parameters]
        self.owners = dict(zip(parameters, zero_partition(sizes, self.transport.size), strict=True))
        for p, rank in self.owners.items():
            p.owner = placement.Owner(rank, self.transport)
        with torch.no_grad():
            masters = self._place(parameters)
        groups = [
            {**{k: v for k, v in g.items() if k != "params"},
             "params": [masters[p] for p in g["params"] if self.owns(p)]}
            for g in self.param_groups
        ]  # fmt: skip
        self._inner = _Owned(groups, lr, betas, eps, weight_decay, self.recipe)
        self._inner.ordinals = {masters[p]: i for i, p in enumerate(parameters, 1) if p in masters}
        self._masters = masters
        self._device = device
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        for p, master in masters.items():
            state = self._inner.state_of(master)
            if master is not p:
                state["master"] = master
            self.state[p] = state  # the inner optimizer's own dict, so that both are restored

    def describe(self) -> str:
        """The options that decide how states are stored, as qv.AdamW's."""
        return self._inner.describe()

    def owns(self, p: Tensor) -> bool:
        """Whether this rank keeps p's state."""
        return self.owners[p] == self.transport.rank

    @property
    def loads(self) -> list[int]:
        """The bytes of weights that each rank owns and sends after a step, without padding."""
        found = [0] * self.transport.size
        for p, rank in self.owners.items():
            found[rank] += self._size(p)
        return found

    @property
    def gradient_owners(self) -> dict[Tensor, int] | None:
        """The rank that wants each parameter's gradient; None where all do."""
        return self.owners if self.stage == 2 else None

    @property
    def skipped(self) -> int:
        """Steps skipped because a gradient was not finite on some rank."""
        return int(self._skipped)

    def _replica(self, p: Tensor) -> torch.dtype:
        """The dtype in which a rank that does not own p stores it."""
        if not isinstance(p, ScaledTensor):
            return p.dtype
        return self.recipe.replica or p.qdata.dtype

    def _size(self, p: Tensor) -> int:
        """The bytes that the ranks that do not own p keep of it."""
        return p.numel() * self._replica(p).itemsize

    def _place(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
        """Moves the weights into two buffers, converted ones and others, with a row of bytes for
        each owner, so that the rows of all ranks come in place. Returns the masters of this
        rank's parameters."""
        masters = {}
        self._rows = []
        for converted in (True, False):
            chosen = [p for p in parameters if isinstance(p, ScaledTensor) == converted]
            if chosen:
                self._rows.append(self._place_in_one(chosen, masters))
        return masters

    def _place_in_one(self, parameters: list[nn.Parameter], masters: dict) -> list[Tensor]:
        ends = [0] * self.transport.size

        def reserve(p: nn.Parameter, count: int, alignment: int) -> int:
            start = -(-ends[self.owners[p]] // alignment) * alignment
            ends[self.owners[p]] = start + count
            return start

        places = {
            p: [reserve(p, p.numel() * self._replica(p).itemsize, ALIGNMENT)] for p in parameters
        }
        for p in parameters:  # behind all codes: scales, and amaxes of weights that are masters
            if isinstance(p, ScaledTensor):
                places[p] += [reserve(p, 4, 4) for _ in range(2)]
        lengths = [-(-end // ALIGNMENT) * ALIGNMENT for end in ends]
        buffer = torch.zeros(sum(lengths), dtype=torch.uint8, device=parameters[0].device)
        rows = list(buffer.split(lengths))
        for p in parameters:
            row = rows[self.owners[p]]

            def view(start, count, dtype, row=row):
                return row[start : start + count * dtype.itemsize].view(dtype)

            codes = view(places[p][0], p.numel(), self._replica(p)).view(p.shape)
            master = p
            if isinstance(p, ScaledTensor):
                scale, amax = (view(s, 1, torch.float32).view(()) for s in places[p][1:])
                master = self._split(p, codes, scale, amax)
            else:
                codes.copy_(p.data)
                p.data = codes
            if self.owns(p):
                masters[p] = master
        return rows

    def _split(self, p: nn.Parameter, codes: Tensor, scale: Tensor, amax: Tensor) -> nn.Parameter:
        """Stores a converted weight in the given memory; returns its master."""
        copies = p.__dict__.get("fp8_weight")
        if codes.dtype == p.qdata.dtype:
            for mine, old in ((codes, p.qdata), (scale, p.scale), (amax, p.amax)):
                mine.copy_(old)
            return p.store_(codes, scale, amax)
        if copies is None or copies.q.dtype != codes.dtype:
            raise ValueError(
                f"ZeroAdamW: recipe {self.recipe.name!r} needs weights of converted Linear layers "
                f"with {codes.dtype} copies"
            )
        master = nn.Parameter(ScaledTensor(p.qdata, p.scale, p.amax, p.dtype), requires_grad=True)
        rows, cols = p.shape
        codes.copy_(copies.q[:rows, :cols])
        scale.copy_(copies.scale)
        p.store_(codes, scale, None)
        copies.scale = scale
        if copies.q.shape == p.shape:
            copies.q = codes  # the weight is its own copy
        torch.autograd.graph.increment_version(p)
        copies.version = p._version
        # The step writes the model's weight and its transpose along with the master.
        master.fp8_weight = GemmWeight(copies.q, copies.qt, scale, master._version)
        return master

    def _update_groups(self) -> None:
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({k: v for k, v in group.items() if k != "params"})

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """qv.clip_grad_norm_ over the gradients of all ranks, each counted by its owner."""
        return clip_grad_norm_(self.owners, max_norm)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of the tensors of this rank, then all new weights; returns the closure's loss.
        A gradient that is not finite on any rank skips the step on all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_groups()
        order = [p for g in self.param_groups for p in g["params"] if p in self._masters]
        used = [p for p in order if p.grad is not None]
        bad = torch.zeros((), dtype=torch.float32, device=self._device)
        if used:
            amaxes = ops.amaxes([p.grad for p in used])
            bad = (~amaxes.isfinite().all()).float()
        placement.max_(bad, self.owners)
        self._skipped += (bad > 0).long()
        if used:
            self._inner.amaxes = torch.where(bad > 0, torch.nan, amaxes)
            for p in used:
                self._masters[p].grad = p.grad
            self._inner.step()
            for p in used:
                master = self._masters[p]
                if master is not p:
                    master.grad = None
                    self._write_back(p, master)
        self._gather()
        return loss

    def _write_back(self, p: nn.Parameter, master: nn.Parameter) -> None:
        """A weight with padded copies is a part of them."""
        row = master.fp8_weight.q
        if row.shape != p.shape:
            rows, cols = p.shape
            p.qdata.copy_(row[:rows, :cols])

    def _gather(self) -> None:
        """Every rank's weights, in place, and the copies that follow from them."""
        for message in [self.transport.gather_rows(rows, "weight") for rows in self._rows]:
            message.wait()
        for p in self.owners:
            copies = p.__dict__.get("fp8_weight")
            written = self.owns(p) and copies is not None and copies.version == p._version
            torch.autograd.graph.increment_version(p)
            if written:  # by the step
                copies.version = p._version
            elif copies is not None:
                copies.rewrite(p)
