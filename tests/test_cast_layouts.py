"""cast_layouts: a matrix as products read it, with scales of rows, blocks or tiles, bit for bit
against the oracle."""

import functools
import re

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, everywhere, randn

import quaver as qv
from quaver import reference

E4M3 = FP8[0]
INF, NAN = float("inf"), float("nan")

CASTS = [(1, 1), (5, 3), (0, 4), (4, 0), (128, 128), (129, 257), (200, 300), (16, 1000)]


@pytest.mark.parametrize("grain", ["row", "block", "tile"])
@pytest.mark.parametrize("shape", CASTS)
def test_cast_layouts(shape, grain):
    for source in (torch.float32, torch.bfloat16, torch.float16):
        for dtype in FP8:
            for power_of_two in (True, False):
                x = (randn(*shape) * torch.logspace(-3, 3, shape[1])).to(source)
                check_layouts(x, dtype, grain, power_of_two)
    check_layouts(randn(*shape[::-1]).t(), E4M3, grain, False)


@pytest.mark.parametrize("grain", ["row", "block", "tile"])
def test_cast_layouts_of_values_that_are_not_finite(grain):
    for bad in (INF, -INF, NAN):
        x = randn(200, 300)
        x[5, 130] = bad
        check_layouts(x, E4M3, grain, False)
        _, scale, _, scale_t = torch.ops.quaver.cast_layouts(x, E4M3, grain)
        assert scale.isnan().sum() == scale_t.isnan().sum() == 1


@pytest.mark.parametrize("shape", CASTS)
def test_tiles_beside_blocks(shape):
    x = (randn(*shape) * torch.logspace(-3, 3, shape[1])).bfloat16()
    if x.numel():
        x[-1, 0] = INF
    for dtype, power_of_two in ((FP8[0], True), (FP8[1], False)):
        wanted = reference.cast_layouts(x, dtype, "block", power_of_two, tiles_t=True)
        call = functools.partial(torch.ops.quaver.cast_layouts, x, dtype, "block", tiles_t=True)
        everywhere(lambda call=call: list(call()))
        got = torch.ops.quaver.cast_layouts(x, dtype, "block", True, True, power_of_two, True)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)
        q, qt = qv.ops.cast_layouts(x, dtype, power_of_two=power_of_two, tiles_t=True)
        assert (q.qlayout.grain, qt.qlayout.grain) == ("block", "tile")
        assert_same(qt.scale, wanted[3])


def check_layouts(x, dtype, grain, power_of_two):
    wanted = reference.cast_layouts(x, dtype, grain, power_of_two)
    ops = torch.ops.quaver

    def compare(got, wanted):
        for a, b, name in zip(got, wanted, ("q", "scale", "qt", "qt_scale"), strict=True):
            assert_same(a, b, name)

    everywhere(lambda: list(ops.cast_layouts(x, dtype, grain, True, True, power_of_two)))
    compare(ops.cast_layouts(x, dtype, grain, power_of_two=power_of_two), wanted)
    none, no_scale = torch.empty(0, dtype=dtype), torch.empty(0)
    compare(ops.cast_layouts(x, dtype, grain, True, False, power_of_two),
            (*wanted[:2], none, no_scale))  # fmt: skip
    compare(ops.cast_layouts(x, dtype, grain, False, True, power_of_two),
            (none, no_scale, *wanted[2:]))  # fmt: skip
    for t, (q, scale) in zip(qv.ops.cast_layouts(x, dtype, grain, power_of_two=power_of_two),
                             (wanted[:2], wanted[2:]), strict=True):  # fmt: skip
        assert_same(t.qdata, q)
        assert_same(t.scale, scale)
        assert t.qlayout.grain == grain and t.dtype == x.dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), E4M3, "row"), "cast_layouts: x must be a matrix, got 1 dimensions"),
        ((torch.ones(2, 2), torch.float16, "row"), "dtype must be e4m3 or e5m2, got Half"),
        ((torch.ones(2, 2).to(E4M3), E4M3, "row"), "x must be f32, f16 or bf16, got e4m3"),
        (
            (torch.ones(2, 2), E4M3, "row", True, True, False, True),
            "tiles_t goes with granularity block alone",
        ),
        ((torch.ones(2, 2), E4M3, "tensor"), 'must be "row", "block" or "tile", got "tensor"'),
    ],
)
def test_cast_layouts_refuses_by_name(arguments, message):
    with pytest.raises(REFUSAL, match=re.escape(message)):
        torch.ops.quaver.cast_layouts(*arguments)
