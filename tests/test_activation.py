"""normalize and activate with their backwards: bit for bit where the order of f32 operations is
theirs to choose, and against f64 within what f32 and the format lose."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import FP8, REFUSAL, assert_same, everywhere, randn

import quaver as qv
from quaver import reference

E4M3, E5M2 = FP8
ops = qv.ops
ONE = torch.ones(())
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(0, 5), (5, 0), (1, 1), (1, 16), (3, 33), (16, 48), (17, 511), (2, 512), (70, 513),
          (129, 64), (3, 1100)]  # fmt: skip
KINDS = ("silu", "gelu", "gelu_tanh")
ULP = 2.0**-24  # half an ulp of f32: the relative error of one operation


def channel(cols, seed, dtype=torch.float32):
    return (1 + 0.3 * randn(cols, seed=seed)).to(dtype)


def check_cast(got, wanted, what=""):
    """(q, qt, scale, amax), bit for bit."""
    q, qt = got
    for name, a, b in zip(("q", "qt", "scale", "amax"),
                          (q.qdata, qt.qdata, q.scale, q.amax), wanted, strict=True):  # fmt: skip
        assert_same(a, b, f"{what} {name}")


def check_saved(saved, x, block, what=""):
    codes, scale = reference.save_groups(x, block)
    assert_same(saved.codes, codes, f"{what} codes")
    assert_same(saved.scale, scale, f"{what} scales")


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


def activation_error(x, up, kind):
    """Of f(x) * up: 16 ulp of a gate, and one of each product."""
    return 16 * 2 * ULP * x.double().abs() * (1 if up is None else up.double().abs())


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


def test_given_and_delayed_scales():
    x, up = randn(33, 50), randn(33, 50, seed=1)
    for scale in (ONE * 0.25, ONE * 0.3):
        y = reference.normalize(x, None, None, 1e-6, False)[0]
        n = ops.normalize(x, scale=scale)
        check_cast(n[:2], reference.cast_for_gemm(y, E4M3, scale))
        exact = ops.activate(x, up)
        given = ops.activate(x, up, scale=exact.q.scale)
        check_cast(given[:2], (exact.q.qdata, exact.qt.qdata, exact.q.scale, exact.q.amax))
    states = [torch.zeros(17) for _ in range(4)]
    oracle = reference.DelayedScale(E4M3)
    for step in range(36):
        x = randn(20, 40, seed=step) * 1.7 ** (step % 7)
        up = randn(20, 40, seed=100 + step) * 1.3 ** (step % 5)
        if step == 25:
            up[3, 3] = float("inf")
        weight = channel(40, step) * 1.5 ** (step % 6)
        q, scale, amax = oracle.cast(reference.normalize(x, weight, None, 1e-6, False)[0])
        n = ops.normalize(x, weight, history=states[0])
        q = reference.pad_for_gemm(q)
        check_cast(n[:2], (q, q.t().contiguous(), scale, amax), f"step {step}")
        a = ops.activate(x, up, history=states[1])
        used = ops.activate(x, up, scale=a.q.scale)
        check_cast(a[:2], (used.q.qdata, used.qt.qdata, used.q.scale, used.q.amax))
        grads = ops.activate_backward(x, a.x, a.up, x_history=states[2], up_history=states[3])
        count = step + 1 if step < 16 else None
        if count is not None:
            for state in states:
                assert state[0] == count
        for g, state in ((grads[0], states[2]), (grads[2], states[3])):
            assert g.amax in state
        # Just in time: what no history decides.
        fresh = ops.activate_backward(x, a.x, a.up)
        for g, f in zip(grads, fresh, strict=True):
            assert_same(g.amax, f.amax)
            if step < 16:
                assert_same(g.qdata, f.qdata)
    assert states[1][0] == 10  # the infinity emptied it
    assert states[0][0] != 10


def test_delayed_gradients_use_the_history():
    x, up, dy = (randn(20, 40, seed=i) for i in range(3))
    a = ops.activate(x, up)
    state = torch.ones(17) * 20
    state[0] = 16
    dx, _, dup, _ = ops.activate_backward(dy, a.x, a.up, x_history=state)
    fresh = ops.activate_backward(dy, a.x, a.up)
    assert_same(dx.scale, reference.scale_from_amax(ONE * 20, E5M2))
    assert_same(dx.amax, fresh[0].amax)
    assert_same(dup.qdata, fresh[2].qdata)
    assert state[0] == 17 and state[1] == dx.amax


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows(bad):
    for centered in (False, True):
        x = randn(9, 70)
        x[4, 3] = bad
        n = ops.normalize(x, centered=centered)
        assert n.q.amax.isnan() and n.rstd[4].isnan()
        assert n.rstd.isfinite().sum() == 8
        decoded = n.q.dequantize()[:9, :70]
        assert decoded[4].isnan().all() and decoded[5].isfinite().all()
    dy = randn(9, 70)
    for kind, name in itertools.product(KINDS, ("x", "up")):
        x, up = randn(9, 70), randn(9, 70, seed=1)
        (x if name == "x" else up)[4, 3] = bad
        for smooth in (None, torch.ones(70)):
            a = ops.activate(x, up, kind, smooth)
            assert not a.q.amax.isfinite(), (kind, name)
            assert a.q.scale == 1
            if smooth is not None:
                assert (~a.channel_amax.isfinite()).sum() == 1
    dy[4, 3] = bad
    a = ops.activate(randn(9, 70), randn(9, 70, seed=1))
    for g in ops.activate_backward(dy, a.x, a.up):
        assert not g.amax.isfinite()
    n = ops.normalize(randn(9, 70))
    dx, dweight, dbias = ops.normalize_backward(
        dy, n.saved, n.mean, n.rstd, torch.ones(70), has_bias=True
    )
    assert not dx[4].isfinite().any() or dx[4].isnan().any()
    assert not dweight[3].isfinite() and not dbias[3].isfinite()


def test_squares_that_overflow_show():
    assert ops.normalize(torch.full((2, 8), 1e30)).q.amax.isnan()


def test_zeros_give_zeros():
    for kind in KINDS:
        a = ops.activate(torch.zeros(3, 40), torch.zeros(3, 40), kind)
        assert a.q.amax == 0 and a.q.scale == 1 and not a.q.dequantize().any()
        assert (a.x.scale == 127).all() and not a.x.dequantize().any()
    n = ops.normalize(torch.zeros(3, 40), centered=True)
    assert n.q.amax == 0 and not n.q.dequantize().any()


def test_huge_and_tiny_values():
    x = torch.tensor([[3e38, -3e38, 1e-40, -1e-45, 100.0, -100.0, 88.0, -88.0]])
    for kind in KINDS:
        a = ops.activate(x, None, kind)
        assert a.q.amax == x[0, 0]
        grads = ops.activate_backward(torch.ones(1, 8), a.x, None, kind)
        assert grads[0].amax.isfinite()


def test_any_strides():
    base = randn(64, 90)
    for x in (base.t(), base[::2, 3:], base[:1].expand(30, 90), base.as_strided((5, 6), (1, 2))):
        dense = x.contiguous()
        for a, b in (
            (ops.normalize(x), ops.normalize(dense)),
            (ops.activate(x, x), ops.activate(dense, dense)),
        ):
            for p, q in zip(a[:2], b[:2], strict=True):
                assert_same(p.qdata, q.qdata)
    n, m = ops.normalize(base.t()), ops.normalize(base.t().contiguous())
    wide = channel(180, 1)[::2]
    assert_same(ops.normalize(base, wide).q.qdata, ops.normalize(base, wide.contiguous()).q.qdata)
    dy = randn(64, 90, seed=1).t()
    for a, b in zip(ops.normalize_backward(dy, n.saved, n.mean, n.rstd),
                    ops.normalize_backward(dy.contiguous(), m.saved, m.mean, m.rstd),
                    strict=True):  # fmt: skip
        if a is not None:
            assert_same(a, b)


def test_saved_bytes():
    n = ops.normalize(randn(64, 512).bfloat16())
    assert n.saved.codes.nbytes + n.saved.scale.nbytes == 64 * 512 * (1 + 1 / 32)


X = torch.ones(4, 8)
norm, norm_back = ops.normalize, ops.normalize_backward
act, act_back = ops.activate, ops.activate_backward
RAW = torch.ops.quaver
REFUSED = [
    (lambda: norm(X[0]), "normalize: x must be a matrix, got 1 dim"),
    (lambda: norm(X.double()), "normalize: x must be .* got Double"),
    (lambda: norm(X.to(E4M3)), "normalize: x must be f32, f16 or bf16, got e4m3"),
    (lambda: norm(X, dtype=torch.float16), "normalize: dtype must be e4m3 or e5m2, got f16"),
    (lambda: norm(X, torch.ones(7)), "normalize: weight must have 8 values, got 7"),
    (lambda: norm(X, X[0].to(E4M3)), "weight must be f32, f16 or bf16, got e4m3"),
    (lambda: norm(X, None, torch.ones(9)), "normalize: bias must have 8 values, got 9"),
    (lambda: norm(X, block=0), "normalize: block must be positive, got 0"),
    (lambda: norm(X, scale=torch.ones(2)), "normalize: scale must be 1 float32, got 2"),
    (lambda: norm(X, history=torch.zeros(16)), "normalize: history must be 17 .* got 16"),
    (lambda: norm(X, scale=ONE, history=torch.zeros(17)), "normalize: .* exclude each other"),
    (lambda: act(X, kind="relu"), 'activate: kind must be .* got "relu"'),
    (lambda: act(X, X[:2]), r"activate: up must be \[4, 8\], got \[2, 8\]"),
    (lambda: act(X, X.half()), "activate: up must be f32 like x, got f16"),
    (lambda: act(X, X[0]), "activate: up must be a matrix, got 1 dim"),
    (lambda: act(X, None, "silu", torch.ones(7)), "channel_scale must be 8 .* got 7"),
    (lambda: act(X, None, "silu", torch.ones(8).half()), "channel_scale must be 8 contig"),
    (lambda: act(X, block=-3), "activate: block must be positive, got -3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused_by_name(call, message):
    with pytest.raises(REFUSAL, match=message):
        call()


def test_backwards_refuse_by_name():
    n, a = norm(X), act(X, X)
    mean, rstd = n.mean, n.rstd
    f32 = torch.float32
    refused = [
        (lambda: norm_back(X[:2], n.saved, mean, rstd[:2]), r"xq must be \[2, 8\], got \[4, 8\]"),
        (lambda: norm_back(X, n.saved, mean, rstd[:2]), "rstd must be 4 contiguous"),
        (lambda: norm_back(X, n.saved, rstd[:2], rstd), "mean must be 4 contiguous"),
        (lambda: norm_back(X, n.saved, mean, rstd, rstd), "weight must have 8 values"),
        (lambda: norm_back(X, n.saved, mean, rstd, dtype=E4M3), "dx must be .* got e4m3"),
        (lambda: RAW.normalize_backward(X, n.saved.codes, n.saved.scale.float(), mean, rstd, None,
                                        32, False, f32), "xscale must be uint8, got"),
        (lambda: RAW.normalize_backward(X, n.saved.codes, n.saved.scale, mean, rstd, None, 4, False,
                                        f32), r"xscale must be \[4, 2\] for block 4"),
        (lambda: RAW.normalize_backward(X, X, n.saved.scale, mean, rstd, None, 32, False, f32),
         "xq must be e4m3, got f32"),
        (lambda: act_back(X[:2], a.x, a.up), r"xq must be \[2, 8\], got \[4, 8\]"),
        (lambda: act_back(X, a.x, a.up, "tanh"), 'kind must be .* got "tanh"'),
        (lambda: act_back(X, a.x, None, up_history=torch.zeros(17)), "goes with uq"),
        (lambda: RAW.activate_backward(X, *a.x[:2], a.up.codes, None, "silu", None, 32, E5M2, None,
                                       None, True), "uq and uscale go together"),
    ]  # fmt: skip
    for call, message in refused:
        with pytest.raises(REFUSAL, match=message):
            call()
