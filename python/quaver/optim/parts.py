"""FP8 states of shards as the plain tensors that they consist of, in the state dicts of optimizers.

A DTensor of FP8 codes has a logical dtype, f32, and that is all that other code sees of it: what
gathers shards or writes them to a file would keep decoded values, without an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..placement import like
from ..tensor import ScaledTensor, is_sharded, local

PARTS = ("qdata", "scale", "amax")


def parted(state: dict) -> dict:
    """A parameter's state with each ScaledTensor of a shard replaced by its parts, under
    "KEY.qdata" (FP8 as bytes, sharded as it is), "KEY.scale" and "KEY.amax" (alike on all
    ranks)."""
    found = {}
    for key, value in state.items():
        inner = local(value) if isinstance(value, Tensor) else value
        if not is_sharded(value) or not isinstance(inner, ScaledTensor):
            found[key] = value
            continue
        for name, part in inner.parts().items():
            part = part.view(torch.uint8) if part.itemsize == 1 else part
            found[f"{key}.{name}"] = like(value, part) if part.shape == inner.shape else part
    return found


def joined(state: dict, slots: dict) -> dict:
    """The state that `parted` took apart; the parts may also be in a dict of their own, under KEY,
    as torchtitan reads them. `slots` are those of its parameter, by key."""
    found, parts = {}, {}
    for key, value in state.items():
        name, _, part = key.rpartition(".") if isinstance(key, str) else ("", "", "")
        if part in PARTS and name in slots:
            parts.setdefault(name, {})[part] = value
        elif isinstance(value, dict) and key in slots and set(value) <= set(PARTS):
            parts[key] = value
        else:
            found[key] = value
    for key, mine in parts.items():
        codec = getattr(slots[key], "storage", None)
        complete = codec is not None and not codec.plain and {"qdata", "scale"} <= set(mine)
        found[key] = _joined(mine, codec.layout) if complete else mine
    return found


def _joined(parts: dict[str, Tensor], layout) -> Tensor:
    qdata, scale, amax = (None if parts.get(n) is None else local(parts[n]).detach() for n in PARTS)
    if qdata.dtype == torch.uint8 and layout.dtype.itemsize == 1:
        qdata = qdata.view(layout.dtype)
    if qdata.dtype != layout.dtype:
        return parts  # `fits` refuses it by name
    return like(parts["qdata"], ScaledTensor(qdata, scale, amax, torch.float32, layout))
