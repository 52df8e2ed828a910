"""normalize and activate with their backwards: bit for bit where the order of f32 operations is
theirs to choose, and against f64 within what f32 and the format lose."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from casts import FLOATS, KINDS, SHAPES, ULP, activation_error, channel, check_cast, check_saved
from helpers import FP8, assert_same, everywhere, randn

import quaver as qv
from quaver import reference

E4M3, E5M2 = FP8
ops = qv.ops
ONE = torch.ones(())


def check_decoded(t, wanted, error, what=""):
    """|decode(q) - wanted| within half a step of the format and an error of the value."""
    rows, cols = wanted.shape
    got = t.qdata.double() * t.scale.double()
    assert not got[rows:].any() and not got[:, cols:].any(), f"{what}: padding"
    info = torch.finfo(t.qdata.dtype)
    # Half an ulp is eps / 2 of the power of two below; subnormals have one step.
    step = torch.maximum(
        wanted.abs() * info.eps / 2, t.scale.double() * info.smallest_normal * info.eps / 2
    )
    bad = (got[:rows, :cols] - wanted).abs() > step * (1 + 1e-4) + error
    assert not bad.any(), f"{what}: {bad.sum()} of {bad.numel()} differ"


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_and_its_backward(shape, centered):
    cols = shape[1]
    for i, (source, param) in enumerate(itertools.product(FLOATS, (*FLOATS, None))):
        x = (randn(*shape, seed=i) * 3 + 0.5).to(source)
        weight = None if param is None else channel(cols, 1, param)
        bias = None if param is None else randn(cols, seed=2, dtype=param)
        block = (16, 32, 7, 128)[i % 4]
        n = ops.normalize(x, weight, bias, 1e-5, centered, FP8[i % 2], block=block)
        y, mean, rstd = reference.normalize(x, weight, bias, 1e-5, centered)
        assert_same(n.rstd, rstd, "rstd")
        assert_same(n.mean, mean if centered else torch.empty(0), "mean")
        check_cast(n[:2], reference.cast_for_gemm(y, FP8[i % 2]), source)
        check_saved(n.saved, x, block)

        dy = randn(*shape, seed=50 + i).to(param or source)
        dx, dweight, dbias = ops.normalize_backward(
            dy, n.saved, n.mean, n.rstd, weight, has_bias=bias is not None, dtype=source
        )
        decoded = reference.load_groups(n.saved.codes, n.saved.scale, block)
        assert_same(decoded, n.saved.dequantize())
        wanted = reference.normalize_backward(dy, decoded, mean, rstd, weight, centered)
        rounded = (
            reference.encode(wanted[0], source) if source == torch.float16 else wanted[0].to(source)
        )
        assert_same(dx, rounded, "dx")
        if weight is None:
            assert dweight is None and dbias is None
        else:
            assert_same(dweight, wanted[1], "dweight")
            assert_same(dbias, wanted[2], "dbias")


@pytest.mark.parametrize("centered", [False, True])
def test_normalize_against_torch_in_f64(centered):
    """A row sum of n terms in 512 lanes loses n / 512 + 9 roundings of the sum of magnitudes."""
    rows, cols, eps = 70, 1500, 1e-5
    x = randn(rows, cols) * 2 + 1
    weight, bias = channel(cols, 1), randn(cols, seed=2)
    n = ops.normalize(x, weight, bias, eps, centered)
    w, b = weight.double(), bias.double()

    def exact(x, w, b):
        if centered:
            return F.layer_norm(x, (cols,), w, b, eps)
        return F.rms_norm(x, (cols,), w, eps) + b

    y = exact(x.double(), w, b)
    roundings = cols / 512 + 9
    spread = x.abs().double().mean(1, keepdim=True) * n.rstd[:, None].double()
    error = ((roundings + 8) * (1 + spread) * ((y - b).abs() + w) + 2 * y.abs()) * ULP
    check_decoded(n.q, y, error)

    # Backward, at the decoded input: the statistics are those of the exact one.
    dy = randn(rows, cols, seed=3)
    decoded = n.saved.dequantize().double()
    mean = n.mean.double()[:, None] if centered else 0
    rstd = n.rstd.double()[:, None]
    xhat, g = (decoded - mean) * rstd, dy.double() * w
    inner = (g * xhat).mean(1, keepdim=True)
    outer = g.mean(1, keepdim=True) if centered else 0
    dx, dweight, dbias = ops.normalize_backward(dy, n.saved, n.mean, n.rstd, weight, has_bias=True)
    bound = (
        (roundings + 8)
        * ULP
        * rstd
        * (
            g.abs()
            + g.abs().mean(1, keepdim=True)
            + xhat.abs() * (g * xhat).abs().mean(1, keepdim=True)
        )
    )
    assert ((dx.double() - (g - outer - xhat * inner) * rstd).abs() <= bound).all()
    column = (64 + rows / 1024 + 4 + 4) * ULP
    terms = dy.double() * xhat
    assert ((dweight.double() - terms.sum(0)).abs() <= column * terms.abs().sum(0)).all()
    assert ((dbias.double() - dy.double().sum(0)).abs() <= column * dy.double().abs().sum(0)).all()


def test_the_gradient_of_an_exact_input_is_that_of_autograd():
    """Small integers survive e4m3, so nothing but f32 stands between the op and torch."""
    x = torch.randint(-7, 8, (40, 96), generator=torch.Generator().manual_seed(0)).float()
    weight, bias, dy = channel(96, 1), randn(96, seed=2), randn(40, 96, seed=3)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    F.layer_norm(leaves[0], (96,), leaves[1], leaves[2], 1e-5).backward(dy.double())
    n = ops.normalize(x, weight, bias, 1e-5, True)
    got = ops.normalize_backward(dy, n.saved, n.mean, n.rstd, weight, has_bias=True)
    for a, leaf in zip(got, leaves, strict=True):
        torch.testing.assert_close(a.double(), leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_activate_and_its_backward(shape, gated, kind):
    for i, source in enumerate(FLOATS):
        x = (randn(*shape, seed=i) * 4).to(source)
        up = randn(*shape, seed=10 + i).to(source) if gated else None
        smooth = channel(shape[1], 5).abs() if i % 2 else None
        block = (16, 7, 32)[i]
        a = ops.activate(x, up, kind, smooth, FP8[i % 2], block=block)
        v = reference.activate(x, up, kind)
        y = v if smooth is None else v * smooth.double()
        error = activation_error(x, up, kind) * (1 if smooth is None else smooth)
        check_decoded(a.q, y, error, kind)
        assert_same(a.qt.qdata, a.q.qdata.t().contiguous())
        top = y.abs().amax() if y.numel() else ONE.double() * 0
        torch.testing.assert_close(a.q.amax.double(), top, rtol=64 * ULP, atol=0)
        assert_same(a.q.scale, reference.scale_from_amax(a.q.amax, a.q.qdata.dtype))
        check_saved(a.x, x, block)
        if gated:
            check_saved(a.up, up, block)
        assert (a.up is None) == (not gated)
        if smooth is None:
            assert a.channel_amax is None
        else:
            tops = v.abs().amax(0) if len(v) else torch.zeros(shape[1]).double()
            size = activation_error(x, up, kind)
            error = size.amax(0) if len(size) else torch.zeros(shape[1])
            assert ((a.channel_amax.double() - tops).abs() <= error).all()

        dy = randn(*shape, seed=20 + i).to(source)
        grads = ops.activate_backward(dy, a.x, a.up, kind, smooth)
        xd, ud = a.x.dequantize(), a.up.dequantize() if gated else None
        dx, dup = reference.activate_backward(dy, xd, ud, kind, smooth)
        size = dy.double().abs() * (1 if smooth is None else smooth)
        check_decoded(grads[0], dx, activation_error(size * (2 + xd.abs()), ud, kind), "dx")
        assert_same(grads[1].qdata, grads[0].qdata.t().contiguous())
        if not gated:
            assert grads[2:] == (None, None)
            continue
        check_decoded(grads[2], dup, activation_error(size, xd, kind), "dup")
        assert_same(grads[3].qdata, grads[2].qdata.t().contiguous())
        for g in grads:
            assert_same(g.scale, reference.scale_from_amax(g.amax, E5M2))


def test_every_instruction_set_and_number_of_threads():
    shape = (200, 700)
    x, up, dy = (randn(*shape, seed=i).bfloat16() for i in range(3))
    weight, smooth = channel(700, 1), channel(700, 2).abs()
    raw = torch.ops.quaver

    def run():
        out = []
        for centered in (False, True):
            n = raw.normalize(x, weight, weight, 1e-5, centered, E4M3, None, None, True, 32)
            out += [*n, *raw.normalize_backward(
                dy, n[4], n[5], n[6], n[7], weight, 32, True, torch.bfloat16)]  # fmt: skip
        for kind in KINDS:
            a = raw.activate(x, up, kind, smooth, E4M3, None, None, True, 32)
            out += [*a, *raw.activate_backward(
                dy, *a[4:8], kind, smooth, 32, E5M2, None, None, True)]  # fmt: skip
        return out

    everywhere(run)
