"""FP8 between linear layers: blocks against the plain ones, what they save, and odd uses."""

import pytest
import torch
from blocks import RECIPES, Gated, gradients, llama_block, positions, run
from helpers import assert_same, randn
from torch import nn

import quaver as qv
from quaver.nn import product

INF = float("inf")


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_is_close_to_the_plain_one(name):
    plain, block = llama_block("f32"), llama_block(name)
    x, dy = randn(2, 24, 64), randn(2, 24, 64, seed=1)
    outs = []
    for net, autocast in ((plain, False), (block, True)):
        leaf = x.clone().requires_grad_()
        y = run(net, leaf, autocast)
        y.backward(dy.to(y.dtype))
        outs.append([y.detach() - x, leaf.grad - dy, *gradients(net)])
    for got, wanted in zip(outs[1], outs[0], strict=True):
        # A handful of casts in a row: e4m3 is off by 2.6 % in the mean, e5m2 by 5.3 %.
        assert (got - wanted).norm() <= 0.15 * wanted.norm()


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bits_again(name):
    found = []
    for _ in range(2):
        block, x = llama_block(name), randn(2, 24, 64).requires_grad_()
        for _ in range(3):  # smoothing and delayed scaling have a past
            y = run(block, x)
            y.backward(randn(2, 24, 64, seed=1))
        found.append([y.detach(), x.grad, *gradients(block)])
    for a, b in zip(*found, strict=True):
        assert_same(a, b)


def test_nothing_is_cast_twice(monkeypatch):
    """Of eight linear layers' inputs and seven gradients, the fused ops cast all but these."""
    net = nn.Sequential(nn.RMSNorm(48), Gated(48, 80))
    qv.convert(net, "coat")
    given = []

    def counting(real):
        def call(x, codes, *args):
            given.append(codes is not None)
            return real(x, codes, *args)

        return call

    for name in ("linear", "linear_backward"):
        monkeypatch.setattr(product, name, counting(getattr(product, name)))
    y = net(randn(32, 48).requires_grad_())
    assert given == [True] * 3
    given.clear()
    y.sum().backward()
    assert sorted(given) == [False, True, True]  # the gradient of the result is cast


@pytest.mark.parametrize("name", ["coat", "small groups", "blocks"])
def test_what_a_block_saves(name):
    block = llama_block(name, dim=64, ffn=96)
    x = randn(1, 32, 64).requires_grad_()
    with qv.saved_activations(block) as saved:
        y = run(block, x)
    y.sum().backward()
    n, k, f = 32, 64, 96
    groups = RECIPES[name].activation.block
    wide, tall = -(-f // groups), -(-k // groups)
    assert saved.by_layer["norm1"] == {"norm": n * (k + tall + 4)}  # codes, scales, rstd
    assert saved.by_layer["mlp"] == {"mlp": 2 * n * (f + wide)}
    # Each layer's transposed codes and one scale: also of blocks, as 128 x 128 share it.
    for layer, width in (
        ("attention.qkv", k),
        ("attention.out", k),
        ("mlp.gate_up", k),
        ("mlp.down", f),
    ):
        assert saved.by_layer[layer] == {"linear": n * width + 4}
    assert sum(sum(kinds.values()) for kinds in saved.by_layer.values()) == saved.bytes


def test_a_block_saves_at_most_0_60_of_bf16():
    def measure(name):
        block = llama_block(name, dim=128, ffn=344, heads=2, kv_heads=2)
        x = randn(1, 128, 128).requires_grad_()
        with qv.saved_activations(block) as saved, torch.autocast("cpu", torch.bfloat16):
            y = block(x, positions(128, 64))
        y.sum().backward()
        return saved.bytes

    assert measure("coat") <= 0.60 * measure("bf16")


@pytest.mark.parametrize("name", ["coat", "delayed"])
def test_an_infinity_is_not_saturated_away(name):
    for where in ("x", "dy"):
        block = llama_block(name)
        x, dy = randn(1, 16, 64), randn(1, 16, 64)
        (x if where == "x" else dy)[0, 3, 3] = INF
        y = run(block, x.requires_grad_())
        assert y.isfinite().all() == (where == "dy")
        y.backward(dy)
        grads = [p.grad for p in block.parameters()]
        assert not qv.ops.grad_norm(grads)[0].isfinite()


def test_smoothing_follows_the_amaxes_and_is_exact_where_nothing_underflows():
    smoothed, plain = llama_block("smooth"), llama_block("coat")
    nets = [smoothed, plain]
    optimizers = [qv.AdamW(n.parameters(), lr=1e-2, recipe=RECIPES["coat"]) for n in nets]
    for step in range(4):
        outs = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            y = run(net, randn(2, 24, 64, seed=step))
            y.float().square().mean().backward()
            outs += [y.detach(), net.mlp.down.weight.grad.float()]
            optimizer.step()
            optimizer.zero_grad()
        # Powers of two change no mantissa: only what was subnormal in one of the two differs.
        torch.testing.assert_close(outs[0], outs[2], rtol=2e-2, atol=2e-3)
        assert (outs[1] - outs[3]).norm() <= 0.05 * outs[3].norm()
        down = smoothed.mlp.down
        channels = down.channels()
        ratio = down.channel_amax / channels
        assert ((ratio >= 0.5) & (ratio < 1)).all()
        codes, scale, *_ = down.operands(channels)
        decoded = codes.float() * scale
        wanted = down.weight.detach().float() * channels
        assert ((decoded - wanted).abs() <= wanted.abs() * 2**-4 + scale * 2**-10).all()


def test_smoothing_keeps_an_outlier_channel_from_flushing_the_others():
    def error(name):
        torch.manual_seed(0)
        net = Gated(48, 80)
        with torch.no_grad():
            net.gate_proj.weight[7] *= 2.0**9
            net.up_proj.weight[7] *= 2.0**9
            net.down_proj.weight[:, 7] *= 2.0**-18
        x = randn(64, 48)
        wanted = net(x).detach()
        qv.convert(net, RECIPES[name])
        for _ in range(2):  # the second forward knows the amaxes of the first
            got = net(x).detach()
        return (got - wanted).norm() / wanted.norm()

    assert error("smooth") < 0.08 < 0.3 < error("coat")


@pytest.mark.parametrize("what", ["norm", "mlp", "block"])
def test_second_derivatives_are_refused_by_name(what):
    x = randn(2, 24, 64).requires_grad_()
    if what == "block":
        block = llama_block()

        def function(v):
            return run(block, v, autocast=False)
    else:
        net = nn.Sequential(nn.RMSNorm(64), Gated(64, 96), nn.Linear(64, 8))
        qv.convert(net, "coat", skip=() if what == "norm" else ("0",))
        function = net
    with pytest.raises(RuntimeError, match=r"quaver\.restore"):
        (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"quaver\.restore"):
        torch.func.grad(lambda v: function(v).sum())(x.detach())
    with pytest.raises(RuntimeError, match=r"quaver\.restore"):
        torch.func.jvp(function, (x.detach(),), (torch.ones_like(x),))
