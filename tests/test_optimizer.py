"""AdamW: the op bit for bit against its oracle, the optimizer against f64 and in every habit."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, everywhere, randn
from torch import nn

import quaver as qv
from quaver import ScaledTensor, recipe, reference

E4M3 = FP8[0]
HYPER = (1e-2, 0.9, 0.95, 1e-8, 0.1)  # lr, betas, eps, weight decay
INF, NAN = float("inf"), float("nan")
FP8_RECIPES = ["fp8lm-o1", "fp8lm-o2"]


def scaled(x, dtype):
    return qv.quantize(x, dtype)


def zeros(shape, dtype):
    one = torch.ones(())
    return ScaledTensor(torch.zeros(shape, dtype=dtype), one, torch.zeros(()))


def adam(params, ms, vs, grads, hyper=HYPER, copies=None, steps=None, skipped=None):
    """The op on lists of tensors; returns the step and skip counters."""
    none = torch.empty(0)
    n = len(params)
    steps = [torch.zeros((), dtype=torch.int64) for _ in params] if steps is None else steps
    skipped = torch.zeros((), dtype=torch.int64) if skipped is None else skipped
    copies = copies or [(none, none, none)] * n
    values, scales, _ = qv.ops.parts(grads)
    torch.ops.quaver.adam_(
        *qv.ops.parts(params),
        *qv.ops.parts(ms),
        *qv.ops.parts(vs),
        values,
        scales,
        qv.ops.grad_norm(grads)[1],
        *([c[i] for c in copies] for i in range(3)),
        steps,
        torch.tensor([hyper] * n, dtype=torch.float64),
        skipped,
        [],
    )
    return steps, skipped


def triple(t):
    if isinstance(t, ScaledTensor):
        return t.qdata.clone(), t.scale.clone(), t.amax.clone()
    return t.clone(), torch.ones(()), torch.zeros(())


def assert_states(tensors, wanted, what):
    for name, t, w in zip(("weight", "exp_avg", "exp_avg_sq"), tensors, wanted, strict=True):
        got = triple(t)
        for part, a, b in zip(("values", "scale", "amax"), got, w, strict=True):
            if isinstance(t, ScaledTensor) or part == "values":
                assert_same(a, b, f"{what}: {name} {part}")


CODECS = [
    (torch.float16, E4M3, torch.float16),  # O2
    (torch.float16, torch.float32, torch.float32),  # O1
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
]


def make(x, dtype):
    return scaled(x, dtype) if dtype in (*FP8, torch.float16) else x.to(dtype)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, E4M3])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (257, 130)])
def test_the_op_is_its_oracle_bit_for_bit(codecs, grad, shape):
    for hyper in (HYPER, (1e-3, 0.0, 0.999, 1e-6, 0.0), (0.5, 0.9, 0.999, 1e-15, 0.5)):
        w = make(randn(*shape, seed=1), codecs[0])
        m, v = (zeros(shape, d) if d != torch.float32 else torch.zeros(shape) for d in codecs[1:])
        steps = [torch.zeros((), dtype=torch.int64)]
        for t in range(1, 7):
            g = randn(*shape, seed=t) * 10.0 ** -(t % 4)
            g = scaled(g, E4M3) if grad == E4M3 else g.to(grad)
            value = g.dequantize() if isinstance(g, ScaledTensor) else g
            top = qv.ops.grad_norm([g])[1][0]
            wanted = reference.adamw_fp8([triple(w), triple(m), triple(v)], value, top, t, *hyper)
            adam([w], [m], [v], [g], hyper, steps=steps)
            assert_states((w, m, v), wanted, f"step {t}")
            assert steps[0].item() == t


@pytest.mark.parametrize("shape", [(16, 16), (64, 48), (130, 70), (1, 33), (200, 1)])
def test_the_gemm_copies_come_out_of_the_same_pass(shape):
    def step():
        w, m, v = (
            scaled(randn(*shape), torch.float16),
            zeros(shape, E4M3),
            zeros(shape, torch.float16),
        )
        row, col = torch.zeros(shape, dtype=E4M3), torch.zeros(shape[::-1], dtype=E4M3)
        scale = torch.zeros(())
        adam([w], [m], [v], [randn(*shape, seed=2)], copies=[(row, col, scale)])
        wanted_row, wanted_scale = reference.fp8_weight(w.qdata, w.scale)
        assert_same(row, wanted_row)
        assert_same(col, wanted_row.t().contiguous())
        assert_same(scale, wanted_scale)
        return [w.qdata, m.qdata, v.qdata, row, col]

    everywhere(step)


def test_many_parameters_are_each_their_own():
    shapes = [(300, 7), (), (0, 4), (40000,), (64, 64), (5,)]
    kinds = (torch.float16, E4M3, torch.float16, torch.float32)

    def lists():
        w, m, v, g = ([make(randn(*s), kind) for s in shapes] for kind in kinds)
        for t in v:
            t.qdata.abs_()
        return w, m, v, g

    together = lists()
    adam(*together)
    alone = lists()
    for i in range(len(shapes)):
        adam(*([one[i]] for one in alone))
    for i in range(len(shapes)):
        assert_states([x[i] for x in alone[:3]], [triple(x[i]) for x in together[:3]], shapes[i])


def test_nothing_changes_when_any_gradient_is_not_finite():
    shape = (40, 40)
    for bad in (INF, -INF, NAN):
        w = [scaled(randn(*shape, seed=i), torch.float16) for i in range(2)]
        m, v = [zeros(shape, E4M3)] * 2, [zeros(shape, torch.float16)] * 2
        copies = [(torch.zeros(shape, dtype=E4M3),) * 2 + (torch.zeros(()),)] * 2
        g = [randn(*shape), randn(*shape)]
        g[1][39, 39] = bad
        for grads in (g, [g[0], scaled(g[1], E4M3)]):
            before = [triple(t) for t in w]
            steps, skipped = adam(w, m, v, grads, copies=copies)
            assert skipped.item() == 1
            assert [s.item() for s in steps] == [0, 0]
            for t, b in zip(w, before, strict=True):
                for x, y in zip(triple(t), b, strict=True):
                    assert_same(x, y)
            assert not copies[0][0].float().any()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.91), (0.0, 0.9)])
def test_the_bound_of_an_update_holds(betas):
    """Whatever gradients come, an exact Adam never moves a weight by more than its bound."""
    hyper = (1.0, *betas, 0.0, 0.0)
    patterns = [
        torch.ones(60),
        torch.zeros(60),
        2.0 ** torch.arange(60),
        2.0 ** -torch.arange(60.0),
    ]
    patterns[1][0] = 1
    patterns += [(max(betas[0], 0.1) / betas[1]) ** -torch.arange(30.0), randn(60)]
    for pattern in patterns:
        w = m = v = torch.zeros(())
        for t, g in enumerate(pattern, 1):
            new, m, v = reference.adamw(w, m, v, g, t, *hyper)
            moved = (new - w).abs().item() if v > 0 else 0.0
            assert moved <= reference.update_bound(t, 1.0, *betas) * (1 + 1e-9)
            w = new


def test_the_op_refuses_by_name():
    w, m, v, g = (
        scaled(randn(4, 4), torch.float16),
        zeros((4, 4), E4M3),
        zeros((4, 4), torch.float16),
        randn(4, 4),
    )
    row = torch.zeros(4, 4, dtype=E4M3)
    one = torch.ones(())
    cases = [
        (([m], [m], [v], [g]), {}, "weight must be f32, bf16 or f16, got e4m3"),
        (([w], [m.qdata], [v], [g]), {}, "exp_avg is e4m3 and needs a scale and an amax"),
        (([w], [g.bfloat16()], [v], [g]), {}, "exp_avg must be f32, f16, e4m3 or e5m2, got bf16"),
        (([w], [zeros((4, 5), E4M3)], [v], [g]), {}, "exp_avg has 20 values, its parameter 16"),
        (([w], [m], [v], [randn(4, 3)]), {}, "grad has 12 values, its parameter 16"),
        (([w], [m], [v], [g]), {"copies": [(row, row.t(), one)]}, "must be contiguous"),
        (
            ([g.clone()], [g * 0], [g * 0], [g]),
            {"copies": [(row, row.clone(), one)]},
            "an FP8 copy goes with a scaled f16 weight, got f32",
        ),
        (
            ([w], [m], [v], [g]),
            {"copies": [(row, row[:2].clone(), one)]},
            "FP8 copies must be",
        ),
        (
            ([w], [m], [v], [g]),
            {"copies": [(row.to(FP8[1]), row.to(FP8[1]), one)]},
            "FP8 copies must be e4m3",
        ),
        (([randn(4, 4).t()], [g * 0], [g * 0], [g]), {}, "weight must be contiguous"),
        (([w], [m], [v], [g]), {"steps": [torch.zeros(())]}, "step must be one int64"),
    ]  # fmt: skip
    for arguments, options, message in cases:
        with pytest.raises(REFUSAL, match=message):
            adam(*arguments, **options)


# --- qv.AdamW ---------------------------------------------------------------------------------


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
        found += [*triple(p)]
        for state in optimizer.state[p].values():
            found += [*triple(state)]
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
    states = [triple(p.detach()), triple(zero), triple(zero)]
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
    before = {p: triple(p) for g in groups for p in g["params"]}
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
    before = triple(net[3].weight)
    optimizer.step()
    assert net[3].weight not in optimizer.state
    for a, b in zip(triple(net[3].weight), before, strict=True):
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
    torch.testing.assert_close(got, before * (1 - 1e-3) ** 3, rtol=3 * 2**-11, atol=1e-6)
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
    before = triple(net[3].weight)
    train(net, optimizer, 1, 1)
    assert (triple(net[3].weight)[0] != before[0]).any()
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
            assert_same(copies.row[:n, :k].contiguous(), row)
            assert_same(copies.col[:k, :n].contiguous(), row.t().contiguous())
            assert_same(copies.scale, scale)


def test_a_recipe_with_e5m2_weights_keeps_its_copies_e5m2():
    linear = dataclasses.replace(recipe.get("fp8lm-o2").linear, weight=torch.float8_e5m2)
    chosen = dataclasses.replace(recipe.get("fp8lm-o2"), name="e5m2", linear=linear)
    net = model(chosen)
    optimizer = qv.AdamW(net.parameters(), lr=1e-2, recipe=chosen)
    train(net, optimizer, 2)
    copies, weight = net[0].refresh(), net[0].weight.dequantize()
    assert copies.row.dtype == torch.float8_e5m2
    torch.testing.assert_close(copies.row.float() * copies.scale, weight, rtol=2**-3, atol=1e-6)


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
