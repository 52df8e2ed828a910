"""FP8 matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._C import set_sm_margin
from .._C import sm_margin as current_margin
from ..tensor import ScaledTensor
from .fake import fake
from .quantize import check_scale

_ops = torch.ops.quaver
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@contextmanager
def sm_margin(count: int) -> Iterator[None]:
    """Inside the block FP8 products on Hopper leave `count` multiprocessors free, so that a message
    beside them (`distributed.ddp`'s, NCCL's) does not wait until a product has ended.

        with qv.ops.sm_margin(16):
            loss.backward()

    It holds for all threads of the process, backward's too, and never leaves a product less than
    two multiprocessors. A CUDA graph keeps the margin of its capture. Products of other GPUs, whose
    kernels are not persistent, do without.

    Raises ValueError for a count that is no int from 0 on.
    """
    if type(count) is not int or not 0 <= count < 2**31:
        raise ValueError(f"sm_margin: count must be an int from 0 on, got {count!r}")
    before = current_margin()
    set_sm_margin(count)
    try:
        yield
    finally:
        set_sm_margin(before)


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
        a, b: FP8 [M, K] and [N, K]; any mix of e4m3 and e5m2 (CUDA: not both e5m2; N, K and
            pointers that are no multiples of 16 are slow). Each has scales of its own: of the
            tensor, of rows, of 1 x 128 blocks or of 128 x 128 tiles. A CPU with AVX2 applies them
            to sums; one with AMX decodes operands of a bf16 product to bf16, which rounds where
            there are several scales, unless those are powers of two.
            Hopper has kernels for blocks of `a` by tiles or blocks of `b`, both e4m3, and a result
            that is not FP8; sums are scaled and promoted to f32 each 128 of K. CUDA decodes
            operands with other blocks or tiles, and multiplies by torch's product, in f32 where the
            result is not bf16 or there is a bias or an addend.
        out_dtype: bfloat16, float16, float32, or with `out_scale` an FP8 type (ignored where `out`
            is given).
        bias: [N], added before the one rounding to the output type.
        out: [M, N] to write; with `accumulate` the product is added to it.
        fast_accumulate: on GPUs from sm_89 on, keep partial sums in the tensor core's accumulator,
            of 14 bits on sm_89 and sm_90; otherwise they are promoted to f32. The CPU and older
            GPUs always accumulate in f32.
        out_scale: decode scale, float32 [], to encode an FP8 result with. The result is then a
            ScaledTensor whose amax is that of the product, from which the next scale can be chosen.

    Raises:
        TypeError: an operand that is no ScaledTensor.
        ValueError: scales of other blocks; `accumulate` without `out`; an FP8 `out_dtype` without
            `out_scale`, or `out_scale` with anything else, or one on the CPU that is not positive
            and finite.
        RuntimeError: shapes and types that do not fit.
    """
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, ScaledTensor):
            raise TypeError(f"gemm: {name} must be a ScaledTensor, got {type(t).__name__}")
        if t.qlayout.grain == "flat" or (t.qlayout.grain == "block" and t.qlayout.block != 128):
            raise ValueError(
                f"gemm: {name} has scales of {t.qlayout}; wanted those of the tensor, of rows, of "
                "1 x 128 blocks or of 128 x 128 tiles"
            )
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
    check_scale("gemm: out", out_scale)
    if out_scale is None:
        return _ops.gemm(*operands, bias, out_dtype, fast_accumulate)
    q, amax = _ops.gemm_quantize(*operands, bias, out_dtype, out_scale, fast_accumulate)
    return ScaledTensor(q, out_scale, amax)


@fake("gemm")
def _(a, scale_a, b, scale_b, bias, out_dtype, fast_accumulate=True):
    return a.new_empty([a.shape[0], b.shape[0]], dtype=out_dtype)


@fake("gemm_")
def _(out, a, scale_a, b, scale_b, bias=None, accumulate=False, fast_accumulate=True):
    return None


@fake("gemm_quantize")
def _(a, scale_a, b, scale_b, bias, out_dtype, out_scale, fast_accumulate=True):
    q = a.new_empty([a.shape[0], b.shape[0]], dtype=out_dtype)
    return q, a.new_empty([], dtype=torch.float32)
