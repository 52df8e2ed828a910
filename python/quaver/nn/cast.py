"""FP8 casts of inputs and output gradients, and the casts that layers share."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import FLAT_BLOCK, Layout
from ..tensor import ScaledTensor
from .swap import Swapped

_ops = torch.ops.quaver

ALIGNMENT = 16  # of every GEMM dimension, for the tensor cores
HISTORY_STATE = 17  # count and 16 amaxes; scale.h


class Cast(NamedTuple):
    """A matrix [R, C] in FP8, padded with zeros to multiples of 16, in the layouts that products
    read: q [R, C] under `scale` and, or None, its transpose qt [C, R] under `qt_scale`. A tensor's
    one scale is both; those of rows or blocks are each layout's own."""

    q: Tensor
    scale: Tensor
    qt: Tensor | None
    qt_scale: Tensor

    def transposed(self) -> Cast:
        return Cast(self.qt, self.qt_scale, self.q, self.scale)


def cast(
    x: Tensor,
    dtype: torch.dtype,
    *,
    both: bool,
    scale: Tensor | None = None,
    history: Tensor | None = None,
    grain: str = "tensor",
    power_of_two: bool = True,
    rows: bool = True,
    tiles_t: bool = False,
) -> Cast:
    """x [R, C] in FP8, with its transpose where `both`. The scale is `scale`, or that of delayed
    scaling by `history`, or just in time, and then NaN where a value of x is not finite. Scales of
    another `grain` than the tensor's are chosen just in time; q is then empty without `rows`, and
    the transpose has those of tiles with `tiles_t`."""
    if grain != "tensor":
        q, used, qt, qt_scale = _ops.cast_layouts(
            x, dtype, grain, rows, both, power_of_two, tiles_t
        )
        return Cast(q, used, qt if both else None, qt_scale)
    x = pad(x)
    if both:
        q, qt, used, amax = _ops.cast_transpose(x, dtype, scale, history)
    else:
        qt = None
        q, used, amax = _ops.quantize(x, dtype, scale, history)
    if scale is None:
        used = nan_unless_finite(used, amax)
    return Cast(q, used, qt, used)


def pad(x: Tensor) -> Tensor:
    """A matrix with zeros up to multiples of 16 in both axes."""
    rows, cols = (-n % ALIGNMENT for n in x.shape)
    if not rows and not cols:
        return x
    plain = x.view(torch.uint8) if x.element_size() == 1 else x  # not every torch pads FP8
    return F.pad(plain, (0, cols, 0, rows)).view(x.dtype)


def transpose_codes(codes: Tensor) -> Tensor:
    """The contiguous transpose of FP8, which torch copies as bytes fastest."""
    return codes.view(torch.uint8).t().contiguous().view(codes.dtype)


def matrix(x: Tensor) -> Tensor:
    """x, of shape [..., C], as [R, C]. reshape(-1, C) would fail where C is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def nan_unless_finite(scale: Tensor, amax: Tensor) -> Tensor:
    """The scale, or NaN where the amax is not finite: FP8 saturates an infinity to a number, which
    would pass for a sound one all the way into the weights."""
    return scale + (amax - amax)


def activation(q, qt, scale, shape, dtype: torch.dtype, qt_scale=None) -> ScaledTensor:
    """The tensor of `shape` that a fused op cast into both padded GEMM layouts, with NaN in a scale
    where a value is not finite: linear layers do not look at an amax. With `qt_scale` both layouts
    have scales of their own, those of q in 1 x 128 blocks."""
    rows, cols = math.prod(shape[:-1]), shape[-1]
    if q.shape != (rows, cols):
        q = q[:rows, :cols].contiguous()
    if qt_scale is None:
        return ScaledTensor(q.view(shape), scale, None, dtype, qt=qt)
    if len(scale) != rows:
        scale = scale[:rows].contiguous()
    scale = scale.view(*shape[:-1], scale.shape[1])
    return ScaledTensor(
        q.view(shape), scale, None, dtype, Layout.of(q.dtype, "block"), qt, qt_scale
    )


def quantized(x: Tensor, dtype: torch.dtype) -> Cast | None:
    """The cast of an x that its producer has already quantized to `dtype`, else None."""
    if not isinstance(x, ScaledTensor) or x.qt is None or x.qdata.dtype != dtype:
        return None
    q = pad(matrix(x.qdata))
    if x.qt_scale is None:
        return Cast(q, x.scale, x.qt, x.scale)
    scale = matrix(x.scale)
    if len(scale) != len(q):
        scale = F.pad(scale, (0, 0, 0, len(q) - len(scale)), value=1.0)
    return Cast(q, scale, x.qt, x.qt_scale)


def row_scales(scale: Tensor, rows: int) -> Tensor:
    """The scales of 1 x 128 blocks of `rows` rows that mean what `scale` means, which has those of
    128 x 128 tiles or already has those of blocks. A product's first operand takes no tiles."""
    if scale.dim() != 2 or len(scale) == rows:
        return scale
    return scale.repeat_interleave(FLAT_BLOCK, 0)[:rows].contiguous()


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a layer's output: autocast's where it is on, else the input's."""
    kind = x.device.type  # autocast does not exist on meta
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def check_devices(module: nn.Module, device: torch.device) -> None:
    """RuntimeError where a parameter or buffer of the module itself is on another device."""
    if torch.compiler.is_compiling():
        return
    for tensors in (module._parameters, module._buffers):  # getattr would search for each
        for name, t in tensors.items():
            if t is not None and t.device != device:
                raise RuntimeError(
                    f"{type(module).__name__}: the input is on {device} and {name} on {t.device}; "
                    "move the model with .to()"
                )


def in_backward() -> bool:
    """Whether a backward runs in this thread; a forward inside it recomputes a checkpoint's. False
    in a compiled graph, which does not know its caller."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def new_history(device: torch.device) -> Tensor:
    """The state of delayed scaling before the first cast."""
    return torch.zeros(HISTORY_STATE, dtype=torch.float32, device=device)


def cast_history(module: nn.Module, history: Tensor | None) -> Tensor | None:
    """The history that a forward cast of `module` reads and updates.

    Evaluation casts just in time and does not change it. Activation checkpointing runs a forward
    again inside the backward: that one reads a copy of the history from before the first forward,
    so that both give the same codes and only the first is recorded. The first runs without
    gradients, or under hooks on what it saves; other forwards copy nothing.
    """
    history = history if module.training else None
    if history is None or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return history
    if in_backward():
        return None if module.history_before is None else module.history_before.clone()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None or not torch.is_grad_enabled():
        module.history_before = history.clone()
    return history


@contextmanager
def kept_histories(module: nn.Module, *names: str) -> Iterator[None]:
    """Around nn.Module._apply: amax histories stay float32 where the module's dtype changes, and
    are new ones where it leaves the meta device, since `to_empty` gives them no values."""
    before = {name: getattr(module, name) for name in names}
    yield
    for name, old in before.items():
        state = getattr(module, name)
        if state is None:
            continue
        if old.is_meta and not state.is_meta:
            state.zero_()  # as `new_history` is
        if state.dtype != torch.float32:
            setattr(module, name, state.float())


class _Thread(threading.local):
    """The last input cast of each `shared_casts` that this thread runs, innermost last."""

    def __init__(self):
        self.scopes: list[list] = []


_thread = _Thread()


class shared_casts:
    """Inside the block linear layers that read one tensor share its FP8 cast, and so its saved
    copy: q, k and v, or gate and up. Only the last input's cast is kept, until the block ends. A
    compiled graph casts once a layer."""

    def __enter__(self) -> None:
        self.eager = not torch.compiler.is_compiling()
        if self.eager:
            _thread.scopes.append([None, None, None])

    def __exit__(self, *error) -> None:
        if self.eager:
            _thread.scopes.pop()


def shared_cast(x: Tensor, key: tuple) -> tuple[Cast | None, Callable[[Cast], None] | None]:
    """The cast that this scope keeps of the same x and key; or None, and what keeps one that is
    made now, where there is a scope."""
    if torch.compiler.is_compiling() or not _thread.scopes or x.is_inference():
        return None, None  # inference tensors have no version by which a write would show
    scope = _thread.scopes[-1]
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    key = (*key, x._version, stream)
    if scope[0] is not None and scope[0]() is x and scope[1] == key:
        return scope[2], None

    def keep(made: Cast) -> None:
        scope[:] = weakref.ref(x), key, made

    return None, keep


class Holder(Swapped):
    """A module that holds linear layers which may read one input: its forward is a
    `shared_casts`."""

    @staticmethod
    def members(base: type) -> dict:
        @functools.wraps(base.forward)
        def forward(self, *args, **kwargs):
            with shared_casts():
                return base.forward(self, *args, **kwargs)

        return {"forward": forward}
