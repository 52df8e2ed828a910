"""Grass (arXiv 2406.17660): the choice of rows, Adam on them, and their gradients."""

import pytest
import torch
from helpers import assert_same, randn
from row_training import HYPER, Net, build, everything, loss_of, same, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quaver as qv
from quaver.optim.grass import select_rows
from quaver.rows import Rows

# Against AdamW


def test_all_rows_are_adamw():
    grass = build(rank=10**6, every=100, select="top", weight_decay=0.1)
    torch.manual_seed(0)
    model = Net()
    adam = (model, qv.AdamW(model.parameters(), **HYPER, weight_decay=0.1, recipe="bf16"))
    train(*grass, range(8))
    train(*adam, range(8))
    for p, q in zip(grass[0].parameters(), adam[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", [None, "tensorwise", "rowwise", "blockwise", "coat"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("select", ["top", "sample", "sample-uniform"])
def test_rows_that_are_not_chosen_keep_their_bits(recipe, dtype, select):
    model, optimizer = build(recipe=recipe, dtype=dtype, select=select, weight_decay=0.1, lr=0.1)
    train(model, optimizer, range(1))
    for step in range(1, 6):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss_of(model, step).backward()
        whole = {n for n, p in model.named_parameters() if not isinstance(p.grad, Rows)}
        due = {"embed.weight", "first.bias", "norm.weight", "norm.bias", "lm_head.weight"}
        assert whole == (due if step % 3 else set(before))
        optimizer.step()
        optimizer.zero_grad()
        for name in ("first.weight", "second.weight"):
            p = model.get_parameter(name)
            rows = optimizer.state[p]["rows"]
            kept = torch.ones(len(p), dtype=torch.bool).index_fill_(0, rows, False)
            assert_same(p.detach()[kept], before[name][kept])
            assert not torch.equal(p.detach()[rows], before[name][rows])
            assert kept.sum() >= len(p) - 8


def oracle(grads, start, select, rank=8, every=3, scale=0.7, decay=0.1, ordinal=1):
    """The paper's algorithm in float64, with P as a matrix."""
    lr, (beta1, beta2), eps = HYPER.values()
    w = start.double()
    for t, g in enumerate(grads):
        if t % every == 0:
            index, rho = select_rows(g.norm(dim=1), rank, select, ordinal, t // every)
            project = torch.zeros(rank, len(w), dtype=torch.float64)
            project[torch.arange(rank), index] = rho.double()
            m = v = torch.zeros(rank, w.shape[1], dtype=torch.float64)
        k = t % every + 1
        chosen = project @ g.double()
        m = beta1 * m + (1 - beta1) * chosen
        v = beta2 * v + (1 - beta2) * chosen.square()
        update = m / (1 - beta1**k) / ((v / (1 - beta2**k)).sqrt() + eps)
        touched = (project != 0).any(0)[:, None]
        w = torch.where(touched, (1 - lr * decay) * w, w) - lr * scale * project.t() @ update
    return w.float()


@pytest.mark.parametrize("select", ["top", "sample", "sample-uniform"])
def test_steps_are_the_oracles(select):
    p = nn.Parameter(randn(24, 40))
    with pytest.warns(UserWarning, match="saves no gradient memory"):
        optimizer = qv.Grass(
            [p], **HYPER, weight_decay=0.1, rank=8, every=3, scale=0.7, select=select
        )
    grads = [randn(24, 40, seed=t) for t in range(1, 9)]
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    wanted = oracle(grads, randn(24, 40), select)
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-5)
    assert optimizer.state[p]["counts"].tolist() == [2, 2, 3]
    assert optimizer.state[p]["step"] == 8


@pytest.mark.parametrize("select", ["sample", "sample-uniform"])
def test_the_mean_of_projections_is_the_identity(select):
    norms, rank, draws = randn(16).abs() + 0.1, 4, 10_000
    total, square = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for draw in range(draws):
        index, rho = select_rows(norms, rank, select, 7, draw)
        diagonal = torch.zeros(16, dtype=torch.float64)
        diagonal.index_add_(0, index, rho.double().square())
        total += diagonal
        square += diagonal.square()
    mean = total / draws
    sigma = ((square / draws - mean.square()) / draws).sqrt()
    # Off the diagonal P P^T is zero by construction: each row of P^T has one entry.
    assert ((mean - 1).abs() < 3 * sigma).all()


# Gradients


class Largest(TorchDispatchMode):
    """The largest tensor that an op makes, in elements."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs))
                 if type(t) in (torch.Tensor, nn.Parameter)}  # fmt: skip
        for t in torch.utils._pytree.tree_leaves(out):
            if type(t) is torch.Tensor and t.untyped_storage()._cdata not in given:
                self.most = max(self.most, t.nbytes)
        return out


@pytest.mark.parametrize("recipe, size", [(None, 4), ("tensorwise", 4), ("coat", 2)])
def test_backward_makes_no_whole_gradient(recipe, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
    if recipe:
        model = qv.convert(model, recipe)
    optimizer = qv.Grass(model, **HYPER, rank=32, every=100, recipe=recipe or "bf16")
    seen = []
    for step in range(3):
        with Largest() as largest:
            loss = (
                model(randn(16, 256, seed=step).to(model[0].weight.dtype)).float().square().mean()
            )
            if step:
                largest.most = 0
            loss.backward()
        seen.append(largest.most)
        optimizer.step()
        optimizer.zero_grad()
    whole = 256 * 512 * size
    assert seen[0] >= whole
    if recipe:  # dgrad casts the weight again, to one byte a value
        assert max(seen[1:]) < whole
    else:
        assert max(seen[1:]) <= 32 * 512 * size


def test_accumulation_and_clipping_take_the_rows():
    one, two, three = build(), build(), build()
    for step in range(6):
        loss_of(one[0], step).backward()
        for half in range(2):
            part = slice(6 * half, 6 * half + 6)
            for net in (two[0], three[0]):
                loss_of(net, step, part, scale=0.5).backward()
        wanted = torch.stack([
            p.grad.values.norm() if isinstance(p.grad, Rows) else p.grad.norm()
            for p in one[0].parameters()
        ]).norm()  # fmt: skip
        norms = [qv.clip_grad_norm_(net.parameters(), 0.1) for net in (one[0], two[0])]
        norms.append(nn.utils.clip_grad_norm_(three[0].parameters(), 0.1))
        for norm in norms:
            torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=0)
        for net, optimizer in (one, two, three):
            after = qv.clip_grad_norm_(net.parameters(), float("inf"))
            torch.testing.assert_close(after, torch.tensor(0.1), rtol=1e-4, atol=0)
            optimizer.step()
            optimizer.zero_grad()
    for other in (two, three):
        for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-4)


def test_a_skipped_step_changes_nothing_and_a_due_choice_waits():
    model, optimizer = build()
    for bad, step in (
        (True, 0),
        (False, 0),
        (False, 1),
        (True, 2),
        (False, 2),
        (True, 3),
        (False, 4),
    ):
        before = everything(model, optimizer) if optimizer.state else None
        loss_of(model, step).backward()
        if bad:
            model.norm.bias.grad[3] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        ages = optimizer.state[model.first.weight]["counts"].tolist()
        if bad and before is not None:
            now = everything(model, optimizer)
            moved = [
                i for i, (a, b) in enumerate(zip(before, now, strict=True)) if not torch.equal(a, b)
            ]
            assert all(before[i].dtype == torch.int64 for i in moved)  # the age alone
    assert ages[2] == 2
    assert optimizer.skipped == 3


def test_gradient_release_takes_the_rows():
    ordinary, released = build(select="sample"), build(select="sample")
    qv.release_gradients(*released)
    assert train(*ordinary, range(7)) == train(*released, range(7))
    same(ordinary, released)


def test_autocast_and_recomputed_activations():
    one, two = build(), build()
    forward = two[0].forward
    two[0].forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    for net in (one, two):
        with torch.autocast("cpu", torch.bfloat16):
            train(*net, range(5))
    same(one, two)


def test_a_layers_output_and_gradients_are_torchs():
    model, optimizer = build()
    train(model, optimizer, range(1))
    other = Net()
    other.load_state_dict(model.state_dict())
    for net in (model, other):
        loss_of(net, 1).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        wanted = q.grad
        if isinstance(p.grad, Rows):
            rows = optimizer.state[p]["rows"]
            assert_same(p.grad.index, rows)
            torch.testing.assert_close(p.grad.values, wanted[rows], rtol=1e-5, atol=1e-7)
            assert p.grad.shape == p.shape
            with pytest.raises(NotImplementedError, match="of which 8 rows exist"):
                p.grad @ p.grad.t()
        else:
            torch.testing.assert_close(p.grad, wanted, rtol=1e-5, atol=1e-7, msg=name)
    optimizer.remove()
    model.zero_grad()
    loss_of(model, 2).backward()
    assert type(model.first) is nn.Linear
    assert not isinstance(model.first.weight.grad, Rows)
    optimizer.step()
