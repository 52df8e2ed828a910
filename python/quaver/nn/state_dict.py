"""The state_dict entries of a ScaledTensor weight: values that everyone can read, and its scale.

`weight` is decoded to f32 and read-only. `weight_master_scale` is float32 [2]: the scale and the
amax, or [2, *scales] of a frozen weight that has several. Together they give back the same codes;
the values alone give the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..read_only import ReadOnlyTensor
from ..tensor import ScaledTensor, encode

SUFFIX = "_master_scale"


@torch.no_grad()
def master_scale(weight: ScaledTensor) -> Tensor:
    amax = torch.zeros_like(weight.scale) if weight.amax is None else weight.amax
    return torch.stack((weight.scale, amax))


@torch.no_grad()
def save_master(weight: Tensor, destination: dict, key: str) -> None:
    """Replace the entry `key`, a ScaledTensor weight, by its values and scale; others stay. Tied
    weights get one entry's memory."""
    if not isinstance(weight, ScaledTensor) or weight.is_transient:
        return
    known = (v for v in destination.values() if getattr(v, "source", None) is weight)
    values = next((v for v in known if isinstance(v, ReadOnlyTensor)), None)
    if values is None:
        values = ReadOnlyTensor(weight.detach().dequantize(torch.float32), weight)
    destination[key] = values
    destination[key + SUFFIX] = master_scale(weight)


@torch.no_grad()
def load_master(weight: Tensor, state_dict: dict, key: str) -> dict:
    """`state_dict` with its entry `key` as `weight` stores it, and without the scale's."""
    state_dict = dict(state_dict)
    known = state_dict.pop(key + SUFFIX, None)
    value = state_dict.get(key)
    if not isinstance(weight, ScaledTensor) or not isinstance(value, Tensor):
        return state_dict
    if isinstance(value, ScaledTensor) or value.shape != weight.shape or value.is_meta:
        return state_dict
    if not weight.is_meta:  # else the value is assigned where it is
        value = value.to(weight.device)
    scale = None if known is None else known.to(value.device, torch.float32)
    if scale is not None and scale.shape == (2, *weight.qlayout.scale_shape(weight.shape)):
        kept = encode(value, weight.qlayout, weight.dtype, scale[0].clone())
        kept.amax = scale[1].clone()
        if torch.equal(kept.dequantize(torch.float32), value.float()):  # else they were edited
            return {**state_dict, key: kept}
    return {**state_dict, key: encode(value, weight.qlayout, weight.dtype)}
