"""Typed wrappers over torch.ops.quaver, with fake kernels for torch.compile.

Scales are decode multipliers, float32, on the tensor's device: x ~= scale * q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tensor import GROUP, ScaledTensor

_ops = torch.ops.quaver
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale: Tensor | None = None,
    granularity: str = "tensor",
    block: int = 128,
    power_of_two: bool = True,
    rounding: str = "nearest",
    seed: int = 0,
    history: Tensor | None = None,
) -> ScaledTensor:
    """Encode x, saturating, with the amax of what was encoded beside it.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        dtype: float8_e4m3fn, float8_e5m2, or float16 (see scale_max in dtype.h).
        scale: decode scale(s) to use, float32; None chooses amax / finite_max just in time.
        granularity: "tensor", "row" or "block" (1 x `block` along the last axis).
        power_of_two: round chosen scales up to a power of two (FP8-LM, section 2.2).
        rounding: "nearest" (ties to even) or "stochastic" (Philox: seed and element index).
        history: float32 [17] state of delayed scaling, read and updated; excludes `scale`.

    Raises:
        ValueError: an unknown rounding.
        RuntimeError: types, shapes or granularities that do not fit, named with what came.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'quantize: rounding must be "nearest" or "stochastic", got {rounding!r}')
    q, scale, amax = _ops.quantize(
        x,
        dtype,
        scale,
        history,
        granularity,
        block,
        power_of_two,
        rounding == "stochastic",
        seed,
    )
    return ScaledTensor(q, scale, amax, x.dtype, granularity, block)


def dequantize(t: ScaledTensor, dtype: torch.dtype | None = None) -> Tensor:
    """scale * q as a plain tensor of `dtype` (default: t's logical dtype)."""
    return t.dequantize(dtype)


def cast_transpose(
    x: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | None = None,
    *,
    power_of_two: bool = True,
    history: Tensor | None = None,
) -> tuple[ScaledTensor, ScaledTensor]:
    """Both GEMM layouts of a matrix from one read: q [R, C] and qt [C, R], one scale and amax.

    Arguments as `quantize`. Raises RuntimeError if x is not a matrix.
    """
    q, qt, scale, amax = _ops.cast_transpose(x, dtype, scale, history, power_of_two)
    return ScaledTensor(q, scale, amax, x.dtype), ScaledTensor(qt, scale, amax, x.dtype)


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    fast_accumulate: bool = True,
) -> Tensor:
    """scale_a * scale_b * a @ b.T + bias, in TN layout with f32 accumulation.

    Args:
        a, b: FP8 [M, K] and [N, K], per-tensor or per-row scales; any mix of e4m3 and e5m2.
        out_dtype: bfloat16 or float32 (ignored where `out` is given).
        bias: [N], added before the one rounding to the output type.
        out: [M, N] to write; with `accumulate` the product is added to it.
        fast_accumulate: on Hopper, keep partial sums in the tensor core's 14-bit accumulator;
            otherwise they are promoted to f32. The CPU always accumulates in f32.

    Raises:
        TypeError: an operand that is no ScaledTensor.
        ValueError: `accumulate` without `out`.
        RuntimeError: shapes and types that do not fit.
    """
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, ScaledTensor):
            raise TypeError(f"gemm: {name} must be a ScaledTensor, got {type(t).__name__}")
        if t.granularity == "block":
            raise ValueError(f"gemm: {name} has block scales; wanted tensor or row scales")
    if out is None:
        if accumulate:
            raise ValueError("gemm: accumulate needs out=")
        return _ops.gemm(a.qdata, a.scale, b.qdata, b.scale, bias, out_dtype, fast_accumulate)
    _ops.gemm_(out, a.qdata, a.scale, b.qdata, b.scale, bias, accumulate, fast_accumulate)
    return out


def none_like(t: Tensor) -> Tensor:
    """The empty tensor that stands for "none" in list arguments."""
    return t.new_empty(0, dtype=torch.float32)


def parts(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Values, scales and amaxes of plain and scaled tensors, as the list ops take them."""
    if not tensors:
        return [], [], []
    first = tensors[0]
    none = none_like(first.qdata if isinstance(first, ScaledTensor) else first)
    low = [isinstance(t, ScaledTensor) for t in tensors]
    if not any(low):
        return list(tensors), [none] * len(low), [none] * len(low)
    pairs = list(zip(tensors, low, strict=True))
    amaxes = [t.amax if scaled else None for t, scaled in pairs]
    return (
        [t.qdata if scaled else t for t, scaled in pairs],
        [t.scale if scaled else none for t, scaled in pairs],
        [none if amax is None else amax for amax in amaxes],
    )


def grad_norm(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two-norm over all gradients (0-D float32) and each one's amax (float32 [n]), in one call.

    Non-finite values show in both, those that FP8 saturated away included. Raises ValueError where
    there is no gradient.
    """
    if not grads:
        raise ValueError("grad_norm: no gradients")
    return _ops.grad_norm(*parts(grads))


def encode_state(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, expand: bool = True):
    """Encode x in groups of 128 flat elements with one float32 scale each, as Adam's moments are.

    Without `expand` a group is x ~= scale * q with scale = amax / finite_max. With it the group's
    dynamic range is first expanded to the format's: see "Dynamic range expansion" in codec.h (COAT,
    arXiv 2410.19313, section 4). Rounds to nearest, but nothing
    else than zero to zero; infinity saturates, NaN stays NaN.

    Args:
        x: float32, float16 or bfloat16, any shape and strides.
        dtype: float8_e4m3fn or float8_e5m2.

    Raises:
        RuntimeError: other types.
    """
    q, scale = _ops.encode_state(x, dtype, expand)
    return ScaledTensor(q, scale, None, torch.float32, "expand" if expand else "group", GROUP)


@torch.library.register_fake("quaver::quantize")
def _(x, dtype, scale, history, granularity, block, power_of_two, stochastic, seed):
    shape = list(x.shape) or [1]
    if granularity == "tensor":
        shape = []
    else:
        shape[-1] = 1 if granularity == "row" else (shape[-1] + block - 1) // block
    q = x.new_empty(x.shape, dtype=dtype)
    return q, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("quaver::dequantize")
def _(q, scale, dtype, granularity, block):
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.register_fake("quaver::cast_transpose")
def _(x, dtype, scale, history, power_of_two):
    rows, cols = x.shape
    scalar = x.new_empty([], dtype=torch.float32)
    return (
        x.new_empty([rows, cols], dtype=dtype),
        x.new_empty([cols, rows], dtype=dtype),
        scalar,
        torch.empty_like(scalar),
    )


@torch.library.register_fake("quaver::gemm")
def _(a, scale_a, b, scale_b, bias, out_dtype, fast_accumulate):
    return a.new_empty([a.shape[0], b.shape[0]], dtype=out_dtype)


@torch.library.register_fake("quaver::gemm_")
def _(out, a, scale_a, b, scale_b, bias, accumulate, fast_accumulate):
    return None


@torch.library.register_fake("quaver::grad_norm")
def _(grads, scales, amaxes):
    norm = grads[0].new_empty([], dtype=torch.float32)
    return norm, grads[0].new_empty([len(grads)], dtype=torch.float32)


@torch.library.register_fake("quaver::accumulate_")
def _(q, scale, amax, other, other_scale, other_amax):
    return None


@torch.library.register_fake("quaver::adam_")
def _(*args, **kwargs):
    return None


@torch.library.register_fake("quaver::encode_state")
def _(x, dtype, expand):
    groups = (x.numel() + GROUP - 1) // GROUP
    return x.new_empty(x.shape, dtype=dtype), x.new_empty([groups], dtype=torch.float32)


@torch.library.register_fake("quaver::decode_state")
def _(q, scale, expand):
    return q.new_empty(q.shape, dtype=torch.float32)
