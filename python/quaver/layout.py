"""Layout: how the values of a tensor are stored."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

FORMATS = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in FORMATS.items()}

GRAINS = ("tensor", "row", "block", "tile", "flat")

FLAT_BLOCK = 128  # the only block of grains "flat" and "tile"


@dataclass(frozen=True)
class Layout:
    """The format of the codes, and which of them share a scale.

    Args:
        format: "f32", "bf16", "f16", "e4m3" or "e5m2".
        grain: "tensor" for one scale, "row" for one for each row of the last axis, "block" for one
            for each 1 x `block` along the last axis, "tile" for one for each 128 x 128 of a matrix
            or of each in a stack,
            "flat" for one for each 128 flat elements (optimizer states).
        block: values along the last axis that share a scale, for grain "block"; else always 128.
        expand: COAT's dynamic range expansion of each block, for grain "flat" (codec.h).

    Raises:
        ValueError: another format or grain, a block below 1, `expand` with another grain.
    """

    format: str
    grain: str = "tensor"
    block: int = FLAT_BLOCK
    expand: bool = False

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(
                f"Layout: format must be one of {', '.join(FORMATS)}, got {self.format!r}"
            )
        if self.grain not in GRAINS:
            raise ValueError(
                f"Layout: grain must be one of {', '.join(GRAINS)}, got {self.grain!r}"
            )
        if self.grain != "block":
            object.__setattr__(self, "block", FLAT_BLOCK)
        elif type(self.block) is not int or self.block < 1:
            raise ValueError(f"Layout: block must be a positive int, got {self.block!r}")
        if self.expand and self.grain != "flat":
            raise ValueError(f'Layout: expand goes with grain "flat", got {self.grain!r}')

    @classmethod
    @functools.cache
    def of(cls, dtype: torch.dtype, grain: str = "tensor", block: int = FLAT_BLOCK,
           expand: bool = False) -> Layout:  # fmt: skip
        """The layout of codes of a torch dtype. Raises TypeError if no format has that dtype."""
        if dtype not in _NAMES:
            raise TypeError(f"Layout: codes must be one of {tuple(_NAMES)}, got {dtype}")
        return cls(_NAMES[dtype], grain, block, expand)

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype of the codes."""
        return FORMATS[self.format]

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the scales of a tensor of `shape`.

        Raises ValueError for grain "tile" and a shape that is no matrix's."""
        if self.grain == "tensor":
            return ()
        if self.grain == "tile":
            if len(shape) < 2:
                raise ValueError(f'Layout: grain "tile" is for matrices, got {tuple(shape)}')
            return (*shape[:-2], *(-(-n // FLAT_BLOCK) for n in shape[-2:]))
        *rows, columns = shape or (1,)
        if self.grain == "row":
            return (*rows, 1)
        if self.grain == "block":
            return (*rows, -(-columns // self.block))
        return (-(-shape.numel() // FLAT_BLOCK),)

    def __str__(self) -> str:
        kinds = {"block": f"1 x {self.block} block", "tile": f"{FLAT_BLOCK} x {FLAT_BLOCK} tile"}
        kind = kinds.get(self.grain, self.grain)
        return f"{self.format} with {'expanded ' if self.expand else ''}{kind} scale"
