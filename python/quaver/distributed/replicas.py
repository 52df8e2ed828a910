"""Replicas of a model agree on their description, start with rank 0's values, and merge the amax
histories of delayed scaling at every step, so that all choose the same scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..comm.transport import Transport
from ..nn.cast import HISTORY_STATE
from ..nn.linear import LinearBase
from ..tensor import ScaledTensor, plain_tensors


def describe(tensors: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, str]:
    """The properties of each tensor that `compare` compares between ranks, by its position: name,
    shape, dtypes and its layer's rule."""
    modules = [] if model is None else model.modules()
    rules = {id(m.weight): str(m.rule) for m in modules if isinstance(m, LinearBase)}
    found = {}
    for i, (name, t) in enumerate(tensors.items()):
        dtypes = " ".join(str(part.dtype).removeprefix("torch.") for part in plain_tensors(t))
        found[f"tensor {i}"] = f"{name} {list(t.shape)} {dtypes} {rules.get(id(t), '')}".strip()
    return found


@torch.no_grad()
def broadcast_values(tensors: Iterable[Tensor], transport: Transport) -> None:
    """Overwrites parameters and buffers with rank 0's, whose codes and scales all ranks then have,
    and brings FP8 copies of weights up to date. Collective."""
    tensors = list(tensors)
    transport.broadcast([part.detach() for t in tensors for part in plain_tensors(t)])
    if transport.size == 1:
        return
    for t in tensors:
        if isinstance(t, ScaledTensor):
            t.refresh_copies()
        torch.autograd.graph.increment_version(t)


def histories(model: nn.Module, ending: str = "_history") -> list[Tensor]:
    """The amax histories of delayed scaling: float32 buffers of a count and 16 amaxes (scale.h), by
    the ending of their names."""
    return [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith(ending) and buffer.shape == (HISTORY_STATE,)
    ]


def stack_histories(histories: list[Tensor]) -> Tensor:
    """Histories as rows [n, 17] whose maximum over ranks is that of the whole batch. Counts are
    negated: a rank that saw a non-finite amax starts anew, and then all must, so the least counts.
    """
    rows = torch.stack(histories)
    rows[:, 0].neg_()
    return rows


def unstack_histories_(histories: list[Tensor], rows: Tensor) -> None:
    """Overwrites histories with the maximum of the rows that `stack_histories` gave."""
    rows[:, 0].neg_()
    torch._foreach_copy_(histories, list(rows.unbind()))
