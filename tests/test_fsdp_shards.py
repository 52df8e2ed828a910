"""FSDP2 on converted models: rows and codes of shards, plain weights, and resharding."""

import json

import pytest
import ranks
import torch
from helpers import assert_same, randn
from sharded import LR, adamw, assert_same_state, batch, build, here, join, loss_of, train

import quaver as qv
from quaver.distributed.fsdp.reduce_scatter import decode_e4m3, encode_e4m3

# One process


def test_rows_of_a_weight_are_codes_that_share_its_scale():
    whole = qv.quantize(randn(6, 10), torch.float16)
    rows = whole[2:4]
    assert type(rows) is qv.ScaledTensor and rows.scale is whole.scale and rows.shares_scale
    assert_same(rows.qdata, whole.qdata[2:4])
    assert_same(whole[:, 2:4].qdata, whole.qdata[:, 2:4])
    _, second = whole.split(3)
    assert_same(second.qdata, whole.qdata[3:])
    before = whole.dequantize()
    rows.copy_(torch.ones(2, 10))
    before[2:4] = 1
    assert_same(whole.dequantize(), before)
    rows.mul_(0.5)
    before[2:4] = 0.5
    assert_same(whole.dequantize(), before)
    with pytest.raises(ValueError, match="does not fit into a part"):
        rows.fill_(1e9)
    assert_same(whole.dequantize(), before)
    rows.fill_(-3.0)
    assert whole.amax == 3
    assert type(whole.new_zeros(3, 10)) is torch.Tensor
    with torch.no_grad():  # as FSDP2 asks for it
        new = whole.new_zeros(3, 10)
    assert type(new) is qv.ScaledTensor and torch.equal(new.scale, whole.scale)
    new[:2].copy_(torch.full((2, 10), 1e9))  # the rest is zero, at any scale
    assert new.amax == 1e9 and whole.amax == 3
    assert_same(new.dequantize()[2], torch.zeros(10))
    with pytest.raises(ValueError, match="does not fit"):
        new[2:].fill_(1e30)


@pytest.mark.parametrize("columns", [1, 128, 300])
def test_gradients_travel_in_e4m3_blocks(columns):
    x = randn(3, columns) * torch.logspace(-12, 6, 3)[:, None]
    message = encode_e4m3(x)
    assert message.shape == (3, columns + -(-columns // 128))
    blocks = qv.quantize(x, granularity="block", block=128)
    assert_same(decode_e4m3(message, columns), blocks.dequantize())
    x[1, 0] = torch.inf
    decoded = decode_e4m3(encode_e4m3(x), columns)
    assert decoded[1, :128].isnan().all() and decoded[[0, 2]].isfinite().all()


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="no process group; start with torchrun"):
        qv.distributed.fully_shard(build())


def _plain(rank, recipe, gather):
    """Weights and losses of three steps, in which every rank has the whole batch: the mean of equal
    gradients is any of them, so nothing is rounded that one process does not round."""
    model = build(recipe)
    if gather is not None:
        model = qv.distributed.fully_shard(model, gradient="f32", reshard_after_forward=gather)
    optimizer = qv.AdamW(model.parameters(), lr=LR, recipe=recipe)
    losses = []
    for step in range(3):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = [p.full_tensor() if gather is not None else p for p in model.parameters()]
    return losses, [w.detach().clone() for w in weights]


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "blockwise"])
@pytest.mark.parametrize("gather", [True, False])
def test_plain_weights_are_cast_from_what_is_gathered_in_each_step(name, gather):
    """FSDP2 fills the gathered weight without a trace: a kept cast would be that of step 0."""
    losses, weights = _plain(0, name, None)
    assert losses[2] != losses[1] != losses[0]
    for found in ranks.run(2, _plain, name, gather):
        assert found[0] == losses
        for mine, alone in zip(found[1], weights, strict=True):
            assert_same(mine, alone)


# Resharding


def _leg(rank, size, folder, start, steps):
    """Goes on from the checkpoint in `folder`; what was loaded, and the losses of `steps`."""
    model = build()
    if size > 1:
        model = qv.distributed.fully_shard(model, average=False, gradient="f32")
    optimizer = adamw(model)
    loaded = None
    if start:
        state = qv.distributed.load(folder, model, optimizer)
        assert state == {"step": start, "extra": {"epoch": start}}
        loaded = here(model, optimizer)
    losses = train(model, optimizer, range(start, start + steps), rank, size)
    end = start + steps
    qv.distributed.save(folder, model, optimizer, step=end, extra={"epoch": end})
    return loaded, losses, here(model, optimizer)


def test_resharding_loses_nothing(tmp_path):
    _, whole, _ = ranks.run(4, _leg, 4, tmp_path / "whole", 0, 8)[0]
    # Trained on 4 ranks, moved to 2, to 3, to 1 and back to 4: as if never moved, to the last bit.
    moved = tmp_path / "moved"
    legs = ranks.run(4, _leg, 4, moved, 0, 4)
    assert legs[0][1] == whole[:4]
    saved = join([state for _, _, state in legs])
    for size in (2, 3, 1):
        found = ranks.run(size, _leg, size, moved, 4, 0) if size > 1 else [_leg(0, 1, moved, 4, 0)]
        assert_same_state(join([loaded for loaded, _, _ in found]), saved)
    found = ranks.run(4, _leg, 4, moved, 4, 4)
    assert_same_state(join([loaded for loaded, _, _ in found]), saved)
    assert found[0][1] == whole[4:]
    assert json.loads((moved / "checkpoint.json").read_text())["ranks"] == 4
    assert len([path for path in moved.iterdir() if path.is_dir()]) == 1
