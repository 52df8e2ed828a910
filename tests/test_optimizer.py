"""AdamW against f64, and training by it: memory, skipped steps, state dicts, copies of weights."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from adam_training import loss_of, model, train
from helpers import FP8, assert_same, parts_of, randn
from test_adam import HYPER
from torch import nn

import quaver as qv
from quaver import ScaledTensor, recipe, reference

E4M3 = FP8[0]


INF, NAN = float("inf"), float("nan")
FP8_RECIPES = ["fp8lm-o1", "fp8lm-o2"]


def everything(net, optimizer):
    """Every tensor of the model and of the optimizer's states, as plain storages."""
    found = []
    for p in net.parameters():
        found += [*parts_of(p)]
        for state in optimizer.state[p].values():
            found += [*parts_of(state)]
    return found


def test_f32_states_follow_f64_adamw():
    p = nn.Parameter(randn(50, 20))
    half = nn.Parameter(randn(50, 20, dtype=torch.bfloat16))
    optimizer = qv.AdamW([p, half], lr=1e-2, recipe="f32")
    exact = [p.detach().double(), torch.zeros(()), torch.zeros(())]
    for t in range(1, 31):
        g = randn(50, 20, seed=t)
        p.grad, half.grad = g, g.bfloat16()
        before = half.detach().clone()
        optimizer.step()
        exact = reference.adamw(*exact, g, t, 1e-2, 0.9, 0.95, 1e-8, 0.1)
        # A step rounds a few times: the weight, and the update (at most some lr) it adds.
        torch.testing.assert_close(p.double(), exact[0], rtol=t * 2**-23, atol=t * 1e-2 * 2**-21)
        state = optimizer.state[half]
        wanted = reference.adamw(before, exact[1] * 0, exact[2] * 0, g * 0, 1, *HYPER)[0]
        assert half.dtype == torch.bfloat16 and state["exp_avg"].dtype == torch.float32
        assert wanted.shape == half.shape
    for name, wanted in (("exp_avg", exact[1]), ("exp_avg_sq", exact[2])):
        torch.testing.assert_close(
            optimizer.state[p][name].double(), wanted, rtol=2**-20, atol=2**-22
        )


def test_bf16_parameters_follow_the_oracle():
    p = nn.Parameter(randn(33, 20, dtype=torch.bfloat16))
    optimizer = qv.AdamW([p], lr=1e-2, recipe="bf16")
    zero = torch.zeros(33, 20)
    states = [parts_of(p.detach()), parts_of(zero), parts_of(zero)]
    for t in range(1, 6):
        p.grad = randn(33, 20, seed=t, dtype=torch.bfloat16)
        optimizer.step()
        states = reference.adamw_fp8(states, p.grad, torch.ones(()), t, 1e-2, 0.9, 0.95, 1e-8, 0.1)
        assert_same(p.detach(), states[0][0])


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_fp8_states_follow_f64_adamw(name):
    """Dense gradients: every moment is well above its format's smallest value."""
    steps, lr = 40, 3e-2
    p = nn.Parameter(qv.quantize(randn(64, 32), torch.float16))
    optimizer = qv.AdamW([p], lr=lr, weight_decay=0.1, recipe=name)
    exact = [p.detach().dequantize().double(), torch.zeros(()), torch.zeros(())]
    path = 0.0
    for t in range(1, steps + 1):
        p.grad = randn(64, 32, seed=t)
        optimizer.step()
        before = exact[0]
        exact = reference.adamw(*exact, p.grad, t, lr, 0.9, 0.95, 1e-8, 0.1)
        path += (exact[0] - before).norm().item()
    # Independent roundings of an f16 weight add as a random walk; e4m3 is 2^-4 off in each update.
    bound = steps**0.5 * 2**-11 * exact[0].norm() + (2**-4 * path if name == "fp8lm-o2" else 0)
    assert (p.detach().dequantize().double() - exact[0]).norm() < bound
    kinds = {"fp8lm-o1": (torch.float32, torch.float32), "fp8lm-o2": (E4M3, torch.float16)}[name]
    # A moment keeps 1 / (1 - beta) roundings of half an ulp.
    bounds = {E4M3: 2**-4 * 10**0.5, torch.float16: 2**-11 * 20**0.5, torch.float32: 2**-20}
    for key, kind, wanted in zip(("exp_avg", "exp_avg_sq"), kinds, exact[1:], strict=True):
        state = optimizer.state[p][key]
        low = isinstance(state, ScaledTensor)
        assert (state.qdata if low else state).dtype == kind
        value = (state.dequantize() if low else state).double()
        assert (value - wanted).norm() < bounds[kind] * wanted.norm()


def test_no_wide_copy_of_a_state_exists():
    net = model()
    optimizer = qv.AdamW(net.parameters())
    train(net, optimizer, 2)
    for p in net.parameters():
        if not isinstance(p, ScaledTensor):
            continue
        state = optimizer.state[p]
        held = [t for t in (p, *state.values()) if isinstance(t, ScaledTensor)]
        sizes = sorted(t.qdata.untyped_storage().nbytes() for t in held)
        assert sizes == [p.numel(), 2 * p.numel(), 2 * p.numel()]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_step_allocates_no_wide_temporary():
    p = nn.Parameter(qv.quantize(randn(1000, 512), torch.float16))
    optimizer = qv.AdamW([p])
    p.grad = qv.quantize(randn(1000, 512))
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    events = [
        e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    assert max(events) < p.numel()  # not even one byte for each element
    assert events


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_zero_gradients_only_decay(name):
    net = model(name)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, recipe=name)
    before = net[0].weight.dequantize()
    for p in net.parameters():
        p.grad = torch.zeros(p.shape)
    for _ in range(3):
        optimizer.step()
    got = net[0].weight.dequantize()
    # Stochastic rounding is off by up to an ulp a step.
    torch.testing.assert_close(got, before * (1 - 1e-3) ** 3, rtol=3 * 2**-10, atol=1e-6)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("name", ["f32", "fp8lm-o2"])
def test_a_non_finite_gradient_skips_the_step_and_counts(bad, name):
    net = model(name)
    optimizer = qv.AdamW(net.parameters(), recipe=name)
    train(net, optimizer, 2)
    before = everything(net, optimizer)
    for i, module in enumerate((net[0], net[1])):
        loss = loss_of(net, 5)
        optimizer.zero_grad()
        loss.backward()
        if i == 0 and name != "f32":  # as the backward would have left it
            value = module.weight.grad.dequantize()
            value[3, 3] = bad
            module.weight.grad = qv.quantize(value)
        else:
            module.weight.grad[3] = bad
        optimizer.step()
        assert optimizer.skipped == i + 1
        for a, b in zip(everything(net, optimizer), before, strict=True):
            assert_same(a, b)
    train(net, optimizer, 1, 6)
    assert optimizer.skipped == 2
    assert net[0].weight.dequantize().isfinite().all() if name != "f32" else True


def test_an_infinite_loss_skips_the_step():
    net = model()
    optimizer = qv.AdamW(net.parameters())
    train(net, optimizer, 1)
    before = everything(net, optimizer)
    optimizer.zero_grad()
    (loss_of(net, 1) * INF).backward()
    optimizer.step()
    assert optimizer.skipped == 1
    for a, b in zip(everything(net, optimizer), before, strict=True):
        assert_same(a, b)
    train(net, optimizer, 20, 2)
    assert optimizer.skipped == 1


@pytest.mark.parametrize("name", ["f32", "tensorwise", *FP8_RECIPES])
@pytest.mark.parametrize("way", ["direct", "torch.save", "deepcopy"])
def test_a_state_dict_gives_bit_identical_next_steps(name, way):
    net = model(name)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2, recipe=name)
    train(net, optimizer, 3)
    other = model(name, seed=9)
    resumed = qv.AdamW(other.parameters(), lr=1.0, recipe=name)
    states = net.state_dict(), optimizer.state_dict()
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(states, file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
    elif way == "deepcopy":
        states = copy.deepcopy(states)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for a, b in zip(everything(other, resumed), everything(net, optimizer), strict=True):
        assert_same(a, b)
    held = {t.untyped_storage().data_ptr() for t in everything(net, optimizer)}
    assert train(other, resumed, 3, 3) == train(net, optimizer, 3, 3)
    for a, b in zip(everything(other, resumed), everything(net, optimizer), strict=True):
        assert_same(a, b)
    assert held  # the two do not share: both trained, with equal results


def test_a_deepcopied_model_and_optimizer_train_on_alike_and_apart():
    net = model()
    optimizer = qv.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    assert train(twin, twin_optimizer, 3, 2) == train(net, optimizer, 3, 2)
    before = everything(net, optimizer)
    train(twin, twin_optimizer, 1, 5)
    for a, b in zip(everything(net, optimizer), before, strict=True):
        assert_same(a, b)


def test_the_weights_gemm_copies_follow_every_step():
    net = model(width=48)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2)
    for i in range(3):
        train(net, optimizer, 1, i)
        for layer in (net[0], net[3]):
            copies = layer.refresh()
            n, k = layer.weight.shape
            row, scale = reference.fp8_weight(layer.weight.qdata, layer.weight.scale)
            assert_same(copies.q[:n, :k].contiguous(), row)
            assert_same(copies.qt[:k, :n].contiguous(), row.t().contiguous())
            assert_same(copies.scale, scale)


def test_a_recipe_with_e5m2_weights_keeps_its_copies_e5m2():
    linear = dataclasses.replace(recipe.get("fp8lm-o2").linear, weight=torch.float8_e5m2)
    chosen = dataclasses.replace(recipe.get("fp8lm-o2"), name="e5m2", linear=linear)
    net = model(chosen)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2, recipe=chosen)
    train(net, optimizer, 2)
    copies, weight = net[0].refresh(), net[0].weight.dequantize()
    assert copies.q.dtype == torch.float8_e5m2
    torch.testing.assert_close(copies.q.float() * copies.scale, weight, rtol=2**-3, atol=1e-6)


@pytest.mark.parametrize("name", ["f32", "tensorwise", *FP8_RECIPES])
def test_training_lowers_the_loss(name):
    net = model(name)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0, recipe=name)
    x, y = randn(64, 32), randn(64, 16, seed=1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_weights_that_get_no_more_gradient_come_to_rest():
    """Rows whose gradient stops (a dead unit): from then on m / sqrt(v), at most the Cauchy-Schwarz
    peak, falls by beta1 / sqrt(beta2) a step, and the weights move by the sum of that."""
    lr, w = 1e-3, randn(64, 64) * 0.02
    p = nn.Parameter(qv.quantize(w, torch.float16))
    optimizer = qv.AdamW([p], lr=lr, weight_decay=0.0)
    for t in range(500):
        p.grad = randn(64, 64, seed=t)
        if t >= 20:
            p.grad[:8] = 0
        if t == 20:
            before = p.detach().dequantize()
        optimizer.step()
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    peak = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    bound = lr * peak / (1 - beta1 / math.sqrt(beta2))
    assert (p.detach().dequantize() - before)[:8].abs().max() < bound
