"""Linear layers that do not train, with their weight in NF4 or FP8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nf4 import NF4Weight, quantize_nf4
from ..ops import FLOATS, quantize
from ..tensor import ScaledTensor
from .cast import output_dtype

FORMATS = ("nf4", "fp8", "keep")
PARTS = {
    "nf4": ("codes", "absmax", "absmax_scale", "absmax_offset"),
    "fp8": ("codes", "scale"),
    "keep": ("kept",),
}


class FrozenLinear(nn.Module):
    """y = x @ W^T + bias of a weight that is read and never written.

    Input [..., K] float32, float16 or bfloat16; output [..., N] in the autocast dtype where
    autocast is on, else in the input's dtype. W is decoded where it is used, forward and backward,
    and no longer: a layer keeps 0.516 bytes an element of "nf4", 1 of "fp8" (e4m3, one scale a
    row). Backward gives the gradient of x alone and keeps no activation for it.

    Args:
        weight: float32, float16 or bfloat16 [N, K], or [K, N] with `input_major`; finite.
        bias: [N] or None.
        format: "nf4", "fp8", or "keep" for the weight as it is.

    Raises:
        TypeError: a weight that is no plain tensor of a floating dtype, or an input of another.
        ValueError: another format, a weight that is no matrix or not finite, or an input with
            another last axis than K.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        format: str = "nf4",
        input_major: bool = False,
    ):
        super().__init__()
        check_format("FrozenLinear", format)
        if not isinstance(weight, Tensor) or isinstance(weight.data, ScaledTensor):
            raise TypeError(
                f"FrozenLinear: weight must be a plain tensor, got {type(weight).__name__}; "
                "dequantize it first"
            )
        if weight.dim() != 2:
            raise ValueError(
                f"FrozenLinear: weight must be a matrix, got {weight.dim()} dimensions"
            )
        if weight.dtype not in FLOATS:
            raise TypeError(
                f"FrozenLinear: weight must be float32, float16 or bfloat16, got {weight.dtype}"
            )
        self.format, self.input_major, self.weight_shape = format, input_major, weight.shape
        self.weight_dtype = weight.dtype
        self.out_features, self.in_features = weight.shape[:: -1 if input_major else 1]
        for name, value in self._encode(weight.detach()).items():
            self.register_buffer(name, value)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def _encode(self, weight: Tensor) -> dict[str, Tensor]:
        if self.format == "keep":
            return {"kept": weight}
        if self.format == "fp8":
            # A model's `to(dtype)` would take FP8 for a floating dtype and cast the codes.
            q = quantize(weight, granularity="row")
            return {"codes": q.qdata.view(torch.uint8), "scale": q.scale}
        q = quantize_nf4(weight)
        return {name: getattr(q, name) for name in PARTS["nf4"]}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its own shape, in `dtype` or its own."""
        dtype = dtype or self.weight_dtype
        if self.format == "keep":
            return self.kept.to(dtype)
        if self.format == "fp8":
            q = self.codes.view(torch.float8_e4m3fn)
            return torch.ops.quaver.dequantize(q, self.scale, dtype, "row")
        parts = (getattr(self, name) for name in PARTS["nf4"])
        return NF4Weight(*parts, self.weight_shape, self.weight_dtype).dequantize(dtype)

    def product_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as [N, K]."""
        weight = self.dequantize(dtype)
        return weight.t() if self.input_major else weight

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight, without the bias."""
        return sum(getattr(self, name).nbytes for name in PARTS[self.format])

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in FLOATS:
            raise TypeError(
                f"FrozenLinear: input must be float32, float16 or bfloat16, got {x.dtype}"
            )
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"FrozenLinear: input's last axis must be {self.in_features}, got {list(x.shape)}"
            )
        return _Product.apply(x.to(output_dtype(x)), self)

    def _apply(self, fn, recurse=True):
        """Moves everything to another device, and casts what is a floating value by itself: a part
        of the codes in another dtype would decode to another weight."""
        for name in PARTS[self.format] if self.format != "keep" else ():
            old = getattr(self, name)
            new = fn(old)
            setattr(self, name, new if new.dtype == old.dtype else old.to(new.device))
        own = {"kept": getattr(self, "kept", None), "bias": self.bias}
        for name, old in own.items():
            if old is not None:
                setattr(self, name, fn(old))
        if self.format == "keep":
            self.weight_dtype = self.kept.dtype
        return self

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.format!r}"


class _Product(torch.autograd.Function):
    """x @ W^T + bias; backward decodes W again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        # Autocast has been asked already, and would cast once more.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, layer.product_weight(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):
            return dy @ ctx.layer.product_weight(dy.dtype), None


def check_format(op: str, format: str) -> None:
    """Raises ValueError unless `format` is one of FORMATS."""
    if format not in FORMATS:
        raise ValueError(f"{op}: format must be one of {', '.join(FORMATS)}, got {format!r}")


def freeze_linear(module: nn.Module, format: str, is_input_major) -> int:
    """Replaces the linear layers inside of `module` by FrozenLinear, each weight encoded once, and
    returns how many. `is_input_major(layer)` tells layers of [K, N] weights."""
    check_format("freeze_linear", format)
    done: dict[int, FrozenLinear] = {}
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            major = is_input_major(layer)
            if not major and type(layer) is not nn.Linear:
                continue
            if id(layer) not in done:
                frozen = FrozenLinear(layer.weight, layer.bias, format, major)
                done[id(layer)] = frozen.train(layer.training)
            setattr(parent, name, done[id(layer)])
    return len(done)
