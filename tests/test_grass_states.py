"""Grass: resumption, copies, misuse, bytes of states, and ranks."""

import copy
import gc

import pytest
import ranks
import torch
from helpers import assert_same
from row_training import HYPER, Net, build, everything, loss_of, same, train
from torch import nn

import quaver as qv
from quaver import models
from quaver.distributed import ddp
from quaver.rows import Rows

# States


@pytest.mark.parametrize("recipe", [None, "coat"])
@pytest.mark.parametrize("select", ["top", "sample"])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_has_the_same_bits(recipe, select, stop, tmp_path):
    straight, first, second = (build(seed=s, recipe=recipe, select=select) for s in (0, 0, 1))
    losses = train(*straight, range(8))
    assert train(*first, range(stop)) == losses[:stop]
    qv.save(tmp_path / "run", *first)
    qv.load(tmp_path / "run", *second)
    assert train(*second, range(stop, 8)) == losses[stop:]
    same(straight, second)
    third = build(seed=2, recipe=recipe, select=select)
    third[0].load_state_dict(first[0].state_dict())
    third[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    train(*third, range(stop, 8))
    same(straight, third)


def test_another_optimizer_of_the_same_model():
    model, optimizer = build()
    train(model, optimizer, range(1))
    adam = qv.AdamW(model.parameters(), **HYPER, recipe="bf16")
    with pytest.raises(RuntimeError, match=r"the rows that a Grass chose; call that"):
        train(model, adam, range(1))
    model.zero_grad()
    loss = loss_of(model, 1)
    second = qv.Grass(model, **HYPER, rank=8)
    loss.backward()  # of a forward before
    with pytest.raises(RuntimeError, match="this optimizer did not choose"):
        second.step()
    model.zero_grad()
    train(model, second, range(2))
    second.remove()
    train(model, adam, range(2))


def test_going_back_to_an_older_checkpoint(tmp_path):
    run = build(select="sample")
    train(*run, range(2))
    qv.save(tmp_path / "run", *run)
    losses = train(*run, range(2, 8))
    wanted = everything(*run)
    for more in range(1, 4):  # another place in the three steps between choices each time
        train(*run, range(more))
        qv.load(tmp_path / "run", *run)
        assert train(*run, range(2, 8)) == losses
        for a, b in zip(everything(*run), wanted, strict=True):
            assert_same(a, b)


def test_copies_form_rows_and_end_with_their_optimizer():
    run = build()
    train(*run, range(1))
    copied = copy.deepcopy(run)
    for model, _ in (run, copied):
        loss_of(model, 1).backward()
        assert isinstance(model.second.weight.grad, Rows)
    model, run = run[0], None
    model.zero_grad()
    gc.collect()
    loss_of(model, 1).backward()
    assert not isinstance(model.second.weight.grad, Rows)


def test_a_gradient_scaler_unscales_rows():
    plain, scaled = build(), build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(*plain, range(4))
    for step in range(4):
        scaler.scale(loss_of(scaled[0], step)).backward()
        scaler.unscale_(scaled[1])
        scaler.step(scaled[1])
        scaler.update()
        scaled[1].zero_grad()
    for p, q in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_misuse_is_named():
    model = Net()
    for options, text in (
        ({"rank": 0}, "rank must be an int"), ({"every": 0}, "every must be an int"),
        ({"select": "best"}, "select must be one of top"), ({"scale": 0.0}, "scale must be > 0"),
        ({"recipe": "snsm"}, "has a moment in 4 bits, or one that is not a value for each"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            qv.Grass(model, **options)
    with pytest.raises(ValueError, match="f16 master"):
        qv.Grass(qv.convert(Net(), "fp8lm-o2"), recipe="fp8lm-o2")
    trained, other = build(rank=8), build(rank=4)
    train(*trained, range(1))
    before = everything(*other)
    with pytest.raises(ValueError, match="keeps it as"):
        other[1].load_state_dict(trained[1].state_dict())
    for a, b in zip(before, everything(*other), strict=True):
        assert_same(a, b)


def state_bytes(optimizer, params):
    """Bytes of the states that the slots of `params` make, without making those of a model."""
    total = 0
    for p in params:
        total += 8 + sum(
            tensor.nbytes
            for slot in optimizer.slots(p).values()
            for tensor in qv.tensor.plain_tensors(slot.zeros(p))
        )
    return total


@pytest.mark.parametrize("name, bar", [("7b", 1.1), ("125m", 1.1)])
def test_state_bytes_of_a_plan(name, bar):
    config = models.load(name)
    with torch.device("meta"):
        model = models.build(config)
    optimizer = qv.Grass(model, rank=config.dim // 8)
    kept = ("embed.weight", "lm_head.weight")
    linear = [p for n, p in model.named_parameters() if p.dim() == 2 and n not in kept]
    assert len(linear) > 4 * config.layers - 1
    assert all(optimizer.is_projected(p) for p in linear)
    assert state_bytes(optimizer, linear) / sum(p.numel() for p in linear) <= bar
    if name == "7b":  # with the embedding and the head, which keep Adam's moments
        everything = list(model.parameters())
        assert state_bytes(optimizer, everything) / sum(p.numel() for p in everything) <= bar


def test_the_plan_is_what_a_run_has():
    model = models.build(models.load("tiny"))
    optimizer = qv.Grass(model, rank=384 // 8, **HYPER)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()
    report = qv.memory_report(model, optimizer)
    steps = 8 * len(optimizer.state)
    assert report["other"] >= steps
    assert report["exp_avg"] + report["exp_avg_sq"] + steps == state_bytes(
        optimizer, model.parameters()
    )


# Ranks


def on_ranks(rank, size, recipe, release):
    model, optimizer = build(seed=rank, recipe=recipe)
    parallel = ddp(model, bucket_bytes=4096)
    if release:
        qv.release_gradients(model, optimizer)
    sent, kinds = [], []
    for step in range(5):
        before = sum(parallel.transport.traffic.values())
        loss_of(model, step, slice(rank * 6, rank * 6 + 6)).backward()
        kinds.append(isinstance(model.second.weight.grad, Rows))
        optimizer.step()
        optimizer.zero_grad()
        sent.append(sum(parallel.transport.traffic.values()) - before)
    rows = optimizer.state[model.first.weight]["rows"]
    return {"all": everything(model, optimizer), "rows": rows, "sent": sent, "kinds": kinds}


@pytest.mark.parametrize("recipe, release", [(None, False), (None, True), ("tensorwise", False)])
def test_ranks_choose_the_same_rows_and_send_them_alone(recipe, release):
    one, two = ranks.run(2, on_ranks, 2, recipe, release)
    for a, b in zip(one["all"], two["all"], strict=True):
        assert_same(a, b)
    if not release:
        assert one["kinds"] == [False, True, True, False, True]
    # Of 48 + 32 rows 16 travel; embedding, head, norms and biases travel whole in every step.
    saved = 4 * 32 * (48 - 8) + 4 * 48 * (32 - 8)
    for step in (1, 2, 4):
        assert one["sent"][0] - one["sent"][step] > 0.9 * saved
    if recipe is None:
        single = build()
        train(*single, range(5))
        assert_same(one["rows"], single[1].state[single[0].first.weight]["rows"])
        for a, b in zip(one["all"], single[0].parameters(), strict=False):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_torchs_data_parallelism_is_refused():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = Net()
    with pytest.raises(ValueError, match=r"use quaver.distributed.ddp"):
        qv.Grass(wrapped)
