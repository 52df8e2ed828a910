"""Linear: delayed scales, evaluation, and values that are not finite."""

import pytest
import torch
from helpers import FP8, assert_same, randn
from linears import RECIPES, check_close, layer, plain, variant, weight_codes

import quaver as qv
from quaver import recipe, reference

E4M3, E5M2 = FP8
INF = float("inf")


@pytest.mark.parametrize("name", ["fp8lm-o2", "tensorwise"])
def test_delayed_scaling_follows_the_oracle(name):
    """40 steps, growing and shrinking, with an infinity in the middle of both passes."""
    net = layer(name, bias=False)
    delayed = recipe.get(name).linear.scaling == "delayed"
    inputs, grads = reference.DelayedScale(E4M3), reference.DelayedScale(E5M2)
    wq, ws = weight_codes(net)
    for step in range(40):
        x = (randn(16, 48, seed=step) * 1.5 ** (step % 9)).requires_grad_()
        dy = randn(16, 32, seed=100 + step) * 1.7 ** -(step % 7)
        if step == 20:
            with torch.no_grad():
                x[3, 3] = INF
            dy[2, 2] = INF
        y = net(x)
        y.backward(dy)
        if step == 20:
            inputs.cast(x.detach()), grads.cast(dy)
            assert not (y.isfinite().any() or x.grad.isfinite().any())
            continue
        if delayed:
            xq, xs, _ = inputs.cast(x.detach())
            gq, gs, _ = grads.cast(dy)
        else:
            xq, xs, _ = reference.quantize(x.detach(), E4M3)
            gq, gs, _ = reference.quantize(dy, E5M2)
        check_close(y.detach(), xq, xs, wq, ws, torch.float32)
        check_close(x.grad, gq, gs, wq.t(), ws, torch.float32)


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_batches_without_values_teach_delayed_scaling_nothing(rows, size):
    """After 20 empty or all-zero batches the first values are cast as by current scaling."""
    nets = [layer("fp8lm-o2", bias=False), layer("tensorwise", bias=False)]
    with torch.no_grad():
        nets[1].weight.copy_(nets[0].weight.dequantize())
    for _ in range(20):
        nets[0](torch.zeros(rows, 48)).sum().backward()
    found = []
    for net in nets:
        x = (randn(16, 48) * size).requires_grad_()
        y = net(x)
        y.backward(randn(16, 32, seed=1) * size)
        found.append([y.detach(), x.grad])
    for got, wanted in zip(*found, strict=True):
        # The weight's scales differ by a power of two at most: only subnormal codes differ.
        assert (got - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_an_outlier_does_not_blind_the_next_step(where):
    """One batch 10^6 times larger; current scaling forgets it at once, and so does delayed."""
    net = layer("fp8lm-o2", bias=False)
    exact = net.weight.detach().dequantize()
    for step in range(30):
        huge = 1e6 if step == 20 else 1.0
        x = (randn(16, 48, seed=step) * (huge if where == "input" else 1)).requires_grad_()
        dy = randn(16, 32, seed=100 + step) * (huge if where == "gradient" else 1)
        y = net(x)
        y.backward(dy)
        for got, wanted in ((y.detach(), x.detach() @ exact.t()), (x.grad, dy @ exact)):
            assert (got - wanted).norm() <= 0.1 * wanted.norm(), step  # e5m2 is off by 5.3 %


def test_eval_leaves_no_trace_and_ignores_the_history():
    net = layer()
    for step in range(20):
        net(randn(16, 48, seed=step).requires_grad_()).sum().backward()
    state = net.input_history.clone(), net.grad_history.clone()
    assert state[0][0] >= 16
    net.eval()
    x = randn(16, 48) * 1000
    y = net(x)  # far beyond the history, and yet not saturated
    net(x.requires_grad_()).sum().backward()
    assert_same(net.input_history, state[0])
    assert_same(net.grad_history, state[1])
    wq, ws = weight_codes(net)
    check_close(
        y.detach(), *reference.quantize(x.detach(), E4M3)[:2], wq, ws, torch.float32, net.bias
    )


def test_an_infinity_is_not_saturated_away():
    """Neither forward nor backward may turn one into a number that looks sound: it reaches what its
    scale does, at least the row, or in the weight's gradient the column, that it is in."""
    for name in RECIPES:
        net = layer(name, bias=False)
        whole = net.rule.grain == "tensor"
        x = randn(16, 48).requires_grad_()
        with torch.no_grad():
            x[3, 3] = INF
        for y in (net(x), net.eval()(x)):
            assert not y[... if whole else 3].isfinite().any()
            assert whole or y.isfinite().sum() == 15 * 32
        net.train()(x).sum().backward()
        assert not plain(net.weight.grad)[:, ... if whole else 3].isfinite().any()
        net.weight.grad = None
        x = randn(16, 48).requires_grad_()
        dy = randn(16, 32)
        dy[3, 3] = -INF
        net(x).backward(dy)
        bad = ... if whole else 3
        assert not plain(net.weight.grad)[bad].isfinite().any()
        assert not x.grad[bad].isfinite().any()
        assert whole or (net.weight.grad.isnan().sum(), x.grad.isnan().sum()) == (48, 48)


def test_a_non_finite_gradient_survives_to_the_optimizer():
    for where in ("input", "gradient"):
        for kind in ("e4m3", "bf16", "f32"):
            net = layer(variant(weight_grad=kind))
            x, dy = randn(16, 48), randn(16, 32)
            (x if where == "input" else dy)[3, 3] = INF
            net(x).backward(dy)
            net(randn(16, 48)).sum().backward()
            bad = [p.grad for p in net.parameters()]
            assert not qv.ops.grad_norm(bad)[0].isfinite(), (where, kind)
