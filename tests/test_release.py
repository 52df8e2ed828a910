"""Gradient release: the ordinary step's bits, no gradient that stays, and clipping against an
oracle."""

import copy

import pytest
import ranks
import torch
from helpers import assert_same
from torch import nn

import quaver as qv
from quaver.distributed import ddp


class Net(nn.Module):
    """Layers of several kinds, a weight that two of them share, and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.first = nn.Linear(32, 48)
        self.norm = nn.LayerNorm(48)
        self.second = nn.Linear(48, 32)
        self.never = nn.Linear(16, 16)
        self.head = nn.Linear(32, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.norm(self.first(self.embed(x))))))


def build(recipe="bf16", seed=0, dtype=None):
    torch.manual_seed(seed)
    model = Net().to(dtype) if dtype else Net()
    if recipe in ("coat", "fp8lm-o2"):
        model = qv.convert(model, recipe, skip=("head",))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return model, qv.AdamW(groups, lr=1e-2, recipe=recipe)


def loss_of(model, step, part=slice(None), scale=1.0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(11, (12, 5), generator=generator)[part]
    y = torch.randint(11, (12, 5), generator=generator)[part]
    return scale * nn.functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def everything(model, optimizer):
    values = [*model.parameters(), *model.buffers()]
    for p in model.parameters():
        values += [v for _, v in sorted(optimizer.state.get(p, {}).items())]
    found = []
    for value in values:
        parts = value.parts() if isinstance(value, qv.ScaledTensor) else {"": value}
        found += [t.detach().clone() for t in parts.values() if t is not None]
    return found


def same(a, b):
    a, b = everything(*a), everything(*b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)


def gradient_bytes(model):
    return {
        n: sum(t.nbytes for t in qv.tensor.plain_tensors(p.grad))
        for n, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("recipe, dtype", [
    ("bf16", None), ("coat", None), ("coat", torch.bfloat16), ("fp8lm-o2", None), ("snsm", None),
])  # fmt: skip
def test_the_bits_are_the_ordinary_steps_and_no_gradient_stays(recipe, dtype):
    ordinary, released = build(recipe, dtype=dtype), build(recipe, dtype=dtype)
    peak, model = [], released[0]
    qv.release_gradients(*released)
    for p in model.parameters():  # after the release's hooks
        p.register_post_accumulate_grad_hook(
            lambda _: peak.append(sum(gradient_bytes(model).values()))
        )
    for p in model.parameters():
        p.register_hook(lambda _: peak.append(sum(gradient_bytes(model).values())))
    for step in range(4):
        for net, optimizer in (ordinary, released):
            loss_of(net, step).backward()
            if net is model:
                assert gradient_bytes(model) == {}
            optimizer.step()
            optimizer.zero_grad()
    same(ordinary, released)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    assert peak and max(peak) <= largest


def test_schedulers_counts_and_removal():
    model, optimizer = build()
    release = qv.release_gradients(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)
    other = build()
    other_scheduler = torch.optim.lr_scheduler.LinearLR(other[1], 0.5, 1.0, 4)
    for step in range(3):
        optimizer.step(lambda step=step: loss_of(model, step).backward())
        scheduler.step()
        loss_of(other[0], step).backward()
        other[1].step()
        other_scheduler.step()
        other[1].zero_grad()
    same((model, optimizer), other)
    assert optimizer.state[model.first.weight]["step"] == 3
    assert model.never.weight not in optimizer.state
    release.remove()
    loss_of(model, 9).backward()
    assert model.first.weight.grad is not None
    qv.release_gradients(model, optimizer)


@pytest.mark.parametrize("clip, max_norm", [("tensor", None), ("exact", None), ("exact", 0.1)])
@pytest.mark.parametrize("recipe", ["bf16", "fp8lm-o2"])
def test_micro_batches_are_summed(clip, max_norm, recipe):
    ordinary, released = build(recipe), build(recipe)
    release = qv.release_gradients(*released, max_norm, clip, accumulate=3)
    for step in range(3):
        for net, optimizer in (ordinary, released):
            count = 3 if step < 2 else 2  # the last step ends early
            for micro in range(count):
                loss = loss_of(net, 10 * step + micro, scale=1 / 3)
                (release.backward if net is released[0] else torch.Tensor.backward)(loss)
            if net is ordinary[0] and max_norm:
                qv.clip_grad_norm_(net.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    same(ordinary, released)


# Clipping


def clipped(model, norms, max_norm):
    for p in model.parameters():
        if p.grad is not None:
            norm = norms(p)
            p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def own_norm(p):
    return qv.ops.grad_norm([p.grad])[0]


def test_tensor_clips_each_gradient_by_its_own_norm():
    ordinary, released = build(), build()
    qv.release_gradients(*released, max_norm=0.01)
    for step in range(3):
        loss_of(ordinary[0], step).backward()
        clipped(ordinary[0], own_norm, 0.01)
        loss_of(released[0], step).backward()
        for _, optimizer in (ordinary, released):
            optimizer.step()
            optimizer.zero_grad()
    same(ordinary, released)


def test_lagged_clips_by_the_norm_of_the_step_before_and_resumes():
    ordinary, released = build(), build()
    release = qv.release_gradients(*released, max_norm=0.01, clip="lagged")
    before = None
    for step in range(6):
        loss_of(ordinary[0], step).backward()
        now = qv.clip_grad_norm_(ordinary[0].parameters(), float("inf"))
        clipped(ordinary[0], lambda p, n=before: own_norm(p) if n is None else n, 0.01)
        loss_of(released[0], step).backward()
        for _, optimizer in (ordinary, released):
            optimizer.step()
            optimizer.zero_grad()
        before = now
        torch.testing.assert_close(release.state_dict()["norm"], before, rtol=1e-6, atol=0)
        if step == 3:
            state, resumed = release.state_dict(), build()
            resumed[0].load_state_dict(released[0].state_dict())
            resumed[1].load_state_dict(copy.deepcopy(released[1].state_dict()))
            again = qv.release_gradients(*resumed, max_norm=0.01, clip="lagged")
            again.load_state_dict(state)
    for a, b in zip(everything(*ordinary), everything(*released), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for step in (4, 5):
        loss_of(resumed[0], step).backward()
        resumed[1].step()
    same(resumed, released)


@pytest.mark.parametrize("recipe", ["bf16", "coat", "fp8lm-o2"])
def test_exact_is_the_ordinary_clipped_step(recipe):
    ordinary, released = build(recipe), build(recipe)
    release = qv.release_gradients(*released, max_norm=0.05, clip="exact")
    for step in range(3):
        loss_of(ordinary[0], step).backward()
        qv.clip_grad_norm_(ordinary[0].parameters(), 0.05)
        release.backward(loss_of(released[0], step))
        assert gradient_bytes(released[0]) == {}
        for _, optimizer in (ordinary, released):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(everything(*ordinary), everything(*released), strict=True):
        if recipe == "bf16":  # the sum of squares is taken in another order: one ulp of the norm
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        else:  # which may move a code of 8 bits
            close = torch.isclose(a.float(), b.float(), rtol=0.13, atol=1e-5).float().mean()
            assert close > 0.98


# What is not finite


@pytest.mark.parametrize("clip", ["tensor", "lagged", "exact"])
def test_a_gradient_that_is_not_finite(clip):
    model, optimizer = build()
    release = qv.release_gradients(model, optimizer, max_norm=1.0, clip=clip)
    release.backward(loss_of(model, 0))
    optimizer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    bad = model.first.bias.register_hook(lambda g: g * torch.nan)
    release.backward(loss_of(model, 1))
    bad.remove()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    used = {n for n in before if not n.startswith("never")}
    assert changed == (set() if clip == "exact" else used - {"first.bias"})
    assert optimizer.skipped == 1
    assert release.skipped == (len(used) if clip == "exact" else 1)
    assert optimizer.state[model.first.bias]["step"] == 1
    release.backward(loss_of(model, 2))
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())


# Misuse


def test_misuse_is_named():
    model, optimizer = build()
    cases = [
        (TypeError, "AdamW", (model, torch.optim.AdamW(model.parameters()))),
        (ValueError, "clip must be one of", (model, optimizer, 1.0, "global")),
        (ValueError, "max_norm must be", (model, optimizer, -1.0)),
        (ValueError, "needs a max_norm", (model, optimizer, None, "lagged")),
        (ValueError, "accumulate must be", (model, optimizer, None, "tensor", 0)),
        (ValueError, "never.weight is no parameter of", (
            model, qv.AdamW([p for n, p in model.named_parameters() if n != "never.weight"]))),
    ]  # fmt: skip
    for error, text, arguments in cases:
        with pytest.raises(error, match=text):
            qv.release_gradients(*arguments)
    release = qv.release_gradients(model, optimizer)
    with pytest.raises(ValueError, match=r"embed.weight has a release already"):
        qv.release_gradients(model, optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="backward ran more than accumulate=1 times"):
        loss_of(model, 1).backward()
    optimizer.step()
    loss_of(model, 1).backward()
    release.remove()
    qv.release_gradients(model, optimizer, 1.0, "exact")
    with pytest.raises(RuntimeError, match=r"needs release.backward"):
        loss_of(model, 1).backward()


def test_activations_that_are_computed_again():
    ordinary, released = build(), build()
    qv.release_gradients(*released)
    for net, optimizer in (ordinary, released):
        forward = net.forward
        net.forward = lambda x, f=forward: torch.utils.checkpoint.checkpoint(
            f, x, use_reentrant=False
        )
        for step in range(2):
            loss_of(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(ordinary, released)


# Ranks


def train(rank, size, recipe, released, first):
    model, optimizer = build(recipe, seed=rank)
    release = qv.release_gradients(model, optimizer, accumulate=2) if released and first else None
    parallel = ddp(model, bucket_bytes=4096)
    if released and not first:
        release = qv.release_gradients(model, optimizer, accumulate=2)
    for step in range(2):
        with parallel.no_sync():
            loss_of(model, 2 * step, slice(rank * 6, rank * 6 + 6)).backward()
        loss_of(model, 2 * step + 1, slice(rank * 6, rank * 6 + 6)).backward()
        if released:
            assert gradient_bytes(model) == {}
        optimizer.step()
        optimizer.zero_grad()
    found = everything(model, optimizer)
    if release is not None:
        with pytest.raises(RuntimeError, match="inside no_sync"):
            loss_of(model, 0).backward()
    return found


@pytest.mark.parametrize("recipe", ["bf16", "fp8lm-o2"])
@pytest.mark.parametrize("first", [True, False])
def test_data_parallel_ranks_update_by_the_mean(recipe, first):
    wanted = ranks.run(2, train, 2, recipe, False, first)
    found = ranks.run(2, train, 2, recipe, True, first)
    for rank in range(2):
        for a, b in zip(wanted[rank], found[rank], strict=True):
            assert_same(a, b)


def test_torchs_data_parallelism_is_refused():
    model, optimizer = build()
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(ValueError, match=r"use quaver.distributed.ddp"):
        qv.release_gradients(wrapped, optimizer)
