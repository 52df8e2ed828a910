"""FSDP2 that gathers plain weights as the codes of 128 x 128 tiles."""

import io

import pytest
import ranks
import torch
from helpers import assert_same, bits, randn
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import quaver as qv
from quaver import recipe
from quaver.distributed.fsdp.tiles import TileShard, tile_codes
from quaver.placement import transport

RULE = recipe.get("blockwise").linear
# Tiles that no shard cuts; that shards cut, one of them in three; ranks with few rows, or none.
SHAPES = [(512, 130), (300, 257), (130, 128), (5, 40)]
BAD = [None, torch.nan, -torch.inf]


def weight(shape, bad):
    w = randn(*shape) * torch.logspace(-3, 3, shape[0])[:, None]
    w[: shape[0] // 3] = 0
    if bad is not None:
        w[-1, 1] = bad
    return w


def _codes(rank, size):
    link = transport(torch.distributed.group.WORLD)
    found = []
    for shape in SHAPES:
        for bad in BAD:
            chunks = weight(shape, bad).chunk(size)
            shard = chunks[rank] if rank < len(chunks) else torch.empty(0, shape[1])
            codes, scales = tile_codes(shard, shape[0], RULE, link)
            found.append((bits(codes), scales))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_codes_and_scales_are_those_of_one_process(size):
    found = ranks.run(size, _codes, size)
    cases = [(shape, bad) for shape in SHAPES for bad in BAD]
    for i, (shape, bad) in enumerate(cases):
        codes, scale, *_ = torch.ops.quaver.cast_layouts(weight(shape, bad), RULE.weight, "tile")
        assert all(torch.equal(scale.nan_to_num(nan=7), f[i][1].nan_to_num(nan=7)) for f in found)
        if bad is None:
            assert_same(torch.cat([f[i][0] for f in found]), bits(codes[: shape[0], : shape[1]]))


def _model(name="blockwise"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256, bias=False))
    return qv.convert(model, name, skip=())


def _step(model, optimizer):
    loss = model(randn(16, 256)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _lives(rank):
    """What other code does with sharded parameters, between steps."""
    model = qv.distributed.fully_shard(_model(), gradient="f32")
    link = qv.distributed.transport_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    before = link.traffic["weight"]
    losses = [_step(model, optimizer)]
    sent = link.traffic["weight"] - before
    assert all(isinstance(m.weight._local_tensor, TileShard) for m in (model[0], model[2]))
    losses.append(_step(model, optimizer))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    losses.append(_step(model, optimizer))
    model.load_state_dict(state, assign=True)  # leaves plain shards
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses.append(_step(model, optimizer))
    file = io.BytesIO()
    torch.save([p._local_tensor for p in model.parameters()], file)
    read = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert all(type(t) is torch.Tensor for t in read)
    assert type(model[0].weight._local_tensor + 1) is torch.Tensor
    model.unshard()
    assert isinstance(model[0].weight, qv.ScaledTensor)
    model.reshard()
    assert isinstance(model[0].weight, DTensor)
    model.double().float()  # leaves plain shards
    assert _step(model, torch.optim.SGD(model.parameters(), lr=0.1)) > 0
    assert isinstance(model[0].weight._local_tensor, TileShard)
    return losses, sent


def test_sharded_weights_live_as_plain_ones():
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = [_step(model, optimizer) for _ in range(3)]
    values = 2 * 256 * 512
    for found, sent in ranks.run(2, _lives):
        assert found == [*losses, losses[2]]
        # This rank's half of each weight, a byte a value, and of the bias in f32, gathered once:
        # a unit of no outer one stays gathered until backward.
        assert sent == values // 2 + 512 * 4 // 2


def _torchs(rank):
    model = _model()
    fully_shard(model)
    return _step(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))


def test_torchs_own_fully_shard_gathers_plain_weights_to_the_same_codes():
    model = _model()
    loss = _step(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
    assert ranks.run(2, _torchs) == [loss, loss]


def _compiled(rank, name):
    losses = []
    for compiled in (False, True):
        model = qv.distributed.fully_shard(_model(name))
        optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=name)
        whole = torch.compile(model) if compiled else model
        losses.append([_step(whole, optimizer) for _ in range(2)])
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8lm-o2", "blockwise"])
def test_a_sharded_model_compiles(name):
    """Graphs end at the hooks that exchange messages."""
    for eager, compiled in ranks.run(2, _compiled, name):
        assert eager == compiled
