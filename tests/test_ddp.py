"""Data parallelism by real processes: against the oracle, one process, and everything that goes
wrong."""

import contextlib
import copy
import math
import re

import pytest
import ranks
import torch
from helpers import assert_same
from torch import nn

import quaver as qv
from quaver import reference
from quaver.distributed import AutoScale, AutoScaleRule, ZeroAdamW, ddp

E4M3 = torch.float8_e4m3fn


class Net(nn.Module):
    """Two converted layers, an embedding, a norm, and a branch that need not be used."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 32)
        self.first = nn.Linear(32, 48)
        self.norm = nn.LayerNorm(48)
        self.branch = nn.Linear(48, 48)
        self.second = nn.Linear(48, 16)
        self.never = nn.Linear(16, 16)

    def forward(self, x, branch=True):
        h = self.norm(self.first(self.embedding(x)))
        return self.second(torch.tanh(h + self.branch(h) if branch else h))


def build(seed=0, recipe="fp8lm-o2"):
    torch.manual_seed(seed)
    model = qv.convert(Net(), recipe)
    groups = [{"params": model.parameters(), "weight_decay": 0.1}]
    return model, qv.AdamW(groups, lr=1e-2, recipe=recipe)


def batch(step, rank, size, rows=12):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(11, (rows, 5), generator=generator)
    y = torch.randn(rows, 5, 16, generator=generator)
    part = slice(rank * rows // size, (rank + 1) * rows // size)
    return x[part], y[part]


def loss_of(model, x, y, branch=True):
    return (model(x, branch) - y).square().mean()


def grads_of(model):
    found = {}
    for name, p in model.named_parameters():
        g = p.grad
        if isinstance(g, qv.ScaledTensor):
            g = (g.qdata.view(torch.uint8).clone(), g.scale.clone(), g.amax.clone())
        found[name] = copy.deepcopy(g)
    return found


def flat(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def same(a, b, what=""):
    a, b = flat(a), flat(b)
    assert len(a) == len(b), what
    for x, y in zip(a, b, strict=True):
        assert_same(x, y, what)


def one_backward(rank, size, bucket_bytes, algorithm):
    model, _ = build(seed=rank)  # ddp sends rank 0's
    parallel = ddp(model, bucket_bytes=bucket_bytes, algorithm=algorithm)
    start = copy.deepcopy(model.state_dict())
    with parallel.no_sync():
        loss_of(model, *batch(0, rank, size)).backward()
    local = grads_of(model)
    model.zero_grad()
    for buffer in model.buffers():
        buffer.zero_()
    loss_of(model, *batch(0, rank, size), branch=rank != 1).backward()
    other = grads_of(model)
    model.zero_grad()
    loss_of(model, *batch(0, rank, size)).backward()
    return {
        "start": {k: flat([v.qdata, v.scale]) if isinstance(v, qv.ScaledTensor) else v
                  for k, v in start.items()},
        "local": local, "mean": grads_of(model), "unused": other,
        "buffers": [b.clone() for b in model.buffers()],
        "traffic": dict(parallel.transport.traffic),
    }  # fmt: skip


def shard_length(sizes, ranks):
    return qv.ops.bucket_length(math.ceil(sum(map(qv.ops.bucket_length, sizes)) / ranks))


def test_backward_leaves_the_mean_of_all_ranks():
    size = 3
    results = ranks.run(size, one_backward, size, 2**20, "two_shot")
    for other in results[1:]:
        for key in ("start", "mean", "unused", "buffers"):
            same(results[0][key], other[key], key)
    for name, mean in results[0]["mean"].items():
        locals_ = [r["local"][name] for r in results]
        if name.startswith("never"):
            assert mean is None
        elif isinstance(mean, tuple):
            values = [q.view(E4M3).float() * s for q, s, _ in locals_]
            q, scale, _ = reference.two_shot(values, E4M3)
            assert_same(mean[0].view(E4M3), q, name)
            assert_same(mean[1], scale, name)
        else:
            total = locals_[0]
            for local in locals_[1:]:
                total = total + local
            assert_same(mean, total / size, name)
    # Rank 1 left the branch out: zeros there.
    unused, mean = results[0]["unused"], results[0]["mean"]
    assert unused["never.weight"] is None
    assert flat(unused["branch.bias"])[0].abs().max() > 0
    got = unused["branch.bias"]
    rest = sum(r["local"]["branch.bias"].double() for i, r in enumerate(results) if i != 1) / size
    torch.testing.assert_close(got.double(), rest, rtol=1e-5, atol=1e-7)
    # Two backwards of one bucket of FP8, with an amax a tensor, and one of f32; shards go out and
    # come back, to each other rank.
    named = dict(Net().named_parameters())
    low = [p.numel() for n, p in named.items() if isinstance(mean[n], tuple) or n == "never.weight"]
    plain = [p.numel() for n, p in named.items() if p.numel() not in low or p.dim() < 2]
    assert len(low) + len(plain) == len(named)
    low_shard, plain_shard = (shard_length(sizes, size) for sizes in (low, plain))
    others = size - 1
    sent = results[0]["traffic"]
    assert sent["gradient"] == 2 * others * (2 * low_shard + 4 * len(low) + 2 * 4 * plain_shard)
    notes = len(named) + 17 * 2 * 4  # used or not, and two histories of four layers
    assert sent["scale"] == 2 * (others * 4 * len(low) + math.ceil(2 * others / size * 4 * notes))
    assert sent["weight"] == sent["activation"] == 0
    small = ranks.run(size, one_backward, size, 1500, "two_shot")
    same(results[0]["mean"], small[0]["mean"], "other buckets")
    same(results[0]["unused"], small[0]["unused"], "other buckets")


def train(rank, size, steps, recipe, accumulate=1, poison=None, options=()):
    model, optimizer = build(recipe=recipe)
    parallel = ddp(model, bucket_bytes=4000, **dict(options))
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        parts = []
        for micro in range(accumulate):
            x, y = batch(accumulate * step + micro, rank, size)
            loss = loss_of(model, x, y) / accumulate
            if poison == (step, rank):
                loss = loss * float("inf")
            if micro + 1 < accumulate:
                with parallel.no_sync():
                    loss.backward()
            else:
                loss.backward()
            parts.append(loss.detach())
        qv.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(torch.stack(parts).sum())
    weights = [
        t.detach()
        for p in model.parameters()
        for t in ((p.qdata.view(torch.int16), p.scale) if isinstance(p, qv.ScaledTensor) else (p,))
    ]
    return torch.stack(losses), weights, optimizer.skipped, parallel.state_dict()  # fmt: skip


@pytest.mark.parametrize("recipe", ["fp8lm-o2", "f32"])
def test_ranks_train_as_one_process_does(recipe):
    size, steps = 2, 20
    results = ranks.run(size, train, size, steps, recipe, 2)
    same(results[0][1], results[1][1])
    mean = sum(r[0] for r in results) / size
    alone, _, _, _ = train(0, 1, steps, recipe, 2)
    assert mean[-1] < 0.9 * mean[0]
    tolerance = 1e-5 if recipe == "f32" else 0.02
    torch.testing.assert_close(mean, alone, rtol=tolerance, atol=0)


def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all():
    results = ranks.run(3, train, 3, 6, "fp8lm-o2", 1, (2, 1))
    assert [r[2] for r in results] == [1, 1, 1]
    for other in results[1:]:
        same(results[0][1], other[1])
    assert all(w.float().isfinite().all() for w in results[0][1])
    losses = torch.stack([r[0] for r in results])
    assert losses.isfinite().sum() == losses.numel() - 1


def accumulated(rank, size):
    """The sum of two micro-batches' gradients by itself, and its mean over ranks."""
    model, _ = build()
    parallel = ddp(model)
    weight, found = model.second.weight, []
    for last in (parallel.no_sync(), contextlib.nullcontext()):
        for buffer in model.buffers():
            buffer.zero_()
        with parallel.no_sync():
            loss_of(model, *batch(0, rank, size)).backward()
        with last:
            loss_of(model, *batch(1, rank, size)).backward()
        found.append((weight.grad.qdata.clone(), weight.grad.scale.clone()))
        model.zero_grad()
    return found


def test_the_sum_of_micro_batches_is_averaged():
    size = 2
    results = ranks.run(size, accumulated, size)
    sums = [codes for (codes, _), _ in results]
    assert all(codes.dtype == torch.bfloat16 for codes in sums)  # what a second one makes of e4m3
    codes, scale, _ = reference.two_shot([s.float() for s in sums], E4M3)
    for _, (mean, mean_scale) in results:
        assert_same(mean, codes)
        assert_same(mean_scale, scale)


def fp8_gradients(rank, size, recipe, owned):
    """A gradient by itself, its mean over ranks, and that mean with a NaN on the last rank."""
    model, _ = build(recipe=recipe)
    optimizer = ZeroAdamW(model.parameters(), recipe=recipe) if owned else None
    parallel = ddp(model, optimizer=optimizer, fp8_gradients=True)
    weight = model.second.weight
    with parallel.no_sync():
        loss_of(model, *batch(0, rank, size)).backward()
    local = weight.grad.clone()
    model.zero_grad()
    loss_of(model, *batch(0, rank, size)).backward()
    mean = weight.grad
    model.zero_grad()
    loss = loss_of(model, *batch(0, rank, size))
    (loss * math.nan if rank == size - 1 else loss).backward()
    return local, mean, weight.grad


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "coat"])
def test_plain_gradients_are_sent_in_fp8_by_option(recipe, owned):
    size = 2
    results = ranks.run(size, fp8_gradients, size, recipe, owned)
    codes, scale, _ = reference.two_shot([r[0].float() for r in results], E4M3)
    if owned:  # the owner keeps the f32 sum
        codes, scale, _ = reference.two_shot([r[0].float() for r in results], E4M3, torch.float32)
    wanted = (codes.float() * scale).to(results[0][0].dtype)
    have = [r for r in results if r[1] is not None]
    assert len(have) == (1 if owned else size)
    for _, mean, poisoned in have:
        assert type(mean) is torch.Tensor
        assert_same(mean, wanted)
        assert poisoned.isnan().all()


def mu_run(rank, size, steps):
    """mu, step by step, of a layer whose gradients are the same on all ranks, and of any."""
    return [mu_of(rank if other else 0, steps) for other in (False, True)]


def mu_of(seed, steps):
    torch.manual_seed(0)
    model = qv.convert(nn.Sequential(nn.Linear(64, 64, bias=False)), "fp8lm-o2")
    rule = AutoScaleRule(doubling=4)
    parallel = ddp(model, algorithm="ring", auto_scale=rule)
    seen = [parallel.state_dict()["mu"]["0.weight"]]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(32, 64, generator=generator)
        model.zero_grad()
        (model(x) * torch.randn(32, 64, generator=generator)).sum().backward()
        seen.append(parallel.state_dict()["mu"]["0.weight"])
    again = ddp(model, algorithm="ring", auto_scale=rule)
    again.load_state_dict(parallel.state_dict())
    assert again.state_dict() == parallel.state_dict()
    return seen


def test_mu_falls_where_sums_grow_and_rises_where_they_cancel():
    size = 4
    results = ranks.run(size, mu_run, size, 4)
    assert all(r == results[0] for r in results)
    falls, rises = results[0]
    assert falls[0] == rises[0] == 0.5
    assert min(falls) == 0.25  # 1/N: no sum of equal values overflows
    assert max(rises) > 0.5
    assert rises[1] == pytest.approx(0.5 * 2 ** (1 / 4))


@pytest.mark.parametrize("amax", [3.0, 1e-3, 1e4, 1e30])
def test_mu_follows_the_rule_whatever_the_amax(amax):
    """MS-AMP's draft turns the rule round where amax exceeds FP8's maximum."""
    values = [torch.randn(4096, generator=torch.Generator().manual_seed(r)) for r in range(8)]
    values = [v / v.abs().amax() * amax for v in values]
    rule = AutoScaleRule()
    growth = 2.0 ** (1 / 1000)
    for same_on_all, factor in ((True, 0.5), (False, growth)):
        scale = AutoScale([4096], 8, rule)
        assert scale.mu.item() == pytest.approx(8**-0.5)
        rows = [values[0]] * 8 if same_on_all else values
        codes = reference.ring_mean(rows, E4M3, scale.mu.item())
        shared, _ = reference.shared_scale([amax] * 8, E4M3)
        top = shared.double() * torch.finfo(E4M3).max / (8 * scale.mu.double())
        saturated = (codes.abs() >= top * (1 - 1e-6)).sum()[None]
        assert (saturated > 0) == same_on_all
        scale.update(saturated.int(), torch.tensor([True]))
        assert scale.mu.item() == pytest.approx(8**-0.5 * factor)


def test_mu_is_clamped_and_keeps_still_for_what_is_not_finite():
    yes, no = torch.tensor([True, True]), torch.tensor([True, False])
    scale = AutoScale([10, 10**6], 4, AutoScaleRule(doubling=1))
    scale.update(torch.tensor([1, 10]), yes)  # a tenth, and a hundred-thousandth: not above it
    assert scale.mu.tolist() == [0.25, 1.0]
    scale.update(torch.tensor([1, 11]), yes)
    assert scale.mu.tolist() == [0.25, 0.5]
    scale.update(torch.tensor([0, 11]), no)
    assert scale.mu.tolist() == [0.5, 0.5]
    assert AutoScale([1], 4, AutoScaleRule(least=0.6)).mu.item() == pytest.approx(0.6)
    for bad in ({"backoff": 1.0}, {"doubling": 0}, {"threshold": -1}, {"least": 2.0}):
        with pytest.raises(ValueError, match="AutoScaleRule: out of range"):
            AutoScaleRule(**bad)


DISAGREEMENTS = {
    "shape": r"tensor 2 is 1.weight \[16, 16\] .* on rank 0, 1.weight \[32, 16\]",
    "order": r"tensor 1 is 0.bias .* on rank 0, 1.weight .* on rank 1",
    "recipe": r"tensor 0 is 0.weight \[16, 16\] float16 .* on rank 0, 0.weight \[16, 16\] float32",
    "options": "buckets of 100 bytes, .* on rank 0, .* buckets of 101 bytes, .* on rank 1",
}


def disagree(rank):
    found = {}
    for what in DISAGREEMENTS:
        out = 16 + 16 * (what == "shape" and rank)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, out))
        if what == "order" and rank:
            model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16))
        model = qv.convert(model, "tensorwise" if what == "recipe" and rank else "fp8lm-o2")
        with pytest.raises(ValueError) as error:
            ddp(model, bucket_bytes=100 + rank if what == "options" else 1000)
        found[what] = str(error.value)
    return found


def test_ranks_that_disagree_are_told_at_the_start():
    for texts in ranks.run(2, disagree):
        for what, message in DISAGREEMENTS.items():
            assert re.search(message, texts[what]), texts[what]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "tree"}, "algorithm must be one of"),
        ({"dtype": torch.float16}, "dtype must be"),
        ({"bucket_bytes": 0}, "bucket_bytes must be positive, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ddp(nn.Linear(2, 2), **options)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        ddp(nn.Linear(2, 2).requires_grad_(False))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"0.weight is on cpu, 1.weight on meta"):
        ddp(mixed)
