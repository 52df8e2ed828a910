"""Typed wrappers over torch.ops.quaver, with fake kernels for torch.compile.

Scales are decode multipliers, float32, on the tensor's device: x ~= scale * q.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tensor import GROUP, ScaledTensor

_ops = torch.ops.quaver
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


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


class Grouped(NamedTuple):
    """A matrix saved for backward: e4m3 codes [R, C] in groups of 1 x `block` along the last axis.

    Scales are powers of two, one byte each, 2^(byte - 127): uint8 [R, ceil(C / block)]. Not
    float8_e8m0fnu, the dtype of that format: Inductor takes no op that may write and returns one.
    """

    codes: Tensor
    scale: Tensor
    block: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * codes as a plain tensor."""
        scale = self.scale.view(torch.float8_e8m0fnu).float()
        return _ops.dequantize(self.codes, scale, dtype, "block", self.block)


class Normalized(NamedTuple):
    """What `normalize` gives: both layouts of the result and what its backward needs."""

    q: ScaledTensor
    qt: ScaledTensor
    saved: Grouped
    mean: Tensor
    rstd: Tensor


class Activated(NamedTuple):
    """What `activate` gives: both layouts of the result and what its backward needs."""

    q: ScaledTensor
    qt: ScaledTensor
    x: Grouped
    up: Grouped | None
    channel_amax: Tensor | None


def normalize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    centered: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale: Tensor | None = None,
    history: Tensor | None = None,
    power_of_two: bool = True,
    block: int = 32,
) -> Normalized:
    """RMSNorm (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450) if `centered`, cast to FP8.

    y = (x - mean) * rstd * weight + bias in f32 with rstd = 1 / sqrt(mean((x - mean)^2) + eps).
    q [R16, C16] and qt [C16, R16] are y and its transpose under one scale, padded with zeros to
    multiples of 16 in both axes, as `gemm` wants them. `saved` is x in FP8 (COAT, arXiv 2410.19313,
    section 4). Row sums have a fixed order (normalize.h): the same bits on every device.

    Args:
        x: [R, C] float32, float16 or bfloat16, any strides.
        weight, bias: [C] of any of these types.
        dtype: float8_e4m3fn or float8_e5m2, of q and qt.
        scale, history, power_of_two: as in `quantize`; with neither, just in time.
        block: values per scale of `saved`.

    Returns:
        `mean` is float32 [R] if centered, else [0]; `rstd` float32 [R]. A row whose squares
        overflow or are not finite is NaN, which the amax of q shows.

    Raises RuntimeError for shapes and types that do not fit.
    """
    q, qt, scale, amax, codes, scales, mean, rstd = _ops.normalize(
        x, weight, bias, eps, centered, dtype, scale, history, power_of_two, block
    )
    return Normalized(
        ScaledTensor(q, scale, amax, x.dtype),
        ScaledTensor(qt, scale, amax, x.dtype),
        Grouped(codes, scales, block),
        mean,
        rstd,
    )


def normalize_backward(
    dy: Tensor,
    saved: Grouped,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    has_bias: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx [R, C], dweight [C] and dbias [C] (float32) of `normalize`, from its saved FP8 input.

    With xhat = (x - mean) * rstd and g = dy * weight, dx = (g - mean(g) - xhat * mean(g * xhat)) *
    rstd, where mean(g) is LayerNorm's alone. Every sum has a fixed order: bitwise repeatable.

    Args:
        dy: [R, C] float32, float16 or bfloat16.
        saved, mean, rstd: of `normalize`.
        dtype: of dx; None: dy's.

    Raises RuntimeError for shapes and types that do not fit.
    """
    dx, dweight, dbias = _ops.normalize_backward(
        dy, saved.codes, saved.scale, mean, rstd, weight, saved.block, has_bias, dtype or dy.dtype
    )
    return dx, dweight if weight is not None else None, dbias if has_bias else None


def activate(
    x: Tensor,
    up: Tensor | None = None,
    kind: str = "silu",
    channel_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    scale: Tensor | None = None,
    history: Tensor | None = None,
    power_of_two: bool = True,
    block: int = 32,
) -> Activated:
    """f(x) * up (SwiGLU and GeGLU, arXiv 2002.05202), or f(x), cast to FP8 in both layouts.

    Computed in f32 from the exact x and up; what is saved for backward are their FP8 copies (COAT,
    arXiv 2410.19313, section 4). q and qt are as `normalize` gives them.

    Args:
        x, up: [R, C] float32, float16 or bfloat16, both alike.
        kind: f is "silu", "gelu" (with erf) or "gelu_tanh".
        channel_scale: float32 [C] that multiplies the result before it is cast (Smooth-SwiGLU,
            arXiv 2409.12517); `channel_amax` [C] is then the largest |f(x) * up| of each column.
        dtype, scale, history, power_of_two, block: as in `normalize`.

    Raises RuntimeError for shapes, types and kinds that do not fit.
    """
    q, qt, scale, amax, xq, xscale, uq, uscale, channel_amax = _ops.activate(
        x, up, kind, channel_scale, dtype, scale, history, power_of_two, block
    )
    return Activated(
        ScaledTensor(q, scale, amax, x.dtype),
        ScaledTensor(qt, scale, amax, x.dtype),
        Grouped(xq, xscale, block),
        None if up is None else Grouped(uq, uscale, block),
        None if channel_scale is None else channel_amax,
    )


def activate_backward(
    dy: Tensor,
    x: Grouped,
    up: Grouped | None = None,
    kind: str = "silu",
    channel_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e5m2,
    *,
    x_history: Tensor | None = None,
    up_history: Tensor | None = None,
    power_of_two: bool = True,
) -> tuple[ScaledTensor, ScaledTensor, ScaledTensor | None, ScaledTensor | None]:
    """dx, dx.T, dup and dup.T of `activate` in FP8, from its saved inputs; padded like its result.

    With g = dy * channel_scale: dx = g * up * f'(x) and dup = g * f(x).

    Args:
        dy: [R, C] float32, float16 or bfloat16.
        x, up, kind, channel_scale: of `activate`.
        x_history, up_history: delayed scaling of dx and of dup, as in `quantize`.

    Raises RuntimeError for shapes, types and kinds that do not fit.
    """
    q, qt, scale, amax, uq, uqt, uscale, uamax = _ops.activate_backward(
        dy, x.codes, x.scale, up and up.codes, up and up.scale, kind, channel_scale, x.block, dtype,
        x_history, up_history, power_of_two,
    )  # fmt: skip
    dx, dxt = (ScaledTensor(t, scale, amax, dy.dtype) for t in (q, qt))
    if up is None:
        return dx, dxt, None, None
    return dx, dxt, *(ScaledTensor(t, uscale, uamax, dy.dtype) for t in (uq, uqt))


def gemm(
    a: ScaledTensor,
    b: ScaledTensor,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    fast_accumulate: bool = True,
    out_scale: Tensor | None = None,
) -> Tensor | ScaledTensor:
    """scale_a * scale_b * a @ b.T + bias, in TN layout with f32 accumulation.

    Args:
        a, b: FP8 [M, K] and [N, K], per-tensor or per-row scales; any mix of e4m3 and e5m2 (CUDA:
            not both e5m2, and N and K are multiples of 16).
        out_dtype: bfloat16, float16, float32, or with `out_scale` an FP8 type (ignored where `out`
            is given).
        bias: [N], added before the one rounding to the output type.
        out: [M, N] to write; with `accumulate` the product is added to it.
        fast_accumulate: on Hopper, keep partial sums in the tensor core's 14-bit accumulator;
            otherwise they are promoted to f32. The CPU always accumulates in f32.
        out_scale: decode scale, float32 [], to encode an FP8 result with. The result is then a
            ScaledTensor whose amax is that of the product, from which the next scale can be chosen.

    Raises:
        TypeError: an operand that is no ScaledTensor.
        ValueError: `accumulate` without `out`; an FP8 `out_dtype` without `out_scale`, or
            `out_scale` with anything else.
        RuntimeError: shapes and types that do not fit.
    """
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, ScaledTensor):
            raise TypeError(f"gemm: {name} must be a ScaledTensor, got {type(t).__name__}")
        if t.granularity == "block":
            raise ValueError(f"gemm: {name} has block scales; wanted tensor or row scales")
    operands = a.qdata, a.scale, b.qdata, b.scale
    if out is not None:
        if out_scale is not None:
            raise ValueError("gemm: out_scale goes with an FP8 out_dtype, not with out=")
        _ops.gemm_(out, *operands, bias, accumulate, fast_accumulate)
        return out
    if accumulate:
        raise ValueError("gemm: accumulate needs out=")
    if (out_scale is not None) != (out_dtype in FP8):
        raise ValueError(
            f"gemm: out_scale and an FP8 out_dtype go together, got out_dtype {out_dtype} "
            f"{'without' if out_scale is None else 'with'} out_scale"
        )
    if out_scale is None:
        return _ops.gemm(*operands, bias, out_dtype, fast_accumulate)
    q, amax = _ops.gemm_quantize(*operands, bias, out_dtype, out_scale, fast_accumulate)
    return ScaledTensor(q, out_scale, amax)


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


BUCKET_ALIGNMENT = 16  # kBucketAlignment of all_reduce.h


def bucket_length(numel: int) -> int:
    """Places that a tensor takes in a bucket."""
    return -(-numel // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT


def share_scales(
    amaxes: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, mu: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decode scales for the values of every rank, and for their sum (FP8-LM, equation 4).

    Args:
        amaxes: float32 [ranks, tensors], the same on every rank.
        dtype: float8_e4m3fn or float8_e5m2.
        mu: float32 [tensors]. With it, partial sums of mu * value are to stay in the format
            (equation 3) and both scales are one. Without, a sum cannot overflow its scale.

    Returns:
        Two float32 [tensors], powers of two; 1 where an amax is not finite.
    """
    return _ops.share_scales(amaxes, mu, dtype)


def pack(
    tensors: list[Tensor],
    dtype: torch.dtype,
    length: int,
    scales: Tensor | None = None,
) -> Tensor:
    """One bucket [length] of `dtype` with all tensors, each encoded once by its place in `scales`.

    Tensor i follows tensor i - 1 at the next multiple of 16 places; between and behind them are
    zeros. Tensors are plain or ScaledTensors with one scale. FP8 needs `scales`, float32 [tensors];
    other types are scaled by 1 without. Raises RuntimeError where they do not fit.
    """
    values, own, _ = parts(tensors)
    return _ops.pack(values, own, scales, dtype, length)


def reduce_shards(
    shards: Tensor,
    sizes: list[int],
    first: int = 0,
    scales: Tensor | None = None,
    sum_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over ranks of one shard of their buckets: f32, in rank order.

    Args:
        shards: [ranks, length] codes of any format; length a multiple of 16.
        sizes: elements of each tensor of the bucket (see `pack`).
        first: the shard's first place in the bucket, a multiple of 16.
        scales: float32 [tensors], decode scales of the codes; None for 1.
        sum_scales: float32 [tensors], decode scales of the result; None for 1.
        dtype: of the result: the codes' (default) or float32.

    Returns:
        The shard of the sum [length]; float32 [tensors], the amax of the sums of each tensor's part
        in the shard, before they were encoded; int32 [tensors], how many results are at FP8's
        finite maximum.
    """
    return _ops.reduce_shards(shards, scales, sum_scales, sizes, first, dtype or shards.dtype)


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


def _both_layouts(like, rows, cols, dtype):
    """q and qt padded for `gemm`, scale and amax."""
    rows, cols = ((n + 15) // 16 * 16 for n in (rows, cols))
    q, qt = (like.new_empty(shape, dtype=dtype) for shape in ([rows, cols], [cols, rows]))
    return q, qt, *(like.new_empty([], dtype=torch.float32) for _ in range(2))


def _grouped(like, block):
    rows, cols = like.shape
    scale = like.new_empty([rows, (cols + block - 1) // block], dtype=torch.uint8)
    return like.new_empty([rows, cols], dtype=torch.float8_e4m3fn), scale


@torch.library.register_fake("quaver::normalize")
def _(x, weight, bias, eps, centered, dtype, scale, history, power_of_two, block):
    rows, cols = x.shape
    mean, rstd = (x.new_empty([n], dtype=torch.float32) for n in (rows if centered else 0, rows))
    return *_both_layouts(x, rows, cols, dtype), *_grouped(x, block), mean, rstd


@torch.library.register_fake("quaver::normalize_backward")
def _(dy, xq, xscale, mean, rstd, weight, block, has_bias, dx_dtype):
    rows, cols = dy.shape
    return (
        dy.new_empty([rows, cols], dtype=dx_dtype),
        dy.new_empty([0 if weight is None else cols], dtype=torch.float32),
        dy.new_empty([cols if has_bias else 0], dtype=torch.float32),
    )


@torch.library.register_fake("quaver::activate")
def _(x, up, kind, channel_scale, dtype, scale, history, power_of_two, block):
    rows, cols = x.shape
    none = [x.new_empty([0], dtype=t) for t in (torch.float8_e4m3fn, torch.uint8)]
    return (
        *_both_layouts(x, rows, cols, dtype),
        *_grouped(x, block),
        *(none if up is None else _grouped(x, block)),
        x.new_empty([0 if channel_scale is None else cols], dtype=torch.float32),
    )


@torch.library.register_fake("quaver::activate_backward")
def _(
    dy, xq, xscale, uq, uscale, kind, channel_scale, block, dtype, x_history, up_history,
    power_of_two,
):  # fmt: skip
    rows, cols = dy.shape
    none = [dy.new_empty([0], dtype=t) for t in (dtype, dtype, torch.float32, torch.float32)]
    dup = none if uq is None else _both_layouts(dy, rows, cols, dtype)
    return *_both_layouts(dy, rows, cols, dtype), *dup


@torch.library.register_fake("quaver::gemm")
def _(a, scale_a, b, scale_b, bias, out_dtype, fast_accumulate):
    return a.new_empty([a.shape[0], b.shape[0]], dtype=out_dtype)


@torch.library.register_fake("quaver::gemm_")
def _(out, a, scale_a, b, scale_b, bias, accumulate, fast_accumulate):
    return None


@torch.library.register_fake("quaver::gemm_quantize")
def _(a, scale_a, b, scale_b, bias, out_dtype, out_scale, fast_accumulate):
    q = a.new_empty([a.shape[0], b.shape[0]], dtype=out_dtype)
    return q, a.new_empty([], dtype=torch.float32)


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


@torch.library.register_fake("quaver::share_scales")
def _(amaxes, mu, dtype):
    scales = amaxes.new_empty([amaxes.shape[1]], dtype=torch.float32)
    return scales, torch.empty_like(scales)


@torch.library.register_fake("quaver::pack")
def _(tensors, tensor_scales, scales, dtype, length):
    return tensors[0].new_empty([length], dtype=dtype)


@torch.library.register_fake("quaver::reduce_shards")
def _(shards, scales, sum_scales, sizes, first, dtype):
    out = shards.new_empty([shards.shape[1]], dtype=dtype)
    amax = shards.new_empty([len(sizes)], dtype=torch.float32)
    return out, amax, torch.empty_like(amax, dtype=torch.int32)


@torch.library.register_fake("quaver::encode_state")
def _(x, dtype, expand):
    groups = (x.numel() + GROUP - 1) // GROUP
    return x.new_empty(x.shape, dtype=dtype), x.new_empty([groups], dtype=torch.float32)


@torch.library.register_fake("quaver::decode_state")
def _(q, scale, expand):
    return q.new_empty(q.shape, dtype=torch.float32)
