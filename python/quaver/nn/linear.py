"""Linear layers with FP8 products: forward e4m3 x e4m3, dgrad and wgrad with e5m2 output gradients.

FP8-LM (arXiv 2310.18313), section 2; MS-AMP's FP8Linear. Each input is cast once, into both GEMM
layouts; backward needs its transposed FP8 copy, and casts the weight again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import recipe as recipes
from ..ops import FLOATS
from ..tensor import ScaledTensor
from . import fallback
from .cast import (
    Cast,
    cast_history,
    check_devices,
    in_backward,
    kept_histories,
    new_history,
    output_dtype,
    quantized,
    shared_cast,
)
from .product import Exchange, Product, register_product
from .state_dict import load_master, master_scale, save_master
from .swap import Swapped
from .weight import (
    GemmWeight,
    cached_cast,
    cast_weight,
    channels_of,
    check_cut,
    convert_weight,
    several_scales,
    shard_codes,
)

_NONE = None, None, None, None


class LinearBase(nn.Module):
    """Base of the layers that multiply in FP8 by a recipe (`rule`).

    Input [..., K] float32, float16 or bfloat16; output [..., N] in the autocast dtype where
    autocast is on, else in the input's dtype. Any M, N, K; they are padded to multiples of 16.

    Raises:
        ValueError: an input with another last axis than K.
        TypeError: an input of another dtype.
        RuntimeError: parameters or amax histories on another device than the input.
    """

    input_major = False  # the weight is [K, N], not [N, K]
    plain = False  # whether `quaver.watch` lets it multiply without FP8
    several_scales = ()  # weight.py

    def convert_in_place(self, recipe, weight: nn.Parameter | None = None,
                         plain_dtype: torch.dtype | None = None) -> None:  # fmt: skip
        """Make this layer's parameters those of an FP8 layer. `weight` is the already converted
        weight, which was `plain_dtype`; None converts the layer's own."""
        rule = recipes.get(recipe).linear
        if rule is None:
            raise ValueError(f"Linear: recipe {recipes.get(recipe).name!r} has no FP8 linear layer")
        register_product()
        self.rule = rule
        self.plain_dtype = plain_dtype or self.weight.dtype  # what `restore` gives back
        self.weight = convert_weight(self.weight, rule) if weight is None else weight
        self.several_scales = several_scales(self, ("weight",))
        for name in ("input_history", "grad_history"):
            delayed = rule.scaling == "delayed"
            self.register_buffer(name, new_history(self.weight.device) if delayed else None)
        self.history_before = None
        self.register_buffer("channel_amax", None)  # Smooth-SwiGLU, see nn/mlp.py
        self.channels_before = None
        self.refresh()

    def restore(self) -> None:
        """Undoes `convert_in_place`, except for the weight and the class."""
        for name in ("rule", "plain_dtype", "several_scales", "input_history", "grad_history",
                     "history_before", "channel_amax", "channels_before",
                     "fp8_weight"):  # fmt: skip
            delattr(self, name)

    # The weight

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return self.__dict__.get("_is_fsdp_managed_module", False)

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        # FSDP2 sets this once the weight is a DTensor; FSDP1 first, and then flattens its values.
        if isinstance(self.weight, ScaledTensor):
            raise ValueError(
                f"FullyShardedDataParallel: a {type(self).__name__} of a recipe with f16 masters "
                "cannot be flattened; use quaver.distributed.fully_shard (FSDP2)"
            )
        check_cut(self)
        self.__dict__["_is_fsdp_managed_module"] = value

    @property
    def _distribute_module_applied(self) -> bool:
        # parallelize_module of torch reads this on every rank before it sends the weight.
        if isinstance(self.weight, ScaledTensor):
            raise ValueError(
                f"parallelize_module: torch cannot scatter the f16 master of a "
                f"{type(self).__name__}; use quaver.distributed.parallelize"
            )
        return self.__dict__.get("_distribute_module_applied", False)

    @_distribute_module_applied.setter
    def _distribute_module_applied(self, value: bool) -> None:
        self.__dict__["_distribute_module_applied"] = value

    def refresh(self) -> GemmWeight | None:
        """The FP8 copies of a master, encoded anew if it changed since. None where the weight is
        cast at each use: a plain weight, a shard, or a weight that FSDP2 gathered."""
        weight = self.weight
        kept = (
            self.rule.cache == "master"
            and isinstance(weight, ScaledTensor)
            and not weight.is_transient
            and not weight.is_inference()  # it has no version by which a write would show
            and self.channel_amax is None
            # Another process's writes change no version here.
            and not (weight.device.type == "cpu" and weight.qdata.is_shared())
        )
        copies = weight.__dict__.get("fp8_weight")
        if not kept:
            copies = None
            weight.__dict__.pop("fp8_weight", None)
        elif copies is None or copies.q.device != weight.device:
            copies = weight.fp8_weight = GemmWeight.of(weight, self.rule.weight)
        elif copies.version != weight._version:
            with torch.inference_mode(False):
                copies.rewrite(weight.detach())
        if vars(self).get("fp8_weight", self) is not copies:
            self.fp8_weight = copies  # compiled graphs read them from here, not from the weight
        return copies

    def operands(self, channels: Tensor | None = None) -> Cast | tuple[None, ...]:
        """The weight's codes [N, K], with the transposed codes [K, N]. All None where the product
        casts the weight; None for the transposed codes where backward casts it again."""
        rule = self.rule

        def make(both: bool = True) -> Cast:
            codes = cast_weight(
                self.weight, rule.weight, both=both or self.input_major,
                channels=channels_of(channels, self.input_major), grain=rule.weight_grain,
                power_of_two=rule.power_of_two,
            )  # fmt: skip
            return codes.transposed() if self.input_major else codes

        copies = self.fp8_weight if torch.compiler.is_compiling() else self.refresh()
        if copies is not None:
            codes = Cast(copies.q, copies.scale, copies.qt, copies.scale)
            return codes.transposed() if self.input_major else codes
        kept = cached_cast(self, self.weight, make) if channels is None else None
        if kept is not None:
            return kept
        if channels is None and not isinstance(self.weight, ScaledTensor):
            return _NONE
        return make(both=False)._replace(qt=None)

    def all_gather_codes(self, shard: ScaledTensor) -> tuple[Tensor, Tensor]:
        """The codes and scale that FSDP2 gathers of a shard of the weight."""
        return shard_codes(shard, self.rule.weight)

    def channels(self) -> Tensor | None:
        """The powers of two [K] that divide the next input and multiply the weight's columns, from
        the amaxes of the forwards before; None without Smooth-SwiGLU. When
        activation checkpointing runs a forward again, they are those of the first run."""
        if self.channel_amax is None:
            return None
        if torch.compiler.is_compiling():  # a checkpoint in the graph keeps no attribute
            return smooth(self.channel_amax)
        if in_backward() and self.channels_before is not None:
            return self.channels_before
        self.channels_before = smooth(self.channel_amax)
        return self.channels_before

    @torch.no_grad()
    def record_channels(self, channel_amax: Tensor) -> None:
        """Records the channel amaxes for the next `channels`; ignores those that are not finite."""
        new = torch.where(channel_amax.isfinite(), channel_amax, self.channel_amax)
        self.channel_amax.copy_(new)

    # The forward

    def input_codes(self, x: Tensor, both: bool):
        """The input's codes, with their transpose where `both`, or None: the product casts it, by
        the history that follows, and calls the function that follows, if any, with the Cast."""
        rule = self.rule
        ready = quantized(x, rule.input)
        if ready is not None:
            return ready, None, None
        shared, keep = shared_cast(
            x,
            (both, rule.input, self.training, rule.scaling, rule.grain, rule.kept,
             rule.power_of_two),
        )  # fmt: skip
        if shared is not None:
            return shared, None, None
        return None, cast_history(self, self._buffers["input_history"]), keep

    def check_input(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: the input's last axis must be {self.in_features}, got "
                f"{tuple(x.shape)}"
            )
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{type(self).__name__}: input must be float32, float16 or bfloat16, got {x.dtype}"
            )
        check_devices(self, x.device)

    def forward(self, x: Tensor, channels: Tensor | None = None) -> Tensor:
        """`channels`: the factors by which x's producer, an FP8 MLP, has already divided it."""
        self.check_input(x)
        if self.plain:
            return fallback.multiply(self, x if channels is None else x * channels.to(x.dtype))
        if channels is None and self._buffers["channel_amax"] is not None:
            channels = self.channels()
            x = x / channels.to(x.dtype)
        return self.multiply(x, self.bias, self.operands(channels), channels)

    def multiply(self, x: Tensor, bias: Tensor | None, operands, channels: Tensor | None = None,
                 exchange: Exchange | None = None) -> Tensor:  # fmt: skip
        """The layer's product of x and the weight's `operands`, in the layer's output dtype."""
        out, rule, weight = output_dtype(x), self.rule, self.weight
        learns = torch.is_grad_enabled() and weight.requires_grad
        codes, history, keep = self.input_codes(x, learns and rule.weight_product == "fp8")
        # FSDP2 reduces gradients itself, from full precision.
        whole = not getattr(weight, "is_transient", False)
        y = Product.apply(
            x, weight, bias, *(codes or _NONE), *operands, channels, history,
            self._buffers["grad_history"] if self.training else None, rule.input, rule.weight,
            rule.grad_output, product_dtype(out), rule.weight_grad if whole else "f32",
            rule.grad_accumulate, learns, self.input_major, exchange, keep, rule.grain,
            rule.power_of_two, rule.weight_product, rule.kept,
        )  # fmt: skip
        return y if y.dtype == out else y.to(out)

    def _apply(self, fn, recurse=True):
        with kept_histories(self, "input_history", "grad_history", "channel_amax"):
            super()._apply(fn, recurse)
        # plain_dtype follows the model's dtype, which a weight that is bf16 by the recipe hides.
        self.plain_dtype = fn(torch.empty(0, dtype=self.plain_dtype)).dtype
        copies = self.weight.__dict__.get("fp8_weight")
        if copies is not None:
            copies.version = -1  # assigning .data does not change the version
        self.refresh()
        return self

    def __getstate__(self):
        """The state for copies and pickle, without the weight's FP8 copies: pickle has no FP8."""
        return {**self.__dict__, "fp8_weight": None}

    @property
    def weight_master_scale(self) -> Tensor:
        """The state_dict's entry, as the attribute that torch.distributed.checkpoint reads."""
        return master_scale(self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            save_master(self.weight, destination, f"{prefix}weight")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict = load_master(self.weight, state_dict, f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh()

    def extra_repr(self) -> str:
        rule = self.rule
        grain = "" if rule.grain == "tensor" else f"{rule.grain} scales, "
        return f"{super().extra_repr()}, {grain}{rule.scaling} scaling, {rule.master} weight"


class Linear(LinearBase, nn.Linear):
    """nn.Linear that multiplies in FP8 by a recipe. Made by `quaver.convert`, or by hand:

        Linear(in_features, out_features, bias=True, recipe="fp8lm-o2")

    Input [..., K], output [..., N]; dtypes and errors are LinearBase's.

    Raises:
        ValueError: a recipe without FP8 linear layers.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None,
                 recipe="fp8lm-o2"):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.convert_in_place(recipe)


class Conv1D(LinearBase, Swapped):
    """transformers' Conv1D, a linear layer whose weight is [K, N], as `quaver.convert` makes it.
    The parameter and its name in state dicts stay as they were."""

    input_major = True

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]


class SwappedLinear(Swapped, Linear):
    """A layer of one of the subclasses of nn.Linear in LINEARS, as `quaver.convert` makes it."""


# nn.Linear and the subclasses that compute as it does, which integrations add (torchtitan's).
# Others stay: their forward, or the module that holds them, may read the weight in its own way.
LINEARS: set[type] = {nn.Linear}


def is_converted(module: nn.Module) -> bool:
    """Whether `convert` made this linear layer, and nothing has changed its class since."""
    kind = type(module)
    return kind is Linear or kind.__bases__[0] in (Conv1D, SwappedLinear)


def product_dtype(out: torch.dtype) -> torch.dtype:
    """The dtype of the product of a layer whose output is `out`."""
    return torch.bfloat16 if out == torch.bfloat16 else torch.float32


def smooth(channel_amax: Tensor) -> Tensor:
    """Powers of two that bring each channel's amax into [1/2, 1), if it is divided by them:
    Smooth-SwiGLU (arXiv 2409.12517, section 4.4). 1 for a channel without values."""
    _, exponent = torch.frexp(channel_amax)
    usable = (channel_amax > 0) & channel_amax.isfinite()
    exponent = torch.where(usable, exponent, 0).clamp(-100, 100)  # so that 1 / it is finite too
    return torch.ldexp(torch.ones_like(channel_amax), exponent)
