"""normalize and activate: given and delayed scales, extreme values, strides, refusals."""

import itertools

import pytest
import torch
from casts import KINDS, channel, check_cast
from helpers import FP8, REFUSAL, assert_same, randn

import quaver as qv
from quaver import reference

E4M3, E5M2 = FP8
ops = qv.ops
ONE = torch.ones(())


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


@pytest.mark.parametrize("shape", [(20, 48), (33, 160), (130, 1040)], ids=str)
@pytest.mark.parametrize("delayed", [False, True])
def test_joint_gradients_are_those_of_one_scale(shape, delayed):
    """The half whose gradient is larger has the codes that it has alone."""
    rows, cols = shape
    joint = randn(rows, 2 * cols).bfloat16()
    x, up = joint.chunk(2, dim=1)
    a, dense = ops.activate(x, up), ops.activate(x.contiguous(), up.contiguous())
    for got, wanted in ((a, dense), (a.x, dense.x), (a.up, dense.up)):
        for t, other in zip(got[:2], wanted[:2], strict=True):
            assert_same(getattr(t, "qdata", t), getattr(other, "qdata", other))
    for dy in (randn(rows, cols, seed=1), randn(rows, cols, seed=1) * 2.0**-30):
        history = torch.zeros(17) if delayed else None
        dx, dxt, none, _ = ops.activate_backward(dy, a.x, a.up, joint=True, x_history=history)
        gate, gate_t, other, other_t = ops.activate_backward(dy, a.x, a.up)
        assert none is None and dx.shape == (-(-rows // 16) * 16, 2 * cols)
        assert_same(dx.amax, torch.maximum(gate.amax, other.amax))
        assert_same(dx.scale, torch.maximum(gate.scale, other.scale))
        for alone, alone_t, at in ((gate, gate_t, 0), (other, other_t, cols)):
            if alone.scale == dx.scale:
                assert_same(dx.qdata[:, at : at + cols].contiguous(), alone.qdata)
                assert_same(dxt.qdata[at : at + cols], alone_t.qdata)
        assert_same(dxt.qdata, dx.qdata.view(torch.uint8).t().contiguous().view(dx.qdata.dtype))
        if delayed:
            assert_same(history[1:].max(), dx.amax)


def test_joint_gradients_that_do_not_fit_are_named():
    a = ops.activate(randn(4, 24), randn(4, 24))
    with pytest.raises(REFUSAL, match="must have a multiple of 16 columns each, got 24"):
        ops.activate_backward(randn(4, 24), a.x, a.up, joint=True)
    with pytest.raises(REFUSAL, match="joint gradients go with uq"):
        ops.activate_backward(randn(4, 24), a.x, joint=True)
    with pytest.raises(REFUSAL, match="up_history goes with uq, and not with joint"):
        ops.activate_backward(randn(4, 24), a.x, a.up, joint=True, up_history=torch.zeros(17))
