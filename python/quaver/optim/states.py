"""The table of state codecs: how an optimizer stores one state of one weight.

Each row makes the zero state of a parameter and encodes values; the arithmetic is
include/quaver/codec.h's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..layout import Layout
from ..tensor import ScaledTensor, local

# The values of Scaling in codec.h, by (grain, expand).
SCALINGS = {("tensor", False): 0, ("flat", False): 1, ("flat", True): 2}


@dataclass(frozen=True)
class Codec:
    """The layout of a state. States in f32 are plain tensors, without a scale."""

    layout: Layout

    @property
    def plain(self) -> bool:
        """Whether the state is a plain tensor."""
        return self.layout.format == "f32"

    def zeros(self, p: Tensor) -> Tensor:
        """The state of a parameter before its first step."""
        codes = torch.zeros(p.shape, dtype=self.layout.dtype, device=p.device)
        if self.plain:
            return codes
        scale = torch.ones(self.layout.scale_shape(p.shape), dtype=torch.float32, device=p.device)
        amax = torch.zeros_like(scale) if self.layout.grain == "tensor" else None
        return ScaledTensor(codes, scale, amax, torch.float32, self.layout)

    def fits(self, state: object, p: Tensor) -> bool:
        """Whether `state` is a state of this codec for p; of a shard where p is one."""
        if not isinstance(state, Tensor) or state.shape != p.shape:
            return False
        state = local(state)
        low = isinstance(state, ScaledTensor)
        if self.plain or not low:
            return self.plain and not low and state.dtype == self.layout.dtype
        return state.qlayout == self.layout

    def encode(self, x: Tensor) -> Tensor:
        """x as the codec stores it, each value to the nearest that it has."""
        if self.plain:
            return x.to(self.layout.dtype)
        if self.layout.grain == "tensor":
            return ops.quantize(x.float(), self.layout.dtype)
        return ops.encode_state(x, self.layout.dtype, expand=self.layout.expand)


STATES: dict[str, Codec] = {
    "f32": Codec(Layout("f32")),
    "e4m3": Codec(Layout("e4m3", "flat")),
    "e5m2": Codec(Layout("e5m2", "flat")),
    "e4m3-expand": Codec(Layout("e4m3", "flat", expand=True)),
    "e5m2-expand": Codec(Layout("e5m2", "flat", expand=True)),
    "e4m3-tensor": Codec(Layout("e4m3")),
    "f16-tensor": Codec(Layout("f16")),
}


def scaling(state: Tensor) -> int:
    """The scaling of `state`, as adam_ takes it."""
    if not isinstance(state, ScaledTensor):
        return SCALINGS["tensor", False]
    return SCALINGS[state.qlayout.grain, state.qlayout.expand]


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
        return sum(part.nbytes for part in self.tensor.parts().values())


def encode_state(x: Tensor, codec: str) -> EncodedState:
    """Encode `x` (float32, float16 or bfloat16, any shape) as an optimizer state of that codec.

    `codec` is a name of STATES: "f32", "e4m3" and "e5m2" (one scale for 128 flat elements),
    "e4m3-expand" and "e5m2-expand" (with COAT's dynamic range expansion), "e4m3-tensor",
    "f16-tensor". Each value becomes the nearest that the codec has; in groups only zero becomes
    zero. Adam's first moment rounds otherwise, see docs/numerics.md. Infinity saturates, NaN stays
    NaN.

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
