"""AdamW against f64, with every option."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from helpers import FP8, assert_same, parts_of, randn
from test_adam import HYPER
from torch import nn

import quaver as qv
from quaver import ScaledTensor, recipe, reference

E4M3 = FP8[0]


INF, NAN = float("inf"), float("nan")
FP8_RECIPES = ["fp8lm-o1", "fp8lm-o2"]


def model(name="fp8lm-o2", width=48, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 16))
    return qv.convert(net, name)


def loss_of(net, seed):
    return (net(randn(64, 32, seed=seed)) - randn(64, 16, seed=seed + 1000)).square().mean()


def train(net, optimizer, steps, first=0):
    losses = []
    for i in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(net, i)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


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


def test_groups_have_their_own_hyperparameters():
    net = model()
    groups = [
        {"params": [net[0].weight], "lr": 0.0, "weight_decay": 0.0},
        {"params": [net[3].weight], "lr": 1e-2},
        {"params": [net[0].bias], "weight_decay": 0.5},
        {"params": [net[3].bias], "betas": (0.5, 0.6), "eps": 1e-3},
    ]
    optimizer = qv.AdamW(groups, lr=1e-3)
    before = {p: parts_of(p) for g in groups for p in g["params"]}
    loss_of(net, 0).backward()
    optimizer.step()
    zero = torch.zeros(())
    for g in optimizer.param_groups:
        (p,) = g["params"]
        grad = p.grad.dequantize() if isinstance(p.grad, ScaledTensor) else p.grad
        values = before[p][0].float() * before[p][1]
        hyper = (g["lr"], *g["betas"], g["eps"], g["weight_decay"])
        wanted = reference.adamw(values, zero, zero, grad, 1, *hyper)[0]
        got = p.detach().dequantize() if isinstance(p, ScaledTensor) else p.detach()
        f16 = (2**-10 if isinstance(p, ScaledTensor) else 2**-22) * 2
        torch.testing.assert_close(got.double(), wanted, rtol=f16, atol=1e-7)
    assert_same(
        net[0].weight.dequantize(), before[net[0].weight][0].float() * before[net[0].weight][1]
    )


def test_a_scheduler_sets_the_next_step():
    net = model()
    optimizer = qv.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t == 1 else 1.0)
    changes = []
    for i in range(3):
        before = net[0].weight.dequantize()
        train(net, optimizer, 1, i)
        scheduler.step()
        changes.append((net[0].weight.dequantize() - before).abs().max().item())
    assert changes[0] > 0 and changes[2] > 0
    assert changes[1] <= net[0].weight.dequantize().abs().max() * 2**-11  # re-rounded at most
    tensor_lr = qv.AdamW(net.parameters(), lr=torch.tensor(1e-2))
    train(net, tensor_lr, 1)


def test_a_closure_is_called_once_with_gradients():
    net = model()
    optimizer = qv.AdamW(net.parameters())
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [True]
    assert optimizer.state[net[0].weight]["step"].item() == 1


def test_parameters_without_gradient_are_left_alone():
    net = model()
    optimizer = qv.AdamW(net.parameters())
    loss_of(net, 0).backward()
    net[3].weight.grad = None
    before = parts_of(net[3].weight)
    optimizer.step()
    assert net[3].weight not in optimizer.state
    for a, b in zip(parts_of(net[3].weight), before, strict=True):
        assert_same(a, b)
    qv.AdamW(model().parameters()).step()  # none at all


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


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0}, {"lr": NAN}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8},
        {"weight_decay": -0.1}, {"recipe": "fp7"},
    ],
)  # fmt: skip
def test_hyperparameters_out_of_range_are_refused(options):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=next(iter(options))):
        qv.AdamW([p], **options)
    optimizer = qv.AdamW([nn.Parameter(torch.ones(2))])
    if "recipe" not in options:
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": [p], **options})
        assert len(optimizer.param_groups) == 1  # a refused group is not half added


def test_unfit_parameters_and_gradients_are_refused():
    for dtype in (torch.float64, torch.int32, torch.complex64):
        with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
            qv.AdamW([nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)])
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        qv.AdamW([p]).step()


def test_add_param_group_joins_the_training():
    net = model()
    optimizer = qv.AdamW([net[0].weight], lr=1e-2)
    train(net, optimizer, 1)
    optimizer.add_param_group({"params": [net[3].weight, net[3].bias], "lr": 1e-3})
    before = parts_of(net[3].weight)
    train(net, optimizer, 1, 1)
    assert (parts_of(net[3].weight)[0] != before[0]).any()
    assert optimizer.state[net[3].weight]["step"].item() == 1
    assert optimizer.state[net[0].weight]["step"].item() == 2


def test_a_clipped_step_is_a_step_with_clipped_gradients():
    nets = [model(), model()]
    for i, net in enumerate(nets):
        optimizer = qv.AdamW(net.parameters(), lr=1e-2, eps=1.0)  # so that the size matters
        loss_of(net, 0).backward()
        if i == 0:
            qv.clip_grad_norm_(net.parameters(), 0.01)
        else:
            norm = qv.ops.grad_norm([p.grad for p in net.parameters()])[0]
            for p in net.parameters():
                value = p.grad.dequantize() if isinstance(p.grad, ScaledTensor) else p.grad
                p.grad = value * (0.01 / norm)
        optimizer.step()
    for a, b in zip(*(n.parameters() for n in nets), strict=True):
        a, b = (t.dequantize() if isinstance(t, ScaledTensor) else t for t in (a, b))
        torch.testing.assert_close(a, b, rtol=2**-10, atol=1e-7)


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
