"""The fake kernels of the grouped ops: a mixture's experts in a few ops instead of a few for each.
nn/grouped.py calls them.

The rows of a matrix [S, C] are sorted by group: those of group e are ends[e - 1] to ends[e], and
rows from ends[-1] on belong to none. `ends` int64 [E] does not fall, and lies on the device.

cast_groups(x [S, C], ends, dtype, granularity, columns, power_of_two, tiles_t):
    q [S, C16] and, with `columns`, its transpose qt [C16, W], C16 and W multiples of 16: the
    columns of group e are from 16 * (ends[e - 1] // 16 + e) on, and zeros after them. Scales are
    each group's own. "tensor": [E], of both layouts, just in time and rounded up to powers of two.
    "row": [S, 1], and of qt [E, C16, 1]. "block": [S, C16 / 128], and of qt [C16, B], of a
    128 x 128 tile with `tiles_t` [C16 / 128, B]; group e's are from ends[e - 1] // 128 + e on.
    Codes of rows of no group are zero and their scales 1.

cast_stack(x [E, R, C], dtype, granularity, scale, rows, columns, power_of_two):
    Each matrix as cast_layouts casts it ("row", "block" or "tile"), or under one scale ("tensor"),
    which is `scale` [E] where that is given: q [E, R16, C16] and qt [E, C16, R16], empty without
    `rows` and `columns`, with scales [E, ...], those of "tensor" [E] of both.

grouped_gemm(a [S, K], scale_a, b [E, N16, K], scale_b, ends, n, out_dtype):
    y [S, n] whose rows are those of a times b[e].T, zero in rows of no group. scale_a is that of
    groups, rows or blocks; scale_b that of groups [E], rows [E, N16, 1] or tiles.

grouped_gemm_weight(a [M16, W], scale_a, b [N16, W], scale_b, ends, m, n, out_dtype):
    dw [E, m, n], of each group its columns of a times those of b, transposed, zero where it has no
    rows. Operands are transposes of cast_groups; only b may have scales of tiles.

On CUDA the casts take two launches for scales of groups, three for those of rows (and clear them)
and one for others. The products have a kernel for GPUs from sm_89 on, by mma.sync, for operands
that start at multiples of 16 bytes and are not both e5m2, and for scales of blocks on both sides or
on none; it always promotes sums to f32. On CUDA `ends` are not checked: wrong ones give wrong
results.

All raise ValueError for arguments that do not fit.
"""

from __future__ import annotations

import torch

from ..layout import FLAT_BLOCK, Layout
from .fake import fake

ALIGNMENT = 16
_ops = torch.ops.quaver
cast_groups, cast_stack = _ops.cast_groups.default, _ops.cast_stack.default
grouped_gemm = _ops.grouped_gemm.default
grouped_gemm_weight = _ops.grouped_gemm_weight.default


def _padded(n):
    return (n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _floats(like, shape):
    return like.new_empty(shape, dtype=torch.float32)


@fake("cast_groups")
def _(x, ends, dtype, granularity, columns=True, power_of_two=False, tiles_t=False):
    (rows, cols), groups = x.shape, ends.shape[0]
    cols = _padded(cols)
    whole = granularity == "tensor"
    shape = (rows, cols)
    scales = [groups] if whole else Layout.of(dtype, granularity).scale_shape(shape)
    q, scale = x.new_empty(shape, dtype=dtype), _floats(x, scales)
    if not columns:
        return q, scale, x.new_empty([0], dtype=dtype), _floats(x, [0])
    qt = x.new_empty([cols, (rows // ALIGNMENT + groups) * ALIGNMENT], dtype=dtype)
    blocks = rows // FLAT_BLOCK + groups
    of_row = {"tensor": [0], "row": [groups, cols, 1], "block": [cols, blocks]}[granularity]
    if tiles_t:
        of_row = [(cols + FLAT_BLOCK - 1) // FLAT_BLOCK, blocks]
    return q, scale, qt, _floats(x, of_row)


@fake("cast_stack")
def _(x, dtype, granularity, scale=None, rows=True, columns=True, power_of_two=False):
    groups, height, width = x.shape
    results = []
    for wanted, shape in zip((rows, columns), ((height, width), (width, height)), strict=True):
        shape = [_padded(n) for n in shape]
        scales = [0]
        if granularity != "tensor" and wanted:
            scales = [groups, *Layout.of(dtype, granularity).scale_shape(shape)]
        results += [x.new_empty([groups, *shape] if wanted else [0], dtype=dtype),
                    _floats(x, scales)]  # fmt: skip
    if granularity == "tensor":
        results[1] = _floats(x, [groups])
    return tuple(results)


@fake("grouped_gemm")
def _(a, scale_a, b, scale_b, ends, n, out_dtype, fast_accumulate=True):
    return a.new_empty([a.shape[0], n], dtype=out_dtype)


@fake("grouped_gemm_weight")
def _(a, scale_a, b, scale_b, ends, m, n, out_dtype, fast_accumulate=True):
    return a.new_empty([ends.shape[0], m, n], dtype=out_dtype)
