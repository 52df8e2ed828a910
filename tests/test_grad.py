"""The gradient norm, FP8 accumulation and clipping."""

import math

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, bits, randn
from torch import nn

import quaver as qv
from quaver import ScaledTensor, reference

E4M3, E5M2 = FP8
INF, NAN = float("inf"), float("nan")
ONE = torch.ones(())


def grads():
    return [
        randn(70, 1000, seed=1),
        qv.quantize(randn(300, 301, seed=2) * 1e-3),
        randn(5, seed=3, dtype=torch.bfloat16),
        qv.quantize(randn(64, 64, seed=4) * 1e4, E5M2),
        randn(40, 30, seed=5).t(),
        randn(0, 3),
        torch.tensor(-2.5),
        randn(9, seed=6).half(),
        ScaledTensor(randn(4, 4).bfloat16(), ONE.clone(), ONE * 0),
    ]


def test_norm_and_amax_against_f64():
    tensors = grads()
    norm, amax = qv.ops.grad_norm(tensors)
    values, scales, _ = qv.ops.parts(tensors)
    wanted, maxima = reference.grad_norm(values, [s if s.numel() else ONE for s in scales])
    assert norm.item() == pytest.approx(wanted, rel=2**-23)  # f64 sums, one rounding to f32
    assert_same(amax, torch.tensor(maxima))


def test_the_norm_neither_overflows_nor_underflows_inside():
    for x in (1e30, 1e-30):
        norm, _ = qv.ops.grad_norm([torch.full((100,), x)])
        assert norm.item() == pytest.approx(10 * x, rel=1e-6)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_non_finite_gradients_show_in_norm_and_amax(bad):
    plain = randn(100)
    plain[7] = bad
    for g in (plain, plain.bfloat16(), qv.quantize(plain), qv.quantize(plain, E5M2)):
        norm, amax = qv.ops.grad_norm([randn(5), g, randn(6)])
        assert not norm.isfinite()
        assert amax.isfinite().tolist() == [True, False, True]


def test_a_negative_scale_gives_a_positive_amax():
    g = qv.quantize(randn(8, 8))
    wanted = qv.ops.grad_norm([g])[1]
    assert_same(qv.ops.grad_norm([g.clone().mul_(-1)])[1], wanted)


def test_grad_norm_refuses_by_name():
    with pytest.raises(REFUSAL, match="grad_norm: no gradients"):
        qv.ops.grad_norm([])
    with pytest.raises(REFUSAL, match="1 gradients with 0 scales"):
        torch.ops.quaver.grad_norm([ONE], [], [])
    with pytest.raises(REFUSAL, match=r"grad must be .* got Double"):
        qv.ops.grad_norm([ONE.double()])


OTHERS = [torch.float32, torch.bfloat16, torch.float16, E4M3, E5M2]


@pytest.mark.parametrize("target", [*FP8, torch.bfloat16])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("shape", [(), (0,), (1000, 37), (7, 3)])
def test_accumulate_is_one_rounding_of_the_f32_sum(target, other, shape):
    def make(dtype, seed, size):
        x = randn(*shape, seed=seed) * size
        if dtype in FP8:
            return qv.quantize(x, dtype)
        return ScaledTensor(x.bfloat16(), ONE.clone(), ONE * 0) if seed == 1 else x.to(dtype)

    for size in (1.0, 1e-3, 300.0):
        a, b = make(target, 1, 1.0), make(other, 2, size)
        scaled = isinstance(b, ScaledTensor)
        parts = (b.qdata, b.scale, b.amax) if scaled else (b,)
        wanted = reference.accumulate(a.qdata, a.scale, a.amax, *parts)
        given = (b.qdata, b.scale, b.amax) if scaled else (b, None, None)
        torch.ops.quaver.accumulate_(a.qdata, a.scale, a.amax, *given)
        for name, got in (("q", a.qdata), ("scale", a.scale), ("amax", a.amax)):
            assert_same(got, wanted[("q", "scale", "amax").index(name)], name)


@pytest.mark.parametrize("target", [*FP8, torch.bfloat16])
def test_an_infinity_is_not_forgotten_by_accumulation(target):
    def total(first, *rest):
        g = qv.quantize(first, target) if target in FP8 else None
        g = ScaledTensor(first.bfloat16(), ONE.clone(), ONE * 0) if g is None else g
        for x in rest:
            g += x
        return g

    good, bad = randn(4, 4), randn(4, 4)
    bad[1, 1] = INF
    for parts in ((good, bad, good), (bad, good), (good, qv.quantize(bad), good, good)):
        norm, amax = qv.ops.grad_norm([total(*parts)])
        assert not norm.isfinite() and not amax.isfinite()
    assert qv.ops.grad_norm([total(good, good)])[0].isfinite()


def test_accumulating_into_zeros():
    for g in (qv.quantize(torch.zeros(4, 4)), qv.quantize(randn(4, 4)).zero_()):
        g += qv.quantize(torch.zeros(4, 4))
        assert_same(g.dequantize(), torch.zeros(4, 4))
        g += qv.quantize(torch.full((4, 4), 3.5))
        assert_same(g.dequantize(), torch.full((4, 4), 3.5))


def test_a_gradient_scaled_to_zero_can_be_added_to():
    g = qv.quantize(randn(4, 4)).mul_(0.0)
    g += qv.quantize(torch.zeros(4, 4))
    assert_same(g.dequantize().abs(), torch.zeros(4, 4))
    g += qv.quantize(torch.full((4, 4), 3.5))
    assert_same(g.dequantize(), torch.full((4, 4), 3.5))


def test_accumulate_refuses_by_name():
    q, scale, amax = qv.ops.parts([qv.quantize(randn(4, 4))])
    call = torch.ops.quaver.accumulate_
    with pytest.raises(REFUSAL, match="target has 16 values, other 15"):
        call(q[0], scale[0], amax[0], torch.ones(15), None, None)
    with pytest.raises(REFUSAL, match="target must be e4m3, e5m2 or bf16, got f32"):
        call(torch.ones(4), scale[0], amax[0], torch.ones(4), None, None)
    with pytest.raises(REFUSAL, match="q must be contiguous"):
        call(q[0].t(), scale[0], amax[0], torch.ones(4, 4), None, None)


def parameters():
    """One plain and two FP8 gradients."""
    a, b, c = (nn.Parameter(torch.zeros(8, 8)) for _ in range(3))
    a.grad = randn(8, 8, seed=1)
    b.grad = qv.quantize(randn(8, 8, seed=2))
    c.grad = ScaledTensor(randn(8, 8, seed=3).bfloat16(), ONE.clone(), ONE * 0)
    return [a, b, c]


def decoded(ps):
    return [
        g.dequantize() if isinstance(g, ScaledTensor) else g.clone() for g in (p.grad for p in ps)
    ]


@pytest.mark.parametrize("norm_type", [2.0, 2, INF])
def test_clipping_scales_every_gradient_as_torch_does(norm_type):
    for max_norm in (0.5, 1e6, 1e-12):
        ps, plain = parameters(), parameters()
        for p, g in zip(plain, decoded(ps), strict=True):
            p.grad = g
        codes = bits(ps[1].grad.qdata).clone()
        norm = qv.clip_grad_norm_(ps, max_norm, norm_type)
        wanted = nn.utils.clip_grad_norm_(plain, max_norm, norm_type)
        torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
        for got, p in zip(decoded(ps), plain, strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-6, atol=0)
        assert_same(bits(ps[1].grad.qdata), codes)  # scaled through the scale, not re-encoded


def test_clipping_by_torchs_own_function_scales_fp8_gradients_too():
    for foreach in (None, True, False):
        ps = parameters()
        before = decoded(ps)
        norm = nn.utils.clip_grad_norm_(ps, 0.5, foreach=foreach)
        for got, g in zip(decoded(ps), before, strict=True):
            torch.testing.assert_close(got, g * (0.5 / norm), rtol=2**-4, atol=2**-10 * 0.5)


def test_clipping_to_nothing():
    ps = parameters()
    qv.clip_grad_norm_(ps, 0.0)
    assert all(g.abs().max() == 0 for g in decoded(ps))


def test_a_clipped_gradient_has_a_clipped_amax():
    ps = parameters()
    norm = qv.clip_grad_norm_(ps, 0.5)
    norms = torch.tensor([g.norm() for g in decoded(ps)])
    assert norms.norm().item() == pytest.approx(0.5, rel=1e-5)
    assert qv.ops.grad_norm([p.grad for p in ps])[0].item() == pytest.approx(0.5, rel=1e-5)
    top = ps[1].grad.dequantize().abs().max().item()
    assert ps[1].grad.amax.item() == pytest.approx(top, rel=2**-4)
    assert norm > 0.5


@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_non_finite_norm_leaves_the_gradients_alone(bad):
    ps = parameters()
    ps[0].grad[0, 0] = bad
    before = decoded(ps)
    norm = qv.clip_grad_norm_(ps, 1.0)
    assert not norm.isfinite()
    for got, wanted in zip(decoded(ps), before, strict=True):
        assert_same(got, wanted)
    with pytest.raises(RuntimeError, match=r"norm is (inf|nan)"):
        qv.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True)


def test_clipping_follows_torch():
    p = nn.Parameter(torch.ones(3))
    assert qv.clip_grad_norm_(p, 1.0).item() == 0.0  # no gradient at all
    p.grad = torch.full((3,), 2.0)
    assert qv.clip_grad_norm_((q for q in [p]), 1.0).item() == pytest.approx(math.sqrt(12))
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    half.grad = torch.full((3,), 2.0, dtype=torch.bfloat16)
    qv.clip_grad_norm_([half], 1.0)
    assert half.grad.float().norm().item() == pytest.approx(1.0, rel=2**-8)
    for arguments in ((-1.0,), (NAN,), (1.0, 1.0)):
        with pytest.raises(ValueError, match="clip_grad_norm_: "):
            qv.clip_grad_norm_([p], *arguments)
