"""normalize, activate and its backward with scales of blocks: bit for bit what `cast_layouts` makes
of the values, where the values have promised bits, and within what f32 and the format lose."""

import itertools
import re

import pytest
import torch
from casts import FLOATS, KINDS, SHAPES, ULP, activation_error, channel, check_saved
from helpers import FP8, REFUSAL, assert_same, everywhere, randn

import quaver as qv
from quaver import reference

E4M3, E5M2 = FP8
INF, NAN = float("inf"), float("nan")
ops, raw = qv.ops, torch.ops.quaver
FLAGS = list(itertools.product((False, True), (False, True)))  # tiles_t, power_of_two


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 128), (200, 300)])
def test_normalize_layouts(shape, centered):
    for i, ((tiles_t, power_of_two), source) in enumerate(itertools.product(FLAGS, FLOATS)):
        x = (randn(*shape, seed=i) * 3 + 0.5).to(source)
        weight, bias = channel(shape[1], 1, source), randn(shape[1], seed=2, dtype=source)
        block, dtype = (128, 32, 7)[i % 3], FP8[i % 2]
        n = ops.normalize_layouts(
            x, weight, bias, 1e-5, centered, dtype, tiles_t=tiles_t, power_of_two=power_of_two,
            block=block,
        )  # fmt: skip
        y, mean, rstd = reference.normalize(x, weight, bias, 1e-5, centered)
        assert_same(n.rstd, rstd, "rstd")
        assert_same(n.mean, mean if centered else torch.empty(0), "mean")
        wanted = reference.cast_layouts(y, dtype, "block", power_of_two, tiles_t)
        check_layouts(n[:2], wanted, tiles_t)
        check_saved(n.saved, x, block)


def check_layouts(got, wanted, tiles_t):
    for t, codes, scale, grain in zip(
        got, wanted[::2], wanted[1::2], ("block", "tile" if tiles_t else "block"), strict=True
    ):
        assert_same(t.qdata, codes)
        assert_same(t.scale, scale)
        assert t.qlayout.grain == grain


def check_values(t, wanted, error, power_of_two):
    """Each scale is that of its block's amax, each value within half a step of its scale."""
    rows, cols = wanted.shape
    padded, room = torch.zeros(2, *t.qdata.shape, dtype=torch.float64)
    padded[:rows, :cols], room[:rows, :cols] = wanted, error
    grain = t.qlayout.grain
    sure = None
    for sign in (-1, 1):  # scales grow with the amax
        moved = (padded.abs() * (1 + sign * 8 * ULP) + sign * room).clamp(min=0)
        amax = reference.quantize(moved, E4M3, None, grain)[2]
        bound = reference.scale_from_amax(amax, t.qdata.dtype, power_of_two)
        sure = amax > 0 if sure is None else sure  # others may be zeros, whose scale is 1
        assert not ((t.scale - bound) * sign > bound * 4 * ULP)[sure].any(), "scales"
    scale = reference.expand_scale(t.scale.double(), t.qdata, grain)
    got, info = t.qdata.double() * scale, torch.finfo(t.qdata.dtype)
    assert not got[rows:].any() and not got[:, cols:].any(), "padding"
    step = torch.maximum(padded.abs() * info.eps / 2, scale * info.smallest_normal * info.eps / 2)
    bad = (got - padded).abs()[:rows, :cols] > step[:rows, :cols] * (1 + 1e-4) + error
    assert not bad.any(), f"{bad.sum()} of {bad.numel()} differ"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 128), (200, 300)])
def test_activate_layouts_and_its_backward(shape, gated, kind):
    for i, ((tiles_t, power_of_two), source) in enumerate(zip(FLAGS, (*FLOATS, FLOATS[0]),
                                                              strict=True)):  # fmt: skip
        x = (randn(*shape, seed=i) * 4).to(source)
        up = randn(*shape, seed=10 + i).to(source) if gated else None
        smooth = channel(shape[1], 5).abs() if i % 2 else None
        block, flags = (16, 7, 32, 128)[i], {"power_of_two": power_of_two}
        a = ops.activate_layouts(x, up, kind, smooth, FP8[i % 2], tiles_t=tiles_t, block=block,
                                 **flags)  # fmt: skip
        b = ops.activate(x, up, kind, smooth, FP8[i % 2], block=block)
        y = reference.activate(x, up, kind) * (1 if smooth is None else smooth.double())
        error = activation_error(x, up, kind) * (1 if smooth is None else smooth)
        check_values(a.q, y, error, power_of_two)
        check_values(a.qt, y.t(), error.t(), power_of_two)
        for got, wanted in ((a.x, b.x), (a.up, b.up)):
            if wanted is not None:
                assert_same(got.codes, wanted.codes)
                assert_same(got.scale, wanted.scale)
        assert (a.up is None) == (not gated)
        assert (a.channel_amax is None) == (smooth is None)
        if smooth is not None:
            assert_same(a.channel_amax, b.channel_amax)

        dy = randn(*shape, seed=20 + i).to(source)
        grads = ops.activate_backward_layouts(dy, a.x, a.up, kind, smooth, FP8[i % 2], **flags)
        xd, ud = a.x.dequantize(), a.up.dequantize() if gated else None
        dx, dup = reference.activate_backward(dy, xd, ud, kind, smooth)
        size = dy.double().abs() * (1 if smooth is None else smooth)
        error = activation_error(size * (2 + xd.abs()), ud, kind)
        check_values(grads[0], dx, error, power_of_two)
        check_values(grads[1], dx.t(), error.t(), power_of_two)
        if not gated:
            assert grads[2:] == (None, None)
            continue
        error = activation_error(size, xd, kind)
        check_values(grads[2], dup, error, power_of_two)
        check_values(grads[3], dup.t(), error.t(), power_of_two)


def test_the_same_values_are_cast_as_by_the_other_ops():
    """Under powers of two a code decodes alike whatever shares its scale, unless it is subnormal,
    so that the casts with one scale a tensor show the same values."""
    x, up, dy = (randn(150, 300, seed=i) for i in range(3))
    a, b = ops.activate_layouts(x, up), ops.activate(x, up, block=128)
    for layouts, one in (
        (a[:2], b[:2]),
        (ops.activate_backward_layouts(dy, a.x, a.up), ops.activate_backward(
            dy, b.x, b.up, dtype=E4M3)),
        (ops.normalize_layouts(x, up[0])[:2], ops.normalize(x, up[0])[:2]),
    ):  # fmt: skip
        for t, whole in zip(layouts, one, strict=True):
            coarse = whole.dequantize(torch.float64)
            normal = coarse.abs() > whole.scale.double() * 2**-6
            assert normal.float().mean() > 0.8
            assert_same(t.dequantize(torch.float64)[normal], coarse[normal])


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_what_is_not_finite_shows_in_its_scales_alone(bad):
    x, up, dy = (randn(200, 300, seed=i) for i in range(3))
    up[130, 5] = dy[130, 5] = bad
    a = ops.activate_layouts(x, up, tiles_t=True)
    grads = ops.activate_backward_layouts(dy, a.x, a.up)
    for t in (*a[:2], *grads):
        assert t.scale.isnan().sum() == 1
    assert a.q.scale[130, 0].isnan() and a.qt.scale[0, 1].isnan()
    n = ops.normalize_layouts(up, tiles_t=True)
    assert n.rstd.isnan().sum() == 1 and n.q.scale.isnan().sum() == 3  # of its row


def test_every_instruction_set_and_number_of_threads():
    x, up, dy = (randn(200, 700, seed=i).bfloat16() for i in range(3))
    weight, smooth = channel(700, 1), channel(700, 2).abs()

    def run():
        out = []
        for tiles_t, power_of_two in FLAGS:
            out += raw.normalize_layouts(
                x, weight, weight, 1e-5, tiles_t, E4M3, tiles_t, power_of_two, 32)  # fmt: skip
            for kind in KINDS:
                a = raw.activate_layouts(x, up, kind, smooth, E4M3, tiles_t, power_of_two, 32)
                out += [*a, *raw.activate_backward_layouts(
                    dy, *a[4:8], kind, smooth, 32, E5M2, power_of_two)]  # fmt: skip
        return out

    everywhere(run)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: raw.normalize_layouts(randn(3), None, None, 1.0, False, E4M3),
         "normalize_layouts: x must be a matrix, got 1 dimensions"),
        (lambda: raw.normalize_layouts(randn(2, 4), randn(5), None, 1.0, False, E4M3),
         "normalize_layouts: weight must have 4 values, got 5"),
        (lambda: raw.normalize_layouts(randn(2, 4), None, None, 1.0, False, torch.float16),
         "normalize_layouts: dtype must be e4m3 or e5m2, got Half"),
        (lambda: raw.normalize_layouts(randn(2, 4), None, None, 1.0, False, E4M3, block=0),
         "normalize_layouts: block must be positive, got 0"),
        (lambda: raw.activate_layouts(randn(2, 4), randn(2, 5), "silu", None, E4M3),
         "activate_layouts: up must be [2, 4], got [2, 5]"),
        (lambda: raw.activate_layouts(randn(2, 4), None, "relu", None, E4M3),
         'activate_layouts: kind must be "silu", "gelu" or "gelu_tanh", got "relu"'),
        (lambda: raw.activate_backward_layouts(
            randn(2, 5), *raw.activate_layouts(randn(2, 4), None, "silu", None, E4M3)[4:6], None,
            None, "silu", None, 128, E4M3),
         "activate_backward_layouts: xq must be [2, 5], got [2, 4]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(REFUSAL, match=re.escape(message)):
        call()
