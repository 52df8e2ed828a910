"""Subset-Norm and Subspace-Momentum (arXiv 2411.07120) as moments of AdamW."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from helpers import assert_same, randn
from subspaces import HYPER, rules, steps
from torch import nn

import quaver as qv
from quaver import models, recipe, reference
from quaver.optim import SubsetNorm, Subspace, rounding, subspace


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# Identities


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (5, 3, 4)])
def test_subsets_of_one_element_are_adam(shape):
    close(steps(rules(second=SubsetNorm(size=1)), shape)[0], steps("f32", shape)[0])


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("projector", ["svd", "srht", "topk", "random"])
def test_a_subspace_of_full_rank_is_a_moving_average(shape, projector):
    rule = rules(Subspace(rank=1000, every=1000, projector=projector))
    close(steps(rule, shape)[0], steps("f32", shape)[0])


def test_one_subset_is_adagrad_norm_with_decay():
    w, v = randn(24, 40).double(), 0.0
    lr, (beta1, beta2), eps, decay = HYPER.values()
    m = torch.zeros_like(w)
    for t in range(1, 8):
        g = randn(24, 40, seed=t).double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square().sum()
        scale = math.sqrt(v / (1 - beta2**t)) + eps
        w = (1 - lr * decay) * w - lr * m / (1 - beta1**t) / scale
    close(steps(rules(second=SubsetNorm(size=10**6)))[0], w.float())


def test_the_smaller_axis_is_summed_and_odd_sizes_have_a_short_subset():
    for shape, kept in (((24, 40), (1, 40)), ((40, 24), (40, 1)), ((8, 8), (8, 1))):
        _, state = steps(rules(second=SubsetNorm()), shape, count=1)
        assert state["exp_avg_sq"].shape == kept
        wanted = 0.05 * randn(*shape, seed=1).square().sum(kept.index(1), keepdim=True)
        close(state["exp_avg_sq"], wanted)
    _, state = steps(rules(second=SubsetNorm(size=100)), (7, 33), count=1)
    squares = randn(7, 33, seed=1).square().flatten()
    close(state["exp_avg_sq"], 0.05 * torch.stack([s.sum() for s in squares.split(100)]))


@pytest.mark.parametrize("projector", ["svd", "srht", "topk", "random"])
@pytest.mark.parametrize("shape", [(24, 40), (64, 32), (16, 16)])
def test_the_complement_is_orthogonal_to_the_subspace(projector, shape):
    g = randn(*shape)
    state = {key: slot.zeros(g) for key, slot in subspace.slots(Subspace(8, 5, projector)).items()}
    subspace.refresh_(Subspace(8, 5, projector), state, g, 3, 0)
    inside = subspace.project(state["basis"], g)
    rest = g - subspace.lift(state["basis"], inside, g.shape)
    assert subspace.project(state["basis"], rest).norm() < 1e-6 * g.norm()
    again = subspace.project(state["basis"], g - rest)
    assert (again - inside).norm() < 1e-6 * inside.norm()


# Refreshes


def momentum_oracle(grads, rule, start):
    """The paper's algorithm in float64, with the subspace chosen by this project's rule."""
    lr, (beta1, beta2), eps, decay = HYPER.values()
    w, v = start.double(), torch.zeros(start.shape, dtype=torch.float64)
    basis, m, since = None, None, 0
    for t, g in enumerate(grads, 1):
        if (t - 1) % rule.every == 0:
            new = subspace._choose(rule, g, 1, (t - 1) // rule.every)
            if rule.refresh == "carry" and basis is not None:
                m = subspace.project(new, subspace.lift(basis, m.float(), g.shape)).double()
            else:
                m, since = torch.zeros(8, g.shape[1], dtype=torch.float64), 0
            basis = new
        since += 1
        projected = subspace.project(basis, g).double()
        m = beta1 * m + (1 - beta1) * projected
        v = beta2 * v + (1 - beta2) * g.double().square()
        back = [subspace.lift(basis, x.float(), g.shape).double() for x in (m, projected)]
        if rule.paper_bias:
            numerator = (back[0] + g.double() - back[1]) / (1 - beta1**t)
        else:
            numerator = back[0] / (1 - beta1**since) + g.double() - back[1]
        w = (1 - lr * decay) * w - lr * numerator / ((v / (1 - beta2**t)).sqrt() + eps)
    return w.float()


@pytest.mark.parametrize("projector", ["svd", "srht", "topk", "random"])
@pytest.mark.parametrize("refresh", ["reset", "carry"])
@pytest.mark.parametrize("paper_bias", [False, True])
def test_steps_are_the_oracles(projector, refresh, paper_bias):
    rule = Subspace(8, 3, projector, refresh, paper_bias)
    grads = [randn(24, 40, seed=t) for t in range(1, 9)]
    found, state = steps(rules(rule), grads=grads, count=8)
    torch.testing.assert_close(
        found, momentum_oracle(grads, rule, randn(24, 40)), rtol=1e-5, atol=1e-5
    )
    assert state["counts"].tolist() == [2, 2 if refresh == "reset" else 8, 3]


def test_a_skipped_step_changes_nothing_and_a_due_refresh_waits():
    p, bias = nn.Parameter(randn(24, 40)), nn.Parameter(randn(24))
    optimizer = qv.AdamW([p, bias], **HYPER, recipe=rules(Subspace(8, 3, "topk"), SubsetNorm()))

    def step(seed, bad=None):
        p.grad, bias.grad = randn(24, 40, seed=seed), randn(24, seed=seed)
        if bad is not None:
            bad.grad.view(-1)[5] = torch.nan
        optimizer.step()

    def everything():
        states = [optimizer.state[q] for q in (p, bias)]
        return [p, bias, *(t for s in states for k, t in s.items() if k != "counts")]

    for bad in (p, bias):
        before = [t.clone() for t in everything()] if optimizer.state else [p.clone(), bias.clone()]
        step(1, bad)
        after = everything()
        for a, b in zip(before, after, strict=False):
            assert_same(a, b)
    assert optimizer.skipped == 2
    assert optimizer.state[p]["counts"].tolist() == [0, 0, 0]
    for seed in range(3):
        step(seed)
    step(9, p)  # due, and skipped
    assert optimizer.state[p]["counts"].tolist() == [3, 3, 1]
    step(4)
    assert optimizer.state[p]["counts"].tolist() == [1, 1, 2]
    assert optimizer.state[p]["step"] == 4


# Parameters and states


@pytest.mark.parametrize("how", ["nearest", "stochastic", "remainder", "remainder8"])
def test_bf16_parameters_round_as_the_fused_step_does(how):
    start = randn(24, 40).bfloat16()
    found, state = steps(rules(second=SubsetNorm(size=1), bf16_master=how), start=start)
    wanted, fused = steps(dataclasses.replace(recipe.get("f32"), bf16_master=how), start=start)
    if "remainder" in how:
        close(
            rounding.master(found, state["remainder"]), rounding.master(wanted, fused["remainder"])
        )
    else:  # a last bit of the f32 result may decide a rounding
        assert (found == wanted).float().mean() > 0.999


@pytest.mark.parametrize("first", [0, 1000])
def test_stochastic_rounding_is_the_fused_steps(first):
    new = randn(40, 33)
    p, step = nn.Parameter(torch.zeros(40, 33).bfloat16()), torch.tensor(first)
    with torch.no_grad():
        rounding.store_(p, new, "stochastic", None, 5, step)
    assert_same(p.detach(), reference.stochastic_bf16(new, 5, first))


def test_vectors_and_groups_without_compression_keep_adams_moments():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8))
    embedding, linear = model
    optimizer = qv.AdamW(
        [{"params": embedding.parameters(), "compress": False}, {"params": linear.parameters()}],
        lr=1e-2,
        recipe="snsm",
    )
    model(torch.arange(50)).square().mean().backward()
    optimizer.step()
    shapes = {
        q: {k: tuple(t.shape) for k, t in optimizer.state[p].items() if k.startswith("exp")}
        for q, p in model.named_parameters()
    }
    assert shapes == {
        "0.weight": {"exp_avg": (50, 16), "exp_avg_sq": (50, 16)},
        "1.weight": {"exp_avg": (8, 16), "exp_avg_sq": (1, 16)},
        "1.bias": {"exp_avg": (8,), "exp_avg_sq": (8,)},
    }


def fresh(rule="snsm", every=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 8)).to(torch.bfloat16)
    chosen = dataclasses.replace(
        recipe.get(rule), exp_avg=Subspace(rank=4, every=every, projector="random")
    )
    return model, qv.AdamW(model.parameters(), lr=1e-2, recipe=chosen)


def train(model, optimizer, batches):
    for seed in batches:
        model(randn(32, 16, seed=seed).bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("how", ["state_dict", "save", "deepcopy", "pickle"])
def test_training_resumes_to_the_same_bits(tmp_path, how):
    whole = fresh()
    train(*whole, range(11))
    first = fresh()
    train(*first, range(6))
    if how == "deepcopy":
        second = copy.deepcopy(first)
    elif how == "pickle":
        second = pickle.loads(pickle.dumps(first))
    elif how == "save":
        second = fresh()
        qv.save(tmp_path / "c.safetensors", *first, step=6)
        qv.load(tmp_path / "c.safetensors", *second)
    else:
        second = fresh()
        second[0].load_state_dict(first[0].state_dict())
        second[1].load_state_dict(first[1].state_dict())
    train(*second, range(6, 11))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert_same(a.detach(), b.detach())


@pytest.mark.parametrize("how", ["load", "in place"])
def test_a_run_goes_back_to_its_checkpoint(tmp_path, how):
    """Into the optimizer that wrote it: the refreshes are those of the checkpoint."""
    run = fresh()
    train(*run, range(6))
    qv.save(tmp_path / "c.safetensors", *run, step=6)
    states = [{k: v.clone() for k, v in s.items()} for s in run[1].state.values()]
    weights = [p.detach().clone() for p in run[0].parameters()]
    train(*run, range(6, 11))
    wanted = [p.detach().clone() for p in run[0].parameters()]
    if how == "load":
        qv.load(tmp_path / "c.safetensors", *run)
    else:  # as torch.distributed.checkpoint does
        with torch.no_grad():
            for p, kept in zip(run[0].parameters(), weights, strict=True):
                p.copy_(kept)
        for state, kept in zip(run[1].state.values(), states, strict=True):
            for key, value in kept.items():
                state[key].copy_(value)
    train(*run, range(6, 11))
    for a, b in zip(wanted, run[0].parameters(), strict=True):
        assert_same(a, b.detach())


def test_states_of_another_recipe_are_refused():
    model, optimizer = fresh()
    train(model, optimizer, range(2))
    other = qv.AdamW(model.parameters(), recipe="subset-norm")
    with pytest.raises(ValueError, match="has basis, counts, exp_avg, exp_avg_sq, step; wanted"):
        other.load_state_dict(optimizer.state_dict())
    narrower = dataclasses.replace(optimizer.recipe, exp_avg=Subspace(rank=3, projector="random"))
    with pytest.raises(ValueError, match="a projected moment of rank 3"):
        qv.AdamW(model.parameters(), recipe=narrower).load_state_dict(optimizer.state_dict())


def test_bytes_of_a_state():
    """Of Llama-2-7B's matrices on the meta device: a SubsetNorm beside a bf16 average, and both
    moments in bf16 at rank d / 4, with their bases."""
    config = models.load("tiny").replace(
        vocab=32000, dim=4096, layers=32, heads=32, kv_heads=32, ffn=11008
    )
    with torch.device("meta"):
        parameters = list(models.build(config).parameters())
    count = sum(p.numel() for p in parameters)
    for first, bar in (("bf16", 2.11), (Subspace(rank=1024, dtype=torch.bfloat16), 0.95)):
        chosen = rules(first, SubsetNorm(dtype=torch.bfloat16))
        optimizer = qv.AdamW(parameters, recipe=chosen)
        size = sum(t.nbytes for p in parameters for t in optimizer.state_of(p).values())
        assert size / count <= bar, size / count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Subspace(rank=0), "Subspace: rank must be an int from 1"),
        (lambda: Subspace(every=0), "Subspace: every must be an int from 1"),
        (lambda: Subspace(projector="qr"), "projector must be one of svd, srht, topk, random"),
        (lambda: Subspace(refresh="keep"), "refresh must be one of reset, carry"),
        (lambda: Subspace(dtype=torch.float16), "dtype must be one of"),
        (lambda: SubsetNorm(size=0), "SubsetNorm: size must be an int from 1"),
        (lambda: SubsetNorm(size=True), "SubsetNorm: size must be an int from 1"),
        (lambda: rules(SubsetNorm()), "exp_avg must be one of"),
        (lambda: rules("e4m3", SubsetNorm()), "exp_avg must be one of f32, bf16"),
        (lambda: rules("bf16", "f32"), "exp_avg must be one of"),
        (lambda: rules(Subspace(), linear=recipe.LinearRecipe()), "linear must be None"),
        (lambda: steps(rules(second=SubsetNorm(dtype=torch.bfloat16)), betas=(0.9, 0.999)),
         "needs beta2 <="),
    ],
)  # fmt: skip
def test_choices_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_converted_weights_and_changed_shapes_are_refused():
    model = nn.Sequential(nn.Linear(32, 32))
    qv.convert(model, "fp8lm-o2")
    with pytest.raises(ValueError, match="recipe snsm is for plain parameters"):
        qv.AdamW(model.parameters(), recipe="snsm")
    with pytest.raises(ValueError, match="compress must be True or False"):
        qv.AdamW([{"params": [nn.Parameter(randn(4, 4))], "compress": 1}], recipe="snsm")
    p = nn.Parameter(randn(8, 4))
    optimizer = qv.AdamW([p], recipe="snsm")
    p.grad = randn(8, 4)
    optimizer.step()
    p.data, p.grad = randn(4, 8), None
    p.grad = randn(4, 8)
    with pytest.raises(RuntimeError, match=r"changed from .* \[8, 4\] to .* \[4, 8\]"):
        optimizer.step()


def test_a_small_problem_is_learnt():
    """A regression by Adam at its learning rate, and by both at ten times that."""

    def loss_of(rule, lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        target = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        optimizer = qv.AdamW(model.parameters(), lr=lr, weight_decay=0.0, recipe=rule)
        for seed in range(200):
            x = randn(256, 64, seed=seed)
            loss = (model(x) - target(x).detach()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    adam = loss_of("f32", 1e-3)
    assert loss_of("subset-norm", 1e-2) < 1.2 * adam
    chosen = dataclasses.replace(recipe.get("snsm"), exp_avg=Subspace(rank=16, every=50))
    assert loss_of(chosen, 1e-2) < 1.5 * adam
