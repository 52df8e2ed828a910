"""Assignments, sums, averages and transforms of ScaledTensors in place of ops."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from helpers import FP8, assert_same, randn
from kinds import KINDS
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing._internal.distributed.fake_pg import FakeStore

import quaver as qv
from quaver import ScaledTensor, recipe

E4M3, F16 = FP8[0], torch.float16


# Assignment


def test_data_is_other_memory_as_in_torch():
    """The pattern of averages that are put in for evaluation and taken out again."""
    p = nn.Parameter(qv.quantize(randn(6, 8), F16))
    backup, before = p.data, p.detach().dequantize()
    p.data = torch.full((6, 8), 0.5)
    assert_same(p.detach().dequantize(), torch.full((6, 8), 0.5))
    assert_same(backup.dequantize(), before)
    p.data = backup
    assert_same(p.detach().dequantize(), before)
    with torch.no_grad():
        p.mul_(2)
    assert_same(backup.dequantize(), before * 2)  # one memory, as in torch
    p.data = p.data
    with torch.no_grad():
        p.zero_()
    p.data = torch.ones(3, 4)
    assert p.shape == (3, 4) and p.is_contiguous()
    assert_same(p.detach().dequantize(), torch.ones(3, 4))
    for wrong in (3.0, torch.ones(6, 8, dtype=torch.int32)):
        with pytest.raises(TypeError, match=r"\.data =: wanted a floating-point tensor"):
            p.data = wrong


def test_merges_by_assignment_reach_the_layer():
    """PEFT: weight.data = weight.data + delta; and vector_to_parameters."""
    layer = qv.nn.Linear(16, 16, bias=False, recipe="fp8lm-o2").eval()
    x = randn(4, 16)
    before = layer(x)
    layer.weight.data = layer.weight.data + layer.weight.data
    assert_same(layer(x), before * 2)
    nn.utils.vector_to_parameters(torch.zeros(256), layer.parameters())
    assert_same(layer(x), torch.zeros(4, 16))


def test_gradients_are_assigned():
    p = nn.Parameter(torch.zeros(6, 8))
    for grad in (KINDS["e4m3"](), KINDS["f16"]()):
        p.grad = grad
        p.grad.data = torch.full((6, 8), 0.25)
        assert_same(p.grad.dequantize(), torch.full((6, 8), 0.25))
    p.grad = torch.ones(6, 8)
    assert type(p.grad) is torch.Tensor
    master = nn.Parameter(KINDS["f16"]())
    master.grad = torch.ones(6, 8)
    assert type(master.grad) is torch.Tensor


# Sums and averages


@pytest.mark.parametrize(("form", "bound"), [("bf16", None), ("f32", 256 * 2.0**-24)])
@pytest.mark.parametrize("micro_batches", [2, 64, 256])
def test_micro_batches_add_up(form, bound, micro_batches):
    """As torch's own accumulation of the same gradients in bf16; in f32 as torch's in f32."""
    total, torchs, exact = None, None, torch.zeros(64, 64, dtype=torch.float64)
    for seed in range(micro_batches):
        g = qv.quantize(randn(64, 64, seed=seed) + 1.0)
        g.grad_format = form
        value = g.dequantize()
        exact += value
        if total is None:
            total, torchs = g, value.bfloat16()
        else:
            total += g
            torchs += value.bfloat16()
    assert isinstance(total, ScaledTensor) and total.qlayout.format == form

    def error(x):
        return ((x.double() - exact).norm() / exact.norm()).item()

    assert error(total.dequantize()) <= (error(torchs) if bound is None else bound)


@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_the_second_micro_batch_of_a_layer_widens_its_gradient(form):
    o2 = recipe.get("fp8lm-o2")
    rule = dataclasses.replace(o2, linear=dataclasses.replace(o2.linear, grad_accumulate=form))
    layer, other = (qv.nn.Linear(32, 16, bias=False, recipe=rule) for _ in range(2))
    other.weight.data = layer.weight.data.clone()
    total = torch.zeros(16, 32)
    for seed in range(3):
        layer(randn(4, 32, seed=seed)).square().sum().backward()
        other.weight.grad = None
        other(randn(4, 32, seed=seed)).square().sum().backward()
        assert other.weight.grad.qlayout.format == "e4m3"
        total += other.weight.grad.dequantize()
    assert layer.weight.grad.qlayout.format == form
    bound = {"bf16": 2.0**-7, "f32": 2.0**-22}[form]
    torch.testing.assert_close(
        layer.weight.grad.dequantize(), total, rtol=bound, atol=bound * total.abs().max().item()
    )
    two = layer(randn(4, 32)).square().sum() + layer(randn(4, 32, seed=1)).square().sum()
    layer.weight.grad = None
    two.backward()  # two uses in one graph
    assert layer.weight.grad.qlayout.format == form


def test_zero_heals_a_scale_that_is_not_finite():
    for granularity in ("tensor", "row", "block"):
        for bad in (float("nan"), float("inf")):
            t = qv.quantize(randn(6, 8), granularity=granularity, block=4)
            t.scale.fill_(bad), t.amax.fill_(bad)
            t.zero_()
            assert (t.scale == 1).all() and (t.amax == 0).all()
            assert_same(t.dequantize(), torch.zeros(6, 8))
            t.copy_(torch.ones(6, 8))
            assert_same(t.dequantize(), torch.ones(6, 8))


def test_an_infinity_outlives_arithmetic_and_no_overwrite():
    """FP8 saturates: the amax is its only trace."""
    x = randn(6, 8)
    x[1, 2] = float("inf")
    for write in (
        lambda t: t.add_(1.0), lambda t: t.clamp_(-1, 1), lambda t: t.mul_(-2.0),
        lambda t: t.add_(qv.quantize(randn(6, 8))), lambda t: t[0].fill_(1), lambda t: t.mul_(0.5),
    ):  # fmt: skip
        t = qv.quantize(x)
        write(t)
        assert not t.amax.isfinite()
    for write in (lambda t: t.zero_(), lambda t: t.fill_(2), lambda t: t.copy_(randn(6, 8))):
        t = qv.quantize(x)
        write(t)
        assert t.amax.isfinite()


@pytest.mark.parametrize("decay", [0.999, 0.9999])
@pytest.mark.parametrize("how", ["foreach", "function"])
def test_an_average_of_f16_masters_follows(decay, how):
    """From one value to another: after n steps 1 - decay^n of the way. Each step is far below half
    a code, so only stochastic rounding moves it; its noise is averaged over 4,096 values."""
    torch.manual_seed(0)
    start = nn.ParameterList([nn.Parameter(qv.quantize(torch.full((64, 64), 0.9), F16))])
    goal = nn.ParameterList([nn.Parameter(qv.quantize(torch.full((64, 64), 0.7), F16))])
    options = (
        {"multi_avg_fn": get_ema_multi_avg_fn(decay)} if how == "foreach"
        else {"avg_fn": lambda a, p, n: decay * a + (1 - decay) * p}
    )  # fmt: skip
    average = AveragedModel(start, **options)
    average.update_parameters(start)  # the first update is a copy
    steps = 1000
    for _ in range(steps):
        average.update_parameters(goal)
    moved = 0.9 - average.module[0].detach().dequantize().mean().item()
    wanted = (0.9 - 0.7) * (1 - decay**steps)
    assert moved == pytest.approx(wanted, rel=0.02)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=5e-7),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_optimizers_move_f16_masters_by_small_steps(name):
    """A step is a hundredth of a code: 4,096 weights average the noise of 200 roundings to 2 %."""
    torch.manual_seed(0)
    p = nn.Parameter(qv.quantize(randn(64, 64) * 0.02 + 0.05, F16))
    before, optimizer = p.detach().dequantize(), OPTIMIZERS[name]([p])
    for _ in range(200):
        p.grad = torch.ones(64, 64)
        optimizer.step()
    moved = (before - p.detach().dequantize()).mean().item()
    assert moved == pytest.approx(200 * 5e-7, rel=0.05)


def test_arithmetic_on_masters_repeats_from_torchs_generator():
    """So a run whose generators are restored rounds alike; assignment draws nothing."""

    def run(seed):
        torch.manual_seed(seed)
        t = qv.quantize(randn(6, 8), F16)
        t.data = randn(6, 8, seed=1)
        t.fill_(0.3)
        drawn = torch.get_rng_state()
        t.add_(1e-5)
        assert not torch.equal(torch.get_rng_state(), drawn)
        return t.qdata, drawn

    (a, drawn), (b, _), (c, _) = run(0), run(0), run(1)
    assert_same(a, b)
    assert (a != c).any()
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.get_rng_state())


def test_ranks_round_alike_whatever_their_generators():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            t = qv.quantize(randn(6, 8), F16)
            t.add_(1e-5)
            first = t.qdata.clone()
            t.add_(1e-5)
            found.append((first, t.qdata))
        assert_same(found[0][1], found[1][1])
        assert (found[0][0] != found[0][1]).any()
    finally:
        dist.destroy_process_group()


# torch.func


def test_transforms_see_a_tensor():
    t = KINDS["f16"]()
    x = t.dequantize()

    def cube(a):
        return a.pow(3).sum()

    assert_same(torch.func.grad(cube)(t), torch.func.grad(cube)(x))
    assert_same(torch.vmap(torch.sum)(t), torch.vmap(torch.sum)(x))
    tangent = randn(6, 8, seed=1)
    for got, wanted in zip(
        torch.func.jvp(cube, (t,), (tangent,)), torch.func.jvp(cube, (x,), (tangent,)), strict=True
    ):
        assert_same(got, wanted)
    assert_same(torch.func.hessian(cube)(t), torch.func.hessian(cube)(x))
    pull, plain = torch.func.vjp(cube, t)[1], torch.func.vjp(cube, x)[1]
    assert_same(pull(torch.tensor(2.0))[0], plain(torch.tensor(2.0))[0])
    hvp = torch.autograd.functional.hvp
    assert_same(hvp(cube, t, tangent)[1], hvp(cube, x, tangent)[1])
