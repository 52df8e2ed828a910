"""RMSNorm and LayerNorm whose result is FP8, for linear layers that multiply in FP8.

COAT (arXiv 2410.19313), section 5: the input is saved in FP8 groups, the result once, transposed,
for the weight gradients of all linear layers that read it. Nothing is cast twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import recipe as recipes
from ..ops import FLOATS
from .cast import activation, cast_history, check_devices, kept_histories, new_history, output_dtype
from .first_order import FirstOrder
from .swap import Swapped, swap, swap_back

_ops = torch.ops.quaver


class _NormalizeFunction(FirstOrder):
    @staticmethod
    def forward(
        ctx, x, weight, bias, eps, centered, dtype, history, block, out_dtype, grain, tiles_t,
        power_of_two,
    ):  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        if grain == "block":
            q, scale, qt, qt_scale, *saved = _ops.normalize_layouts(
                flat, weight, bias, eps, centered, dtype, tiles_t, power_of_two, block
            )
        else:
            q, qt, scale, _, *saved = _ops.normalize(
                flat, weight, bias, eps, centered, dtype, None, history, True, block, True
            )
            qt_scale = None
        xq, xscale, mean, rstd = saved
        ctx.save_for_backward(xq, xscale, mean, rstd, weight)
        ctx.block, ctx.x_dtype = block, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return activation(q, qt, scale, x.shape, out_dtype, qt_scale)

    @staticmethod
    def backward(ctx, dy):
        xq, xscale, mean, rstd, weight = ctx.saved_tensors
        dx, dweight, dbias = _ops.normalize_backward(
            dy.reshape(xq.shape), xq, xscale, mean, rstd, weight, ctx.block,
            ctx.bias_dtype is not None, ctx.x_dtype,
        )  # fmt: skip
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
        return dx.reshape(dy.shape), dweight, dbias, *(None,) * 9


class Norm(Swapped):
    """A norm that feeds FP8 linear layers alone, as `quaver.convert` makes it.

    RMSNorm: x * rsqrt(mean(x^2) + eps) * (offset + weight); LayerNorm with mean and bias. Input
    [..., C] float32, float16 or bfloat16; the output is a ScaledTensor of that shape, in the
    autocast dtype where autocast is on, else the input's; an operation without a form for it gets
    decoded values.

    Raises:
        ValueError: an input with another last axis than C.
        TypeError: an input of another dtype.
        RuntimeError: parameters or an amax history on another device than the input.
    """

    plain = False  # whether `quaver.watch` lets it give values that are not FP8

    def convert_in_place(
        self,
        recipe: recipes.Recipe,
        width: int,
        eps: float | None,
        centered: bool,
        offset: float,
        device: torch.device,
    ) -> None:
        """`eps` None is the machine epsilon of the input's dtype, as nn.RMSNorm has it."""
        torch.compiler.allow_in_graph(_NormalizeFunction)
        swap(self, Norm)
        self.rule, self.activation = recipe.linear, recipe.activation
        self.width, self.epsilon, self.centered, self.offset = width, eps, centered, offset
        delayed = self.rule.scaling == "delayed"
        self.register_buffer("output_history", new_history(device) if delayed else None)
        self.history_before = None

    def restore(self) -> None:
        for name in ("rule", "activation", "width", "epsilon", "centered", "offset",
                     "output_history", "history_before"):  # fmt: skip
            delattr(self, name)
        swap_back(self)

    def _apply(self, fn, recurse=True):
        with kept_histories(self, "output_history"):
            super()._apply(fn, recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, getattr(self, "bias", None)
        if x.dim() == 0 or x.shape[-1] != self.width:
            raise ValueError(
                f"Norm: the input's last axis must be {self.width}, got {tuple(x.shape)}"
            )
        if x.dtype not in FLOATS:
            raise TypeError(f"Norm: input must be float32, float16 or bfloat16, got {x.dtype}")
        check_devices(self, x.device)
        if self.plain:
            return super().forward(x)
        return _NormalizeFunction.apply(
            x,
            weight if weight is None or not self.offset else weight + self.offset,
            bias,
            torch.finfo(x.dtype).eps if self.epsilon is None else self.epsilon,
            self.centered,
            self.rule.input,
            cast_history(self, self.output_history),
            self.activation.block,
            output_dtype(x),
            self.rule.grain,
            self.rule.kept == "tile",
            self.rule.power_of_two,
        )
