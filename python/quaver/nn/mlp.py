"""The MLP of a transformer, gated or not, with nothing but FP8 kept between its linear layers.

COAT (arXiv 2410.19313), section 5: the activation's inputs are saved in FP8 groups (its value is
recomputed), the product once, transposed, for the weight gradient of the layer that reads it; their
gradients go to the linear layers below as FP8 in both layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import recipe as recipes
from .cast import ALIGNMENT, activation, cast_history, in_backward, shared_casts
from .first_order import FirstOrder
from .linear import LinearBase
from .swap import Swapped, swap, swap_back

_ops = torch.ops.quaver


class _ActivateFunction(FirstOrder):
    @staticmethod
    def forward(
        ctx, x, up, kind, channel_scale, dtype, history, block, grad_dtype, x_history, up_history,
        grain, tiles_t, power_of_two, joint,
    ):  # fmt: skip
        if joint:  # x has both, gate first, and so has its gradient
            x, up = x.chunk(2, dim=-1)
        shape = (-1, x.shape[-1])
        inputs = x.reshape(shape), None if up is None else up.reshape(shape), kind, channel_scale
        if grain == "block":
            q, scale, qt, qt_scale, *saved = _ops.activate_layouts(
                *inputs, dtype, tiles_t, power_of_two, block
            )
        else:
            q, qt, scale, _, *saved = _ops.activate(
                *inputs, dtype, None, history, True, block, True
            )
            qt_scale = None
        xq, xscale, uq, uscale, channel_amax = saved
        up_saved = (None, None) if up is None else (uq, uscale)
        ctx.save_for_backward(xq, xscale, *up_saved, channel_scale)
        ctx.kind, ctx.block, ctx.grad_dtype = kind, block, grad_dtype
        ctx.grain, ctx.power_of_two, ctx.joint = grain, power_of_two, joint
        ctx.histories, ctx.x_dtype = (x_history, up_history), x.dtype
        ctx.mark_non_differentiable(channel_amax)
        ctx.set_materialize_grads(False)  # zeros for channel_amax would be a launch
        return activation(q, qt, scale, x.shape, x.dtype, qt_scale), channel_amax

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 14
        xq, xscale, uq, uscale, channel_scale = ctx.saved_tensors
        inputs = (
            dy.reshape(xq.shape), xq, xscale, uq, uscale, ctx.kind, channel_scale, ctx.block,
            ctx.grad_dtype,
        )  # fmt: skip
        if ctx.grain == "block":
            both = _ops.activate_backward_layouts(*inputs, ctx.power_of_two)
        else:
            both = _ops.activate_backward(*inputs, *ctx.histories, True, True, ctx.joint)
        if ctx.joint:
            shape = (*dy.shape[:-1], 2 * dy.shape[-1])
            return _gradient(ctx, both[:4], shape), *(None,) * 13
        dx, dup = (None if uq is None and at else _gradient(ctx, both[at : at + 4], dy.shape)
                   for at in (0, 4))  # fmt: skip
        return dx, dup, *(None,) * 12


def _gradient(ctx, parts, shape) -> Tensor:
    """The gradient that an op cast: q and qt with one scale, or each with those of its blocks."""
    if ctx.grain == "block":
        q, scale, qt, qt_scale = parts
        return activation(q, qt, scale, shape, ctx.x_dtype, qt_scale)
    return activation(*parts[:3], shape, ctx.x_dtype)


@dataclass(frozen=True)
class MLPPlan:
    """down(f(gate(x)) * up(x)), or down(f(gate(x))) where `up` is None, by the names of the linear
    layers. `up` equal to `gate` is one layer that gives both, gate first."""

    gate: str
    up: str | None
    down: str
    kind: str  # f: "silu", "gelu" or "gelu_tanh"


class MLP(Swapped):
    """An MLP whose linear layers multiply in FP8, as `quaver.convert` makes it. Input and output
    are those of its layers."""

    plain = False  # whether `quaver.watch` lets it give values that are not FP8

    def convert_in_place(self, recipe: recipes.Recipe, plan: MLPPlan) -> None:
        torch.compiler.allow_in_graph(_ActivateFunction)
        swap(self, MLP)
        down = getattr(self, plan.down)
        if recipe.activation.smooth_swiglu and plan.up is not None:
            down.channel_amax = torch.zeros(
                down.in_features, dtype=torch.float32, device=down.weight.device
            )
            down.refresh()
        self.rule, self.activation, self.plan = recipe.linear, recipe.activation, plan

    def restore(self) -> None:
        for name in ("rule", "activation", "plan"):
            delattr(self, name)
        swap_back(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            with shared_casts():
                return super().forward(x)
        plan = self.plan
        gate_layer, down = getattr(self, plan.gate), getattr(self, plan.down)
        up_layer = None if plan.up in (None, plan.gate) else getattr(self, plan.up)
        with shared_casts():
            gate, up = gate_layer(x), None if up_layer is None else up_layer(x)
        fused = plan.up == plan.gate
        # Halves that a product would pad, or whose scales are those of blocks, have gradients of
        # their own; autograd joins these, and the layer that gave both halves casts the result.
        joint = fused and self.rule.grain == "tensor" and gate.shape[-1] % (2 * ALIGNMENT) == 0
        if fused and not joint:
            gate, up = gate.chunk(2, dim=-1)
        channels = down.channels() if isinstance(down, LinearBase) else None
        y, channel_amax = _ActivateFunction.apply(
            gate, up, plan.kind, None if channels is None else channels.reciprocal(),
            self.rule.input, cast_history(down, getattr(down, "input_history", None)),
            self.activation.block, self.rule.grad_output,
            None if fused and not joint else _grad_history(gate_layer), _grad_history(up_layer),
            self.rule.grain, self.rule.kept == "tile", self.rule.power_of_two, joint,
        )  # fmt: skip
        if channels is None:
            return down(y)
        result = down(y, channels=channels)
        # A forward that checkpointing runs again inside a backward is not recorded twice.
        if self.training and not in_backward():
            down.record_channels(channel_amax)
        return result


def _grad_history(layer) -> Tensor | None:
    return layer.grad_history if isinstance(layer, LinearBase) and layer.training else None
