"""The styles of a tensor-parallel plan: how each module is changed when its model is spread."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...comm.transport import Transport
from ...nn.cast import output_dtype
from ...nn.linear import Linear
from ...placement import Shard
from . import sequence
from .linear import (
    ColumnParallelLinear,
    PlainColumnParallelLinear,
    PlainRowParallelLinear,
    RowParallelLinear,
    TPGroup,
    _Column,
)
from .state import take

__all__ = [
    "ColumnParallel",
    "GatherInput",
    "LocalHeads",
    "RowParallel",
    "SequenceParallel",
    "Split",
]


class _Split(torch.autograd.Function):
    """A replicated sequence to this rank's shard of it."""

    @staticmethod
    def forward(ctx, x, transport, dtype):
        ctx.transport, ctx.dtype, ctx.x_dtype = transport, dtype, x.dtype
        return sequence.own(x, transport)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return sequence.gather(dy.to(ctx.dtype), ctx.transport).to(ctx.x_dtype), None, None


class _Join(torch.autograd.Function):
    """Shards to the whole sequence, which every rank then computes with, all alike."""

    @staticmethod
    def forward(ctx, x, transport, dtype):
        ctx.transport, ctx.x_dtype = transport, x.dtype
        return sequence.gather(x.to(dtype), transport)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return sequence.own(dy, ctx.transport).to(ctx.x_dtype), None, None


def _sum_gradients(parameters, transport: Transport) -> None:
    """Each rank's gradient comes from its own shard of the sequence: sum them, in rank order."""

    def summed(gradient):
        every = transport.all_gather(gradient, "gradient").wait()
        total = every[0].float()
        for one in every[1:]:
            total += one.float()
        return total.to(gradient.dtype)

    for parameter in parameters:
        parameter.register_hook(summed)


@dataclass(frozen=True)
class ColumnParallel:
    """A linear layer's output features over the ranks. Its input is a sequence shard, which it
    gathers itself, unless `gathers` is false: then a GatherInput around it does, once for all
    layers that share the input. `parts`: lengths of the fused outputs (q, k and v;
    gate and up), each of which is spread."""

    parts: tuple[int, ...] | None = None
    gathers: bool = True

    def check(self, name: str, module: nn.Module, ranks: int) -> None:
        _check_linear("ColumnParallel", name, module)
        parts = self.parts or (module.out_features,)
        if sum(parts) != module.out_features or any(n % ranks for n in parts):
            raise ValueError(
                f"ColumnParallel: {name} has output features {list(parts)} (of "
                f"{module.out_features}), which {ranks} ranks must divide"
            )

    def apply(self, module: nn.Module, group: TPGroup) -> None:
        parts = self.parts or (module.out_features,)
        shard = Shard(0, parts, group.transport)
        module.out_features //= group.transport.size
        fp8 = isinstance(module, Linear)
        module.__class__ = ColumnParallelLinear if fp8 else PlainColumnParallelLinear
        module.tp_group, module.gathers = group, self.gathers
        _spread(module, "weight", shard)
        if module.bias is not None:
            _spread(module, "bias", shard)


@dataclass(frozen=True)
class RowParallel:
    """A linear layer's input features over the ranks; its output is a sequence shard."""

    def check(self, name: str, module: nn.Module, ranks: int) -> None:
        _check_linear("RowParallel", name, module)
        if module.in_features % ranks:
            raise ValueError(
                f"RowParallel: {name} has {module.in_features} input features, which {ranks} ranks "
                "must divide"
            )

    def apply(self, module: nn.Module, group: TPGroup) -> None:
        shard = Shard(1, (module.in_features,), group.transport)
        module.in_features //= group.transport.size
        fp8 = isinstance(module, Linear)
        module.__class__ = RowParallelLinear if fp8 else PlainRowParallelLinear
        module.tp_group = group
        _spread(module, "weight", shard)
        if module.bias is not None:
            _sum_gradients([module.bias], group.transport)


@dataclass(frozen=True)
class SequenceParallel:
    """A module that treats every position alone (a norm), run on the sequence shard. With
    `gather_output` its output is the whole sequence, for a replicated head."""

    gather_output: bool = False

    def check(self, name: str, module: nn.Module, ranks: int) -> None:
        pass

    def apply(self, module: nn.Module, group: TPGroup) -> None:
        _sum_gradients(module.parameters(), group.transport)
        if self.gather_output:
            module.register_forward_hook(
                lambda module, args, y: _Join.apply(y, group.transport, output_dtype(y))
            )


@dataclass(frozen=True)
class Split:
    """The first module that computes on sequence shards: its first argument is the same whole
    sequence on all ranks, of which each keeps its shard. The first input of each shape is compared
    between the ranks, values included."""

    argument: str = "hidden_states"

    def check(self, name: str, module: nn.Module, ranks: int) -> None:
        pass

    def apply(self, module: nn.Module, group: TPGroup) -> None:
        seen = set()

        def split(x):
            if x.shape not in seen:
                _check_same_input(x.detach(), group.transport)
                seen.add(x.shape)
            return _Split.apply(x, group.transport, output_dtype(x))

        _change_argument(module, self.argument, split)


@dataclass(frozen=True)
class GatherInput:
    """A module that needs the whole sequence: its first argument, a sequence shard, is gathered
    once for all ColumnParallel(gathers=False) layers inside, in FP8 where they are."""

    argument: str = "hidden_states"

    def check(self, name: str, module: nn.Module, ranks: int) -> None:
        if not any(isinstance(inner, nn.Linear) for inner in module.modules()):
            raise TypeError(f"GatherInput: {name} has no linear layer to gather for")

    def apply(self, module: nn.Module, group: TPGroup) -> None:
        def gather(x):
            inner = (m for m in module.modules() if isinstance(m, _Column))
            first = next(inner, None)
            if first is None:
                raise ValueError("GatherInput: no ColumnParallel layer inside")
            return first.gather(x)

        _change_argument(module, self.argument, gather)


@dataclass(frozen=True)
class LocalHeads(GatherInput):
    """Attention: GatherInput, and each rank has its part of the heads. The module's numbers of
    heads (`heads`, `kv_heads`) and its fused lengths (`split`) become the rank's own."""

    heads: int = 1
    kv_heads: int = 1

    def check(self, name: str, module: nn.Module, ranks: int) -> None:
        super().check(name, module, ranks)
        for what in ("heads", "kv_heads"):
            if getattr(self, what) % ranks:
                raise ValueError(
                    f"LocalHeads: {name} has {getattr(self, what)} {what}, which {ranks} ranks "
                    "must divide"
                )

    def apply(self, module: nn.Module, group: TPGroup) -> None:
        super().apply(module, group)
        ranks = group.transport.size
        if hasattr(module, "split"):
            module.split = tuple(n // ranks for n in module.split)
            module.heads //= ranks
            module.kv_heads //= ranks


def _check_linear(style: str, name: str, module: nn.Module) -> None:
    if type(module) not in (nn.Linear, Linear):
        raise TypeError(f"{style}: {name} must be a Linear, got {type(module).__name__}")
    if getattr(module, "channel_amax", None) is not None:
        raise ValueError(f"{style}: {name} is smoothed by channels, which cannot be spread yet")
    if isinstance(module, Linear) and module.rule.weight_product != "fp8":
        raise ValueError(
            f"{style}: {name} multiplies the weight's gradient in {module.rule.weight_product}, "
            'and ranks exchange FP8 codes; wanted weight_product="fp8"'
        )


def _spread(module: nn.Module, name: str, shard: Shard) -> None:
    whole = getattr(module, name)
    mine = nn.Parameter(take(whole.detach(), shard), whole.requires_grad)
    mine.shard = shard
    setattr(module, name, mine)
    if name == "weight" and isinstance(module, Linear):
        module.refresh()


def _change_argument(module: nn.Module, name: str, change) -> None:
    def hook(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, name: change(kwargs[name])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _check_same_input(x: Tensor, transport: Transport) -> None:
    """Raises on all ranks where they were given other shapes or values."""
    if transport.is_simulated:
        return
    digest = hashlib.sha256(x.contiguous().view(torch.uint8).cpu().numpy()).hexdigest()
    every = transport.all_gather_object((list(x.shape), digest), x.device)
    for rank, (shape, other) in enumerate(every):
        if shape != every[0][0]:
            raise ValueError(
                f"tensor parallel: rank {rank} of the group got an input {shape}, rank 0 "
                f"{every[0][0]}; all must get the same"
            )
        if other != every[0][1]:
            raise ValueError(
                f"tensor parallel: ranks 0 and {rank} of the group got different values; all must "
                "get the same input"
            )
