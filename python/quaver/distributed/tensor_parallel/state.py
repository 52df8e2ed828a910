"""The state of a model that is spread over ranks, as one process has it, and back.

Whole tensors are decoded values: the parts have scales of their own. Spreading them again, over any
number of ranks, encodes each part anew, so FP8 and f16 states come back within the rounding of
their format. For a resumption to the same bits let every rank save its own state (`quaver.save`)
and resume on as many ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...placement import Shard, shard_of
from ...tensor import ScaledTensor
from . import sequence

__all__ = ["gather_state", "scatter_state"]

_HISTORIES = ("input_history", "grad_history")


@torch.no_grad()
def gather_state(model: nn.Module, optimizer=None) -> dict[str, Tensor]:
    """The whole of every parameter, buffer and optimizer state, on every rank; all must call.

    {"model.NAME": tensor, "optimizer.NAME.KEY": tensor}. Of a delayed scaling's history, where a
    rank saw the amax of its own part, every entry becomes the largest: the whole tensor's.
    """
    groups = _history_groups(model)
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in groups and value is not None:
            value = groups[name].transport.max(value, "scale").wait()
        state[f"model.{name}"] = _whole(value, shard_of(value))
    for name, parameter in model.named_parameters():
        entries = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, value in entries.items():
            shard = shard_of(parameter) if value.shape == parameter.shape else None
            state[f"optimizer.{name}.{key}"] = _whole(value, shard)
    return state


@torch.no_grad()
def scatter_state(model: nn.Module, state: Mapping[str, Tensor], optimizer=None) -> None:
    """Take this rank's part of `state`, which `gather_state` made on any number of ranks, or one.

    Raises:
        KeyError: `state` lacks a tensor of the model; nothing was changed.
        ValueError: one is of another shape; nothing was changed.
    """
    copies = []
    for name, target in model.state_dict(keep_vars=True).items():
        copies.append((f"model.{name}", target, shard_of(target)))
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, target in optimizer.state_of(parameter).items():
                shard = shard_of(parameter) if target.shape == parameter.shape else None
                copies.append((f"optimizer.{name}.{key}", target, shard))
    for name, target, shard in copies:
        if name not in state:
            raise KeyError(f"scatter_state: the state lacks {name}")
        wanted = list(target.shape)
        if shard is not None:
            wanted[shard.dim] = sum(shard.parts)
        if list(state[name].shape) != wanted:
            raise ValueError(
                f"scatter_state: {name} is {wanted} here, {list(state[name].shape)} in the state"
            )
    for name, target, shard in copies:
        value = state[name] if shard is None else take(state[name], shard)
        target.copy_(value.to(target.device))


def take(whole: Tensor, shard: Shard) -> Tensor:
    """This rank's part of a plain or scaled tensor. Codes stay as they are, under the old scale."""
    if not isinstance(whole, ScaledTensor):
        return shard.take(whole.detach())
    if whole.qlayout.grain != "tensor":
        raise ValueError(f"tensor parallel: wanted one scale a tensor, got {whole!r}")
    codes = shard.take(whole.qdata)
    amax = sequence.largest(codes) * whole.scale
    return ScaledTensor(codes, whole.scale.clone(), amax, whole.dtype)


def join(mine: Tensor, shard: Shard) -> Tensor:
    """The whole, as decoded values: the scales of the parts differ."""
    return shard.join(mine.dequantize() if isinstance(mine, ScaledTensor) else mine)


def _whole(value: Tensor, shard: Shard | None) -> Tensor:
    if shard is not None:
        return join(value, shard)
    return value.dequantize() if isinstance(value, ScaledTensor) else value.detach().clone()


def _history_groups(model: nn.Module) -> dict:
    """The names of the histories that differ between ranks."""
    return {
        f"{name}.{history}": module.tp_group
        for name, module in model.named_modules()
        if hasattr(module, "tp_group")
        for history in _HISTORIES
        if getattr(module, history, None) is not None
    }
