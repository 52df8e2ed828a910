"""The table of state codecs: how an optimizer stores one state of one weight.

Each row makes the zero state of a parameter and encodes values; the arithmetic is
include/quaver/codec.h's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..tensor import GROUP, ScaledTensor

# The values of Scaling in codec.h.
SCALINGS = {"tensor": 0, "group": 1, "expand": 2}


@dataclass(frozen=True)
class Codec:
    """A storage dtype, and what shares a scale: None for no scale at all, "tensor", "group" (128
    flat elements) or "expand" (such groups after dynamic range expansion)."""

    dtype: torch.dtype
    granularity: str | None

    def zeros(self, p: Tensor) -> Tensor:
        """The state of a parameter before its first step."""
        codes = torch.zeros(p.shape, dtype=self.dtype, device=p.device)
        if self.granularity is None:
            return codes
        if self.granularity == "tensor":
            scale = torch.ones((), device=p.device)
            return ScaledTensor(codes, scale, torch.zeros_like(scale), torch.float32)
        scale = torch.ones(-(-p.numel() // GROUP), device=p.device)
        return ScaledTensor(codes, scale, None, torch.float32, self.granularity, GROUP)

    def fits(self, state: object, p: Tensor) -> bool:
        """Whether `state` is a state of this codec for p."""
        low = isinstance(state, ScaledTensor)
        if not isinstance(state, Tensor) or state.shape != p.shape:
            return False
        kind = (state.qdata.dtype, state.granularity) if low else (state.dtype, None)
        return kind == (self.dtype, self.granularity)

    def encode(self, x: Tensor) -> Tensor:
        """x as the codec stores it, each value to the nearest that it has."""
        if self.granularity is None:
            return x.to(self.dtype)
        if self.granularity == "tensor":
            return ops.quantize(x.float(), self.dtype)
        return ops.encode_state(x, self.dtype, expand=self.granularity == "expand")


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

STATES: dict[str, Codec] = {
    "f32": Codec(torch.float32, None),
    "e4m3": Codec(E4M3, "group"),
    "e5m2": Codec(E5M2, "group"),
    "e4m3-expand": Codec(E4M3, "expand"),
    "e5m2-expand": Codec(E5M2, "expand"),
    "e4m3-tensor": Codec(E4M3, "tensor"),
    "f16-tensor": Codec(torch.float16, "tensor"),
}


def scaling(state: Tensor) -> int:
    """How `state` is scaled, as adam_ takes it."""
    granularity = state.granularity if isinstance(state, ScaledTensor) else "tensor"
    return SCALINGS[granularity]


@dataclass(frozen=True)
class EncodedState:
    """Values as a codec stores them. `tensor` is what an optimizer keeps in its state."""

    codec: str
    tensor: Tensor

    def decode(self) -> Tensor:
        """The stored values, float32."""
        low = isinstance(self.tensor, ScaledTensor)
        return self.tensor.dequantize(torch.float32) if low else self.tensor.clone()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, and of the amax where there is one."""
        if not isinstance(self.tensor, ScaledTensor):
            return self.tensor.nbytes
        names, _ = self.tensor.__tensor_flatten__()
        return sum(getattr(self.tensor, name).nbytes for name in names)


def encode_state(x: Tensor, codec: str) -> EncodedState:
    """Encode `x` (float32, float16 or bfloat16, any shape) as an optimizer state of that codec.

    `codec` is a name of STATES: "f32", "e4m3" and "e5m2" (one scale for 128 flat elements),
    "e4m3-expand" and "e5m2-expand" (with COAT's dynamic range expansion), "e4m3-tensor",
    "f16-tensor". Each value becomes the nearest that the codec has, but that in groups nothing else
    than zero becomes zero; Adam's first moment rounds otherwise, see docs/numerics.md. Infinity
    saturates, NaN stays NaN.

    Raises:
        ValueError: an unknown codec.
        TypeError: a tensor of another dtype.
    """
    chosen = STATES.get(codec)
    if chosen is None:
        raise ValueError(f"encode_state: unknown codec {codec!r}; there are {', '.join(STATES)}")
    if x.dtype not in ops.FLOATS:
        raise TypeError(f"encode_state: x must be float32, float16 or bfloat16, got {x.dtype}")
    return EncodedState(codec, chosen.encode(x.detach()))
