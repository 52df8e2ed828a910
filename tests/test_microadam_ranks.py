"""MicroAdam over ranks: alike under ddp, refused by name where shards would cut its blocks."""

import pytest
import ranks
import torch
from helpers import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import quaver as qv

STEPS = 6


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 130), nn.GELU(), nn.Linear(130, 16))
    return model, qv.MicroAdam(model.parameters(), 1e-2, density=0.05, window=3)


def train(rank, size):
    model, optimizer = build()
    qv.distributed.ddp(model)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(12, 40, generator=torch.Generator().manual_seed(step))
        part = x[rank * 12 // size : (rank + 1) * 12 // size]
        loss = (model(part) - part[:, :16]).square().mean()
        (loss * (float("inf") if (step, rank) == (3, size - 1) else 1)).backward()
        optimizer.step()
        losses.append(loss.detach())
    states = [t for p in model.parameters() for t in optimizer.state[p].values()]
    return torch.stack(losses), [p.detach() for p in model.parameters()], states, optimizer.skipped


def test_ranks_step_alike_and_as_one_process_does():
    results = ranks.run(2, train, 2)
    for a, b in zip(results[0][1] + results[0][2], results[1][1] + results[1][2], strict=True):
        assert_same(a, b)
    assert [r[3] for r in results] == [1, 1]
    alone = train(0, 1)
    mean = (results[0][0] + results[1][0]) / 2
    torch.testing.assert_close(mean, alone[0], rtol=1e-5, atol=0)


def refused(rank, size):
    model, _ = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    try:
        qv.MicroAdam(model.parameters(), 1e-3)
    except ValueError as error:
        return str(error)


def test_shards_are_refused_by_name():
    for error in ranks.run(2, refused, 2):
        assert "MicroAdam: wanted whole parameters, got a shard of FSDP2" in error
    p = nn.Parameter(torch.zeros(8, 8))
    p.shard = qv.placement.Shard(0, (16,), None)
    with pytest.raises(ValueError, match="or tensor parallelism"):
        qv.MicroAdam([p], 1e-3)


def test_released_gradients_take_the_same_steps():
    (whole, optimizer), (freed, other) = build(), build()
    release = qv.release_gradients(freed, other)
    for step in range(STEPS):
        x = torch.randn(12, 40, generator=torch.Generator().manual_seed(step))
        for model, opt in ((whole, optimizer), (freed, other)):
            (model(x) - x[:, :16]).square().mean().backward()
            opt.step()
            opt.zero_grad()
    release.remove()
    for p, q in zip(whole.parameters(), freed.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
