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

    @property
    def is_scaled(self) -> bool:
        """Whether its values are codes with scales."""
        return not self.storage.plain

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
    """The low bits of a master whose high bits are a bf16 parameter: int16 of an exact float32 or
    int8 of 24 bits."""

    dtype: torch.dtype
    is_flat = False

    def zeros(self, p: Tensor) -> Tensor:
        """The remainder before the first step: none, the parameter is its own master."""
        return torch.zeros(p.shape, dtype=self.dtype, device=p.device)

    def fits(self, value: object, p: Tensor) -> bool:
        """Whether `value` is such a remainder of p."""
        return isinstance(value, Tensor) and (value.dtype, value.shape) == (self.dtype, p.shape)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


# The remainders by the values of a recipe's `bf16_master`.
REMAINDERS = {"remainder": Remainder(torch.int16), "remainder8": Remainder(torch.int8)}


def remainder_slot(rounding: str) -> dict[str, Remainder]:
    """The slot of the remainder under that rounding, if it has one."""
    return {"remainder": REMAINDERS[rounding]} if rounding in REMAINDERS else {}


def remainders_of(states: list[dict]) -> list[Tensor | None] | tuple[()]:
    """The remainders in states, as the list ops take them."""
    found = [s.get("remainder") for s in states]
    return () if all(r is None for r in found) else found


def rounding_of(p: Tensor, bf16_master: str) -> str:
    """How a plain p is rounded under that rule of a recipe: one of its values."""
    exact = p.dtype == torch.float32 or (bf16_master in REMAINDERS and p.dtype != torch.bfloat16)
    return "nearest" if exact else bf16_master


# The moments by the names that recipes use.
MOMENTS: dict[str, Ema | PlainEma] = {name: Ema(name) for name in STATES} | {"bf16": PlainEma()}
