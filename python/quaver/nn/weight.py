"""A linear layer's weight in FP8: cast at each use, or kept where every write is intercepted.

Any code may write a plain parameter without a trace (`.data`, fused optimizers, collectives,
NumPy), so nothing made of one outlives a forward and its backward. A ScaledTensor sees each write.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe as recipes
from ..layout import Layout
from ..tensor import ScaledTensor, encode
from .cast import Cast, cast, nan_unless_finite, pad, transpose_codes

_ops = torch.ops.quaver

MASTER_TO_FP8 = 128.0  # kMasterToFp8 of dtype.h


def cast_weight(
    weight: Tensor,
    dtype: torch.dtype,
    *,
    both: bool,
    scale: Tensor | None = None,
    channels: Tensor | None = None,
    grain: str = "tensor",
    power_of_two: bool = True,
    rows: bool = True,
) -> Cast:
    """The FP8 codes of a weight as it lies, and of its transpose where `both`.

    Args:
        scale: that of an earlier cast of this weight, which then gives the same codes; None
            chooses it. The scale of a ScaledTensor decides alone.
        channels: float32 that multiplies the weight first, as `channels_of` gives it.
        grain, power_of_two: of the scales. A frozen weight has those that it was frozen with.
        rows: False leaves the first codes empty where the transposed ones do not need them.
    """
    weight = weight.detach()
    if isinstance(weight, ScaledTensor):
        if weight.qdata.dtype == dtype:  # frozen, or another rank's: only the codes exist here
            return _frozen_cast(weight, both)
        if channels is None:  # e4m3 of the f16 codes: the scales differ by exactly 2^7
            step = weight.scale.new_full((), MASTER_TO_FP8)
            codes = cast(weight.qdata, dtype, both=both, scale=step)
            scale = weight.scale * MASTER_TO_FP8
            return Cast(codes.q, scale, codes.qt, scale)
        weight = weight.dequantize(torch.float32)
    if channels is not None:
        weight = weight.float() * channels
    return cast(weight, dtype, both=both, scale=scale, grain=grain, power_of_two=power_of_two,
                rows=rows)  # fmt: skip


def channels_of(channels: Tensor | None, input_major: bool) -> Tensor | None:
    """Factors [K] of the inputs, as they multiply a weight [N, K], or one [K, N]."""
    return channels[:, None] if channels is not None and input_major else channels


def _frozen_cast(weight: ScaledTensor, both: bool) -> Cast:
    """The operand that a frozen weight's codes are. Those of rows do not fit the transpose:
    the decoded values are cast again."""
    q, scale = pad(weight.qdata), weight.scale
    if weight.qlayout.grain == "row":
        scale = F.pad(scale, (0, 0, 0, len(q) - len(scale)), value=1.0)
        if both:
            _, _, qt, qt_scale = _ops.cast_layouts(weight.dequantize(torch.float32), q.dtype, "row")
            return Cast(q, scale, qt, qt_scale)
    qt_scale = scale.t().contiguous() if weight.qlayout.grain == "tile" else scale
    return Cast(q, scale, transpose_codes(q) if both else None, qt_scale)


def shard_codes(shard: ScaledTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes of a master or a shard of one as it lies, unpadded, and their scale. Element by
    element, so the shards' codes are the whole weight's. A frozen weight is its codes."""
    if shard.qdata.dtype == dtype:
        return shard.qdata, shard.scale
    step = shard.scale.new_full((), MASTER_TO_FP8)
    q, _, _ = _ops.quantize(shard.qdata, dtype, step)
    return q, shard.scale * MASTER_TO_FP8


@dataclass(eq=False)
class GemmWeight:
    """The FP8 copies of a ScaledTensor master, a pure function of it and so never saved: `q` as
    the weight lies, `qt` its transpose. The optimizer writes them in place with the master; any
    other write of the master is found by its version."""

    q: Tensor
    qt: Tensor
    scale: Tensor
    version: int

    @staticmethod
    def of(weight: ScaledTensor, dtype: torch.dtype) -> GemmWeight:
        # Never inference tensors: the optimizer could not write them later.
        with torch.inference_mode(False), torch.no_grad():
            q, scale, qt, _ = cast_weight(weight, dtype, both=True)
        return GemmWeight(q, qt, scale, weight._version)

    @torch.no_grad()
    def rewrite(self, weight: ScaledTensor) -> None:
        """Encode the changed weight into the same tensors: compiled graphs hold on to them."""
        q, scale, qt, _ = cast_weight(weight, self.q.dtype, both=True)
        for mine, value in zip((self.q, self.qt, self.scale), (q, qt, scale), strict=True):
            mine.copy_(value)
        self.version = weight._version


def convert_weight(weight: nn.Parameter, rule: recipes.LinearRecipe) -> nn.Parameter:
    """The weight as the recipe stores it: the same Parameter, unless that is a ScaledTensor."""
    if rule.master == "as-is" or isinstance(weight, ScaledTensor):
        return weight
    if rule.master == "bf16":
        set_dtype(weight, torch.bfloat16)
        return weight
    q, scale, amax = _ops.quantize(weight.detach(), torch.float16)
    stored = ScaledTensor(q, scale, amax, weight.dtype)
    return nn.Parameter(stored, requires_grad=weight.requires_grad)


def freeze_weight(weight: nn.Parameter, rule: recipes.LinearRecipe) -> nn.Parameter:
    """A weight that does not train, as the codes that products multiply by, and nothing else. Of a
    stack of matrices [E, N, K] each has scales of its own: of its rows, unless the recipe says
    blocks."""
    if isinstance(weight, ScaledTensor):
        return weight
    stack = weight.dim() == 3 and rule.weight_grain == "tensor"
    layout = Layout.of(rule.weight, "row" if stack else rule.weight_grain)
    codes = encode(weight, layout, weight.dtype, power_of_two=rule.power_of_two)
    codes.scale = nan_unless_finite(codes.scale, codes.amax)
    codes.is_frozen = True
    return nn.Parameter(codes, requires_grad=False)


def several_scales(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of a module's weights that are frozen codes with more than one scale."""
    weights = ((name, module._parameters[name]) for name in names)
    return tuple(
        name
        for name, weight in weights
        if isinstance(weight, ScaledTensor) and weight.qlayout.grain != "tensor"
    )


def check_cut(module: nn.Module) -> None:
    """Raises ValueError where a module that FSDP2 cuts has frozen codes with several scales: views
    of those are values, in f32."""
    if module.several_scales:
        raise ValueError(
            f"fully_shard: {module.several_scales[0]} of a {type(module).__name__} is frozen codes "
            "with several scales, which FSDP2 would decode; freeze linear layers under a recipe "
            'with grain="tensor" (tensorwise) and leave stacks of experts by `skip`, or use DDP'
        )


def set_dtype(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Changes the dtype of a plain parameter and of its gradient in place, as Module.to does."""
    grad, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.to(dtype)
    parameter.grad = None if grad is None else grad.to(dtype)


class _Thread(threading.local):
    """{layer: (weight, its version, Cast) or None} of this thread's `cached_weights`."""

    layers: dict | None = None


_thread = _Thread()


@contextlib.contextmanager
def cached_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Casts each weight of `model`'s FP8 layers once inside the block, for several micro-batches;
    it takes 2 bytes a weight there. Yields the model.

        with qv.cached_weights(model):
            for x, y in micro_batches:
                loss_function(model(x), y).backward()
        optimizer.step()

    Change no weight inside: a write that moves no version (`.data`, a fused optimizer) would not be
    seen. Forwards of other threads and compiled ones cast as always.
    """
    before = _thread.layers
    layers = {module: None for module in model.modules() if hasattr(module, "operands")}
    _thread.layers = layers | (before or {})
    try:
        yield model
    finally:
        _thread.layers = before


def cached_cast(layer: nn.Module, weight: Tensor, make) -> Cast | None:
    """The cast that `make()` gave for this weight in the `cached_weights` block; None outside."""
    if torch.compiler.is_compiling() or _thread.layers is None or layer not in _thread.layers:
        return None
    kept = _thread.layers[layer]
    if kept is None or kept[0] is not weight or kept[1] != weight._version:
        kept = _thread.layers[layer] = weight, weight._version, make()
    return kept[2]
