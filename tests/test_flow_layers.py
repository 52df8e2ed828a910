"""Norms and MLPs that pass on FP8: values, codes and gradients against f64."""

import pytest
import torch
from blocks import MLPS, NORMS, RECIPES
from helpers import FP8, assert_same, randn
from torch import nn

import quaver as qv
from quaver import ScaledTensor, reference
from quaver.nn import Norm

E4M3, E5M2 = FP8


def normed(norm, k=48, n=32, name="coat", seed=0):
    """A converted norm with random parameters before a converted linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(NORMS[norm](k), nn.Linear(k, n, bias=False))
    for p in net[0].parameters():
        nn.init.normal_(p, 1.0, 0.3)
    return qv.convert(net, RECIPES[name])


def exact_norm(module, x):
    """In f64, differentiable in x and in copies of the parameters."""
    x = x.detach().double().requires_grad_()
    parameters = [p.detach().double().requires_grad_() for p in module.parameters()]
    weight, *bias = parameters or [torch.ones(())]
    c = x - x.mean(-1, keepdim=True) if module.centered else x
    eps = torch.finfo(torch.float32).eps if module.epsilon is None else module.epsilon
    y = c * (c.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + module.offset)
    return y + sum(bias), x, parameters


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows", [16, 5])
def test_a_norm_gives_the_codes_of_its_value(norm, rows):
    net = normed(norm)
    assert isinstance(net[0], Norm) and isinstance(net[0], type(NORMS[norm](48)))
    x = randn(2, rows, 48) * 3
    y = net[0](x)
    assert isinstance(y, ScaledTensor) and y.shape == x.shape and y.dtype == x.dtype
    wanted, *_ = exact_norm(net[0], x)
    codes, _, _ = reference.quantize(y.dequantize(), E4M3)
    assert_same(y.qdata, codes)  # nothing but codes under one power of two
    # Half an ulp of e4m3, of a normal or of a subnormal, and f32's own roundings before.
    bound = wanted.abs() * (2**-4 + 2**-18) + y.scale.double() * 2**-10 + 1e-6
    assert ((y.dequantize().double() - wanted).abs() <= bound).all()
    transposed = y.qt[:48, : 2 * rows].t().reshape(2, rows, 48)
    assert_same(transposed.float(), y.qdata.float())
    assert y.qt.shape == (48, -(-2 * rows // 16) * 16)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["coat", "small groups", "blocks"])
def test_norm_gradients_against_f64(norm, name):
    """Only xhat is rounded for backward: by half an ulp of e4m3, in its group's scale."""
    net = normed(norm, name=name)
    module, x, dy = net[0], (randn(32, 48) * 2).requires_grad_(), randn(32, 48, seed=1)
    module(x).backward(dy)
    y, ex, parameters = exact_norm(module, x)
    y.backward(dy.double())
    block = module.activation.block
    stored = qv.quantize(x.detach(), granularity="block", block=block)
    group = reference.expand_scale(stored.scale, x, "block", block).double()
    c = ex.detach() - ex.detach().mean(-1, keepdim=True) if module.centered else ex.detach()
    eps = torch.finfo(torch.float32).eps if module.epsilon is None else module.epsilon
    rstd = (c.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = c * rstd
    off = (x.detach().double().abs() * 2**-4 + group * 2**-10) * rstd  # of xhat
    weight = parameters[0].detach() + module.offset if parameters else 1.0
    g = dy.double() * weight
    mean = (g * xhat).mean(-1, keepdim=True).abs()
    mean_off = (g.abs() * off).mean(-1, keepdim=True)
    f32 = 64 * 2**-24  # sums of 48 and of 32 values
    bound = rstd * (
        off * (mean + mean_off) + xhat.abs() * mean_off + f32 * g.abs().amax(-1, True) * 4
    )
    assert ((x.grad.double() - ex.grad).abs() <= bound).all()
    if parameters:
        bound = (dy.double().abs() * (off + f32 * (xhat.abs() + 1))).sum(0)
        assert ((module.weight.grad.double() - parameters[0].grad).abs() <= bound).all()
    for p, wanted in zip(list(module.parameters())[1:], parameters[1:], strict=True):
        torch.testing.assert_close(p.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)


SLOPE = {"silu": 0.5, "gelu": 0.8, "gelu_tanh": 0.81}  # at most, of f'


def watch(module, x, dy):
    """One pass; what went in and out of the activation: values, and gradients as they arrived."""
    seen, plan = {}, module.plan

    def keep(name):
        def hook(layer, arguments, output):
            seen[name] = output.detach()
            output.register_hook(lambda g: seen.__setitem__(f"d{name}", g))

        return hook

    def product(layer, arguments):
        seen["y"] = arguments[0]
        arguments[0].register_hook(lambda g: seen.__setitem__("dy", g))

    hooks = [
        getattr(module, at).register_forward_hook(keep(at)) for at in {plan.gate, plan.up} - {None}
    ]
    hooks.append(getattr(module, plan.down).register_forward_pre_hook(product))
    module(x).backward(dy)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("form", MLPS)
@pytest.mark.parametrize("name", ["coat", "small groups", "blocks"])
def test_an_activation_and_its_gradients_against_f64(form, name):
    torch.manual_seed(0)
    module = qv.convert(MLPS[form](), RECIPES[name])
    plan = module.plan
    seen = watch(module, randn(3, 11, 48).requires_grad_(), randn(3, 11, 48, seed=1))
    gate, up = seen[plan.gate], None if plan.up is None else seen[plan.up]
    if plan.up == plan.gate:
        gate, up = gate.chunk(2, -1)
    wanted = reference.activate(gate, up, plan.kind)
    y = seen["y"]
    bound = wanted.abs() * (2**-4 + 2**-18) + y.scale.double() * 2**-10 + 1e-6
    assert ((y.dequantize().double() - wanted).abs() <= bound).all()

    # The gradient's own inputs are rounded by half an ulp of e4m3, and it to one of its format.
    dy = seen["dy"].double()
    dgate, dup = reference.activate_backward(dy, gate, up, plan.kind)
    block = module.activation.block

    def rounding(t):
        stored = qv.quantize(t.contiguous(), granularity="block", block=block)
        group = reference.expand_scale(stored.scale, t, "block", block).double()
        return t.double().abs() * 2**-4 + group * 2**-10

    _, slope = reference.activation(gate, plan.kind)
    off_gate, off_up = rounding(gate), 0.0 if up is None else rounding(up)
    size = 1.0 if up is None else up.double().abs()
    bend = SLOPE[plan.kind] * off_gate
    bounds = {"gate": dy.abs() * (size * bend + off_up * (slope.abs() + bend))}
    if up is not None:
        bounds["up"] = dy.abs() * off_gate * (slope.abs() + bend)  # f' along the way
    got = {"gate": seen[f"d{plan.gate}"], "up": None if up is None else seen[f"d{plan.up}"]}
    if plan.up == plan.gate:
        got["gate"], got["up"] = got["gate"].chunk(2, -1)
    elif up is None or plan.up != plan.gate:
        assert got["gate"].qt is not None and got["gate"].qdata.dtype == module.rule.grad_output
    for what, exact in (("gate", dgate), ("up", dup)):
        if got[what] is None:
            continue
        value = got[what]
        value = value.dequantize() if isinstance(value, ScaledTensor) else value
        top = value.double().abs().max()
        least = {E5M2: 2**-30, E4M3: 2**-17}[module.rule.grad_output]  # a subnormal's half step
        bound = bounds[what] + (exact.abs() + bounds[what]) * (2**-3 + 2**-16) + top * least
        assert ((value.double() - exact).abs() <= bound).all(), what


def test_an_operation_that_knows_no_codes_gets_values():
    class Adapter(nn.Module):  # reads the norm besides the linear layer, as a hook may do
        def __init__(self):
            super().__init__()
            self.linear, self.a = nn.Linear(48, 32, bias=False), nn.Parameter(randn(48, 4))

        def forward(self, x):
            return self.linear(x)

    net = qv.convert(nn.Sequential(nn.RMSNorm(48), Adapter()), "coat")
    assert isinstance(net[0], Norm)
    x = randn(16, 48).requires_grad_()
    y = net[0](x)
    value = y.dequantize()
    assert_same((y @ net[1].a).detach(), (value @ net[1].a).detach())
    assert_same(y.view(4, 4, 48).qt, y.qt)
    assert y.t().qt is None and y[:, :16].shape == (16, 16)
    assert_same((y * 2).detach(), value * 2)
    (y @ net[1].a).sum().backward()
    assert x.grad.isfinite().all() and net[1].a.grad.isfinite().all()
    half = net[1](y.detach()[:8])  # rows of it: values again, and cast anew
    assert ((half - net[1](value[:8])).abs() <= 1e-6).all()


def test_modules_refuse_by_name():
    net = normed("RMSNorm")
    for x, error, message in (
        (randn(4, 47), ValueError, r"Norm: the input's last axis must be 48, got \(4, 47\)"),
        (randn(4, 48).double(), TypeError, "Norm: input must be .* got torch.float64"),
    ):
        with pytest.raises(error, match=message):
            net[0](x)
