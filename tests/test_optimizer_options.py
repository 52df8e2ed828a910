"""AdamW's options: groups, schedulers, closures, clipping, and what is refused."""

import pytest
import torch
from adam_training import loss_of, model, train
from helpers import assert_same, parts_of
from torch import nn

import quaver as qv
from quaver import ScaledTensor, reference

INF, NAN = float("inf"), float("nan")


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
