"""Subset-Norm and Subspace-Momentum over ranks: DDP and ZeRO step as one process, and FSDP2's
shards are refused by name."""

import dataclasses

import pytest
import ranks
import torch
from helpers import assert_same
from test_ddp import Net, batch, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import quaver as qv
from quaver import recipe
from quaver.distributed import ZeroAdamW, ddp
from quaver.optim import Subspace

STEPS = 7
RULES = ("subset-norm", "srht", "random", "topk", "svd")


def rules(name):
    """A recipe whose subspace is chosen anew after 3 steps."""
    if name == "subset-norm":
        return recipe.get(name)
    return dataclasses.replace(
        recipe.get("snsm"), exp_avg=Subspace(rank=4, every=3, projector=name, refresh="carry")
    )


def build(name, kind):
    torch.manual_seed(0)
    model = Net()
    groups = [
        {"params": [model.embedding.weight], "compress": False},
        {"params": [p for q, p in model.named_parameters() if not q.startswith("embedding")]},
    ]
    make = ZeroAdamW if kind.startswith("zero") else qv.AdamW
    options = {"stage": int(kind[-1])} if kind.startswith("zero") else {}
    return model, make(groups, lr=1e-2, recipe=rules(name), **options)


def train(rank, size, name, kind, poison=None):
    model, optimizer = build(name, kind)
    ddp(model, optimizer=optimizer, bucket_bytes=3000)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, *batch(step, rank, size))
        (loss * float("nan") if poison == (step, rank) else loss).backward()
        optimizer.step()
    shapes = {
        n: sorted((k, tuple(v.shape)) for k, v in optimizer.state[p].items())
        for n, p in model.named_parameters()
        if p in optimizer.state
    }
    return [p.detach().clone() for p in model.parameters()], shapes, optimizer.skipped


def on_rank(rank, size):
    """Weights by recipe, kind and whether a gradient of one rank is not finite, at a refresh."""
    return {
        (name, kind, poison): train(rank, size, name, kind, (3, 1) if poison else None)
        for name in RULES
        for kind in ("ddp", "zero1", "zero2")
        for poison in (False, True)
    }


@pytest.fixture(scope="module")
def found():
    return ranks.run(2, on_rank, 2)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("poison", [False, True])
def test_ranks_agree_and_zero_is_data_parallelism(found, name, poison):
    weights, shapes, skipped = found[0][name, "ddp", poison]
    assert skipped == poison
    for kind in ("ddp", "zero1", "zero2"):
        owned = {}
        for rank in found:
            mine, some, skips = rank[name, kind, poison]
            assert skips == skipped
            for a, b in zip(weights, mine, strict=True):
                assert_same(a, b, kind)
            owned |= some
        assert {n: owned[n] for n in shapes} == shapes  # ZeRO makes all states at once
    assert ("exp_avg_sq", (48, 1)) in shapes["first.weight"]
    assert ("exp_avg_sq", (11, 32)) in shapes["embedding.weight"]


@pytest.mark.parametrize("name", ["subset-norm", "random"])
def test_ranks_step_as_one_process(found, name):
    model, optimizer = build(name, "alone")
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *batch(step, 0, 1)).backward()
        optimizer.step()
    for one, p in zip(found[0][name, "ddp", False][0], model.parameters(), strict=True):
        # Sums of 2 halves of a batch differ in float32's last bits, and so do 7 steps of size 1e-2.
        torch.testing.assert_close(one, p.detach(), rtol=1e-4, atol=1e-4)


def refused(rank, size):
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    messages = []
    for name in ("subset-norm", "snsm"):
        try:
            qv.AdamW(model.parameters(), recipe=name)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_shards_of_fsdp2_are_refused():
    for messages in ranks.run(2, refused, 2):
        assert len(messages) == 2
        assert "keeps exp_avg_sq as subset sums in float32, which FSDP2's shards" in messages[0]
        assert "keeps exp_avg as a projected moment of rank 128" in messages[1]


def test_moments_are_public():
    assert qv.Subspace is Subspace
    assert qv.SubsetNorm is qv.optim.SubsetNorm
