"""Linear with FP8 products: forward e4m3 x e4m3, dgrad and wgrad with e5m2 output gradients.

FP8-LM (arXiv 2310.18313), section 2; MS-AMP's FP8Linear. Each tensor is cast once, into both GEMM
layouts; what backward needs of the input is its transposed FP8 copy, and nothing else is saved.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import recipe as recipes
from ..tensor import ScaledTensor, is_sharded
from .common import HISTORY_STATE, cast_history, keep_f32, pad, poison, ready_cast

_ops = torch.ops.quaver

MASTER_TO_FP8 = 128.0  # kMasterToFp8 of dtype.h


@dataclass(eq=False)
class GemmWeight:
    """A weight's FP8 copies for the GEMMs: row [N, K] for forward, col [K, N] for dgrad.

    A pure function of the weight, so it is never saved. The optimizer rewrites it in place together
    with the weight; any other change of the weight is found by its version.

    `channels` [K] are powers of two that multiply the columns of both copies, because the input is
    divided by them (`smooth`). They follow the layer's `channel_amax` when the copies are written,
    so that all micro-batches of a step see the same.
    """

    row: Tensor
    col: Tensor
    scale: Tensor
    version: int
    channels: Tensor | None = None
    channel_amax: Tensor | None = None
    amax_version: int = 0  # of the channel_amax that `channels`, or the forwards since, know

    @staticmethod
    def rows(weight: ScaledTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """row, unpadded, and decode scale of a master or a shard of one: element by element, so the
        shards' codes are the whole weight's."""
        step = weight.scale.new_full((), MASTER_TO_FP8)
        row, _, _ = _ops.quantize(weight.qdata, dtype, step, None, "tensor", 128, True, False, 0)
        return row, weight.scale * MASTER_TO_FP8

    @staticmethod
    def encode(
        weight: Tensor, dtype: torch.dtype, channels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """row, col and decode scale of `weight`, padded to the GEMM's alignment."""
        if isinstance(weight, ScaledTensor) and weight.qdata.dtype == dtype:
            # Another rank's, which comes without its master: the codes are the copy.
            row = pad(weight.qdata.view(torch.uint8)).view(dtype)
            return row, row.t().contiguous(), weight.scale
        if channels is not None:
            low = isinstance(weight, ScaledTensor)
            weight = (weight.dequantize(torch.float32) if low else weight.float()) * channels
        if isinstance(weight, ScaledTensor):
            # e4m3 of the f16 codes: the scales differ by exactly 2^7.
            step = weight.scale.new_full((), MASTER_TO_FP8)
            row, col, _, _ = _ops.cast_transpose(pad(weight.qdata), dtype, step, None, True)
            return row, col, weight.scale * MASTER_TO_FP8
        row, col, scale, _ = _ops.cast_transpose(pad(weight), dtype, None, None, True)
        return row, col, scale

    @torch.no_grad()
    def rewrite(self, weight: Tensor) -> None:
        """Encode the changed weight into the same tensors: compiled graphs hold on to them."""
        if self.channels is not None:
            self.channels.copy_(smooth(self.channel_amax))
            self.amax_version = self.channel_amax._version
        new = self.encode(weight, self.row.dtype, self.channels)
        for mine, value in zip((self.row, self.col, self.scale), new, strict=True):
            mine.copy_(value)
        self.version = weight._version


def smooth(channel_amax: Tensor) -> Tensor:
    """Powers of two that bring each channel's amax into [1/2, 1), if it is divided by them:
    Smooth-SwiGLU (arXiv 2409.12517, section 4.4). 1 for a channel without values."""
    _, exponent = torch.frexp(channel_amax)
    usable = (channel_amax > 0) & channel_amax.isfinite()
    exponent = torch.where(usable, exponent, 0).clamp(-100, 100)  # so that 1 / it is finite too
    return torch.ldexp(torch.ones_like(channel_amax), exponent)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, q, qt, scale, w_row, w_col, w_scale, channels, history, out_dtype,
        grad_dtype, weight_grad,
    ):  # fmt: skip
        n = weight.shape[0]
        rows = math.prod(x.shape[:-1])
        if bias is not None and w_row.shape[0] != n:
            padded_bias = F.pad(bias.detach(), (0, w_row.shape[0] - n))
        else:
            padded_bias = bias
        y = _ops.gemm(q, scale, w_row, w_scale, padded_bias, out_dtype, True)
        ctx.save_for_backward(qt, scale)
        # Not saved tensors: they belong to the module, and the optimizer rewrites them in place.
        # An all-gathered weight's w_col is None: it is freed until backward gathers it again.
        ctx.w_col, ctx.w_scale, ctx.history, ctx.channels = w_col, w_scale, history, channels
        ctx.out_dtype, ctx.grad_dtype, ctx.weight_grad = out_dtype, grad_dtype, weight_grad
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight, ctx.version = weight, weight._version
        return y[:rows, :n].reshape(*x.shape[:-1], n)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        qt, scale = ctx.saved_tensors
        n, k = ctx.weight_shape
        dy = dy.reshape(math.prod(dy.shape[:-1]), n)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if needs_bias:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        ready = ready_cast(dy, ctx.grad_dtype)
        if ready is not None:
            gq, gqt, g_scale = ready
        elif needs_x or needs_weight:
            g = pad(dy)
            if needs_weight:
                gq, gqt, g_scale, amax = _ops.cast_transpose(
                    g, ctx.grad_dtype, None, ctx.history, True
                )
            else:
                gq, g_scale, amax = _ops.quantize(
                    g, ctx.grad_dtype, None, ctx.history, "tensor", 128, True, False, 0
                )
            g_scale = poison(g_scale, amax)
        if needs_x:
            if ctx.weight._version != ctx.version:
                raise RuntimeError(
                    "Linear: the weight was changed in place between this forward and its backward"
                )
            w_col = ctx.w_col
            if w_col is None:
                w_col = pad(ctx.weight.qdata).t().contiguous()
            dx = _ops.gemm(gq, g_scale, w_col, ctx.w_scale, None, ctx.out_dtype, False)
            dx = dx[: dy.shape[0], :k].reshape(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:
            wide = ctx.weight_grad == "f32"
            dw = _ops.gemm(
                gqt, g_scale, qt, scale, None, torch.float32 if wide else ctx.out_dtype, False
            )
            dw = dw[:n, :k]
            if ctx.channels is not None:
                dw = dw * ctx.channels.to(dw.dtype)
            if wide:
                dw = dw.to(ctx.weight_dtype)
            elif ctx.weight_grad == "bf16":
                dw = dw.to(torch.bfloat16).contiguous()
                amax = dw.abs().amax().float()
                dw = ScaledTensor(dw, torch.ones_like(amax), amax, ctx.weight_dtype)
            else:
                q, s, amax = _ops.quantize(
                    dw, recipes.E4M3, None, None, "tensor", 128, True, False, 0
                )
                dw = ScaledTensor(q, s, amax, ctx.weight_dtype)
        return dx, dw, db, *(None,) * 11


class _LastCast:
    """The last input's FP8 cast: q, k and v projections, or gate and up, share one input, and so
    share its cast and its saved copy. One slot, emptied when the input dies."""

    def __init__(self):
        self.input = self.key = self.cast = None

    def find(self, x: Tensor, key):
        same = self.input is not None and self.input() is x and self.key == key
        return self.cast if same else None

    def keep(self, x: Tensor, key, cast):
        self.input, self.key, self.cast = weakref.ref(x, self._clear), key, cast

    def _clear(self, dead):
        if dead is self.input:
            self.input = self.key = self.cast = None


_last_cast = _LastCast()


class Linear(nn.Linear):
    """nn.Linear that multiplies in FP8 by a recipe. Made by `quaver.convert`, or by hand:

        Linear(in_features, out_features, bias=True, recipe="fp8lm-o2")

    Input [..., K] float32, float16 or bfloat16; output [..., N] in the autocast dtype where
    autocast is on, else in the input's dtype. Any M, N, K; they are padded to multiples of 16.

    Raises:
        ValueError: a recipe without FP8 linear layers, or an input with another last axis than K.
        TypeError: an input of another dtype.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None,
                 recipe="fp8lm-o2"):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.adopt(recipe)

    def adopt(self, recipe, weight: nn.Parameter | None = None) -> None:
        """Make an nn.Linear's parameters this layer's. `weight` is the already converted weight."""
        rule = recipes.get(recipe).linear
        if rule is None:
            raise ValueError(f"Linear: recipe {recipes.get(recipe).name!r} has no FP8 linear layer")
        # Compiled graphs take the function whole: its backward makes a ScaledTensor. Not at import,
        # because this imports the compiler.
        torch.compiler.allow_in_graph(_LinearFunction)
        self.rule = rule
        self.weight = convert_weight(self.weight, rule) if weight is None else weight
        for name in ("input_history", "grad_history"):
            state = None
            if rule.scaling == "delayed":
                state = torch.zeros(HISTORY_STATE, device=self.weight.device)
            self.register_buffer(name, state)
        self.history_before = None
        self.register_buffer("channel_amax", None)  # Smooth-SwiGLU, see nn/mlp.py
        self.refresh()

    def refresh(self) -> GemmWeight:
        """The weight's FP8 copies, encoded anew if it changed since, by whatever hand. None where
        FSDP2 holds the weight: it is a shard, or codes gathered for one forward or backward."""
        weight = self.weight
        if is_sharded(weight) or getattr(weight, "is_transient", False):
            self.fp8_weight = None
            return None
        copies = weight.__dict__.get("fp8_weight")
        amax = self.channel_amax
        fits = copies is not None and copies.row.device == weight.device
        if not fits or (copies.channels is None) != (amax is None):
            # Never inference tensors: the optimizer could not write them later.
            with torch.inference_mode(False), torch.no_grad():
                channels = None if amax is None else smooth(amax)
                encoded = GemmWeight.encode(weight.detach(), self.rule.weight, channels)
            copies = weight.fp8_weight = GemmWeight(*encoded, weight._version, channels, amax)
            copies.amax_version = 0 if amax is None else amax._version
        elif (
            copies.version != weight._version
            or copies.channel_amax is not amax
            or (amax is not None and copies.amax_version != amax._version)
        ):
            copies.channel_amax = amax
            copies.rewrite(weight.detach())
        self.fp8_weight = copies  # a graph cannot look into the weight
        return copies

    def gemm_weight(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """row, col, scale and channels of the weight's FP8 copies."""
        if getattr(self.weight, "is_transient", False):
            if self.channel_amax is not None:
                raise RuntimeError("Linear: Smooth-SwiGLU does not go with FSDP2's sharded weights")
            self.fp8_weight = None
            return pad(self.weight.qdata), None, self.weight.scale, None
        if not torch.compiler.is_compiling():
            copies = self.refresh()
        elif isinstance(self.weight, ScaledTensor):
            copies = self.fp8_weight  # whoever writes the weight rewrites them
        else:  # a graph cannot see whether a plain weight changed
            channels = None if self.channel_amax is None else smooth(self.channel_amax)
            encoded = GemmWeight.encode(self.weight.detach(), self.rule.weight, channels)
            return *encoded, channels
        return copies.row, copies.col, copies.scale, copies.channels

    @torch.no_grad()
    def record_channels(self, channel_amax: Tensor) -> None:
        """What the next FP8 copies of the weight are smoothed by; nothing where it is not finite.
        Those of now stay, for the backward and the step's other micro-batches."""
        new = torch.where(channel_amax.isfinite(), channel_amax, self.channel_amax)
        self.channel_amax.copy_(new)
        if not torch.compiler.is_compiling():
            self.fp8_weight.amax_version = self.channel_amax._version

    def all_gather_codes(self, shard: ScaledTensor) -> tuple[Tensor, Tensor]:
        """The codes and scale that FSDP2 gathers of a shard of the weight."""
        return GemmWeight.rows(shard, self.rule.weight)

    def _cast(self, x: Tensor, both: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """The input's codes, their transpose where `both`, and the scale."""
        ready = ready_cast(x, self.rule.input)
        if ready is not None:
            return ready
        # Compiled graphs and inference tensors have no versions to recognise an input by.
        anonymous = torch.compiler.is_compiling() or x.is_inference()
        key = None if anonymous else (x._version, both, self.rule.input, self.training)
        found = None if anonymous else _last_cast.find(x, key)
        if found is not None:
            return found
        flat = pad(x.detach().reshape(math.prod(x.shape[:-1]), self.in_features))
        history = cast_history(self, self.input_history, anonymous)
        if both:
            q, qt, scale, amax = _ops.cast_transpose(flat, self.rule.input, None, history, True)
        else:
            q, scale, amax = _ops.quantize(
                flat, self.rule.input, None, history, "tensor", 128, True, False, 0
            )
            qt = None
        scale = poison(scale, amax)
        if not anonymous:
            _last_cast.keep(x, key, (q, qt, scale))
        return q, qt, scale

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Linear: the input's last axis must be {self.in_features}, got {tuple(x.shape)}"
            )
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"Linear: input must be float32, float16 or bfloat16, got {x.dtype}")
        kind = x.device.type
        out = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        product = torch.bfloat16 if out == torch.bfloat16 else torch.float32
        row, col, w_scale, channels = self.gemm_weight()
        if channels is not None and not isinstance(x, ScaledTensor):  # else an MLP divided it
            x = x / channels.to(x.dtype)
        both = torch.is_grad_enabled() and self.weight.requires_grad
        q, qt, scale = self._cast(x, both)
        grad_history = self.grad_history if self.training else None
        y = _LinearFunction.apply(
            x, self.weight, self.bias, q, qt, scale, row, col, w_scale, channels, grad_history,
            product, self.rule.grad_output, "f32" if col is None else self.rule.weight_grad,
        )  # fmt: skip
        return y.to(out)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        keep_f32(self, "input_history", "grad_history", "channel_amax")
        copies = self.weight.__dict__.get("fp8_weight")
        if copies is not None:
            copies.version = -1  # a weight that got other data kept its version
        self.refresh()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.rule.scaling} scaling, {self.rule.master} weight"


def convert_weight(weight: nn.Parameter, rule: recipes.LinearRecipe) -> nn.Parameter:
    """The weight as the recipe stores it."""
    if rule.master == "as-is" or isinstance(weight, ScaledTensor):
        return weight
    q, scale, amax = _ops.quantize(
        weight.detach(), torch.float16, None, None, "tensor", 128, True, False, 0
    )
    stored = ScaledTensor(q, scale, amax, weight.dtype)
    return nn.Parameter(stored, requires_grad=weight.requires_grad)
