"""Weights in NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .ops import FLOATS, nf4_decode, nf4_encode

__all__ = ["NF4Weight", "quantize_nf4"]

ABSMAX_BLOCK = 256  # magnitudes that share a scale


def _dynamic_values() -> tuple[float, ...]:
    """The 256 values of the signed dynamic type (arXiv 2110.02861), ascending, as bitsandbytes
    computes them."""
    values = [0.0, 1.0]
    for i in range(7):  # a decade each, in 2^i equal steps
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return tuple(sorted(values))


_DYNAMIC = _dynamic_values()


def _dynamic_map(like: Tensor) -> tuple[Tensor, Tensor]:
    """Those values, and the midpoints between them, on the device of `like`."""
    # A graph has its own table, and one of fake tensors must not be kept for real ones.
    if torch.compiler.is_compiling() or like.is_meta or is_fake(like):
        return _new_dynamic_map(like.device)
    return _kept_dynamic_map(like.device)


def _new_dynamic_map(device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.tensor(_DYNAMIC, dtype=torch.float32, device=device)
    return table, (table[1:] + table[:-1]) / 2


_kept_dynamic_map = functools.cache(_new_dynamic_map)


@dataclass(frozen=True)
class NF4Weight:
    """A tensor in NF4, which is read and never written.

    Attributes:
        codes: uint8 [(elements + 1) / 2], two a byte, the even element's in the high bits.
        absmax: the largest magnitude of each `block` flat elements: float32, or uint8 codes of the
            signed dynamic type where they are quantised too.
        absmax_scale: float32, one for 256 magnitudes; None where they are float32.
        absmax_offset: float32 [], which is added to decoded magnitudes; None likewise.
        shape, dtype: of the tensor that was encoded.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block: int = 64

    @property
    def nbytes(self) -> int:
        """Bytes of all parts: 0.516 an element with quantised magnitudes, 0.5625 without."""
        parts = (self.codes, self.absmax, self.absmax_scale, self.absmax_offset)
        return sum(t.nbytes for t in parts if t is not None)

    def numel(self) -> int:
        return math.prod(self.shape)

    def magnitudes(self) -> Tensor:
        """The largest magnitude of each block, float32, decoded where they are codes."""
        if self.absmax_scale is None:
            return self.absmax
        table, _ = _dynamic_map(self.absmax)
        scale = self.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: self.absmax.numel()]
        decoded = table.index_select(0, self.absmax.int()) * scale + self.absmax_offset
        return decoded.clamp_(min=0)  # rounding may take the smallest below 0

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, of the encoded tensor's shape.

        Args:
            dtype: float32, float16 (saturating) or bfloat16; default: the encoded tensor's.

        Raises:
            RuntimeError or ValueError: another dtype.
        """
        flat = nf4_decode(
            self.codes, self.magnitudes(), self.numel(), dtype or self.dtype, self.block
        )
        return flat.view(self.shape)


def quantize_nf4(weight: Tensor, block: int = 64, double: bool = True) -> NF4Weight:
    """A finished weight in NF4, for a layer that does not train: 0.516 bytes an element.

    Args:
        weight: float32, float16 or bfloat16, any shape and strides, finite. Zeros stay zeros.
        block: flat elements that share a magnitude: a power of two from 64 to 4096.
        double: whether magnitudes are quantised too: less their mean, in 8 bits of the signed
            dynamic type, in blocks of 256.

    Raises:
        TypeError: a weight that is no plain tensor of a floating dtype.
        ValueError: a weight with NaN or infinity, of which a block would decode to nothing else.
        RuntimeError or ValueError: another block.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        got = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(
            f"quantize_nf4: weight must be float32, float16 or bfloat16, got {got}; "
            "dequantize or cast it first"
        )
    plain = weight.detach()
    codes, absmax = nf4_encode(plain, block)
    if not (absmax.is_meta or is_fake(absmax)) and not bool(absmax.isfinite().all()):
        bad = int((~plain.isfinite()).sum())
        raise ValueError(
            f"quantize_nf4: weight must be finite, got {bad} of {plain.numel()} values that are "
            "not; load it again or replace them"
        )
    scale = offset = None
    if double:
        absmax, scale, offset = _quantize_magnitudes(absmax)
    return NF4Weight(codes, absmax, scale, offset, weight.shape, weight.dtype, block)


def _quantize_magnitudes(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, the scale of each 256 of them, and the mean that was taken off before."""
    midpoints = _dynamic_map(absmax)[1]
    count = absmax.numel()
    # In f64, so that the order of the sum does not matter.
    offset = absmax.double().sum().div(max(count, 1)).float()
    padded = torch.nn.functional.pad(absmax - offset, (0, -count % ABSMAX_BLOCK))
    groups = padded.view(-1, ABSMAX_BLOCK)
    scale = groups.abs().amax(1)
    y = groups / torch.where(scale > 0, scale, 1)[:, None]
    codes = torch.bucketize(y.flatten()[:count], midpoints, out_int32=True).to(torch.uint8)
    return codes, scale, offset
