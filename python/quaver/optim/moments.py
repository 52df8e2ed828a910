"""The slots of an optimizer's state: moments of past gradients and the remainder of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .states import STATES, Codec


@dataclass(frozen=True)
class Ema:
    """A moving average with one value for each element, as `codec` (a name of STATES) stores it.
    The fused step `ops.adam_` updates it."""

    codec: str

    @property
    def storage(self) -> Codec:
        return STATES[self.codec]

    @property
    def is_flat(self) -> bool:
        """Whether blocks of flat elements share a scale, so that no shard may cut them."""
        return self.storage.layout.grain == "flat"

    def zeros(self, p: Tensor) -> Tensor:
        """The moment of a parameter before its first step."""
        return self.storage.zeros(p)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a moment of p."""
        return self.storage.fits(value, p)

    def __str__(self) -> str:
        return self.codec


@dataclass(frozen=True)
class PlainEma:
    """A moving average with one bfloat16 value for each element, beside a moment that is none."""

    is_flat = False

    def zeros(self, p: Tensor) -> Tensor:
        """The moment of a parameter before its first step."""
        return torch.zeros(p.shape, dtype=torch.bfloat16, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a moment of p."""
        return isinstance(value, Tensor) and (value.dtype, value.shape) == (torch.bfloat16, p.shape)

    def __str__(self) -> str:
        return "bf16"


@dataclass(frozen=True)
class Part:
    """The slot of a plain tensor that follows flat elements of its parameter, or all of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_flat = True

    def zeros(self, p: Tensor) -> Tensor:
        """The state of a parameter before its first step."""
        return torch.zeros(self.shape, dtype=self.dtype, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a state of p."""
        return isinstance(value, Tensor) and (value.dtype, value.shape) == (self.dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} for a parameter"


@dataclass(frozen=True)
class Remainder:
    """The 16 low bits of a float32 master whose high bits are a bf16 parameter."""

    is_flat = False

    def zeros(self, p: Tensor) -> Tensor:
        """The remainder before the first step: none, the parameter is its own master."""
        return torch.zeros(p.shape, dtype=torch.int16, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a remainder of p."""
        return isinstance(value, Tensor) and (value.dtype, value.shape) == (torch.int16, p.shape)

    def __str__(self) -> str:
        return "int16"


REMAINDER = Remainder()

# The moments by the names that recipes use.
MOMENTS: dict[str, Ema | PlainEma] = {name: Ema(name) for name in STATES} | {"bf16": PlainEma()}
