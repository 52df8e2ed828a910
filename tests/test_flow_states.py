"""Blocks that pass on FP8: recomputation, evaluation, copies, files and resumption."""

import copy
import io

import pytest
import torch
from blocks import RECIPES, gradients, llama_block, run
from helpers import assert_same, randn
from torch.utils.checkpoint import checkpoint

import quaver as qv
from quaver import ScaledTensor
from quaver.nn import Norm


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_activation_checkpointing_gives_the_same_bits(name, use_reentrant):
    nets = [llama_block(name), llama_block(name)]
    optimizers = [qv.AdamW(net.parameters(), lr=1e-2, recipe=RECIPES[name]) for net in nets]
    for step in range(18 if name == "delayed" else 4):
        losses = []
        for i, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            x = randn(2, 8, 64, seed=step).requires_grad_()
            y = checkpoint(run, net, x, use_reentrant=use_reentrant) if i else run(net, x)
            loss = (y.float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert_same(a.qdata if isinstance(a, ScaledTensor) else a,
                    b.qdata if isinstance(b, ScaledTensor) else b)  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_leaves_no_trace(name):
    block, x = llama_block(name), randn(2, 24, 64)
    run(block, x.clone().requires_grad_()).sum().backward()
    block.eval()
    before = copy.deepcopy(block.state_dict())
    wanted = run(block, x.clone()).detach()
    with torch.no_grad():
        assert_same(run(block, x.clone()), wanted)
    with torch.inference_mode():
        assert_same(run(block, x.clone()).clone(), wanted)
    assert run(block, x[:, :1]).isfinite().all()  # one token: padded
    for key, value in block.state_dict().items():
        if key.endswith(("_history", "channel_amax")):
            assert_same(value, before[key])


@pytest.mark.parametrize("name", RECIPES)
def test_copies_and_files(name):
    block, x = llama_block(name), randn(2, 24, 64)
    optimizer = qv.AdamW(block.parameters(), recipe=RECIPES[name])
    run(block, x.clone().requires_grad_()).sum().backward()
    optimizer.step()
    block.eval()
    wanted = run(block, x.clone()).detach()
    twin = copy.deepcopy(block)
    assert isinstance(twin.norm1, Norm) and twin.mlp.plan == block.mlp.plan
    assert_same(run(twin, x.clone()).detach(), wanted)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert_same(run(torch.load(file, weights_only=False), x.clone()).detach(), wanted)
    other = llama_block(name, seed=3).eval()
    other.load_state_dict(block.state_dict())
    assert_same(run(other, x.clone()).detach(), wanted)
    with torch.no_grad():
        twin.norm1.weight.mul_(2.0)
    assert_same(run(block, x.clone()).detach(), wanted)


@pytest.mark.parametrize("name", ["coat", "smooth"])
def test_state_dict_and_restore(name):
    plain = llama_block("f32")
    block = llama_block(name)
    gained = {key for key in block.state_dict() if key.endswith("channel_amax")}
    assert gained == ({"mlp.down.channel_amax"} if name == "smooth" else set())
    assert set(block.state_dict()) - gained == set(plain.state_dict())
    run(block, randn(2, 24, 64).requires_grad_()).sum().backward()
    values = {key: p.detach() + 0 for key, p in block.named_parameters()}
    qv.restore(block)
    assert list(block.state_dict()) == list(plain.state_dict())
    for key, value in block.state_dict().items():
        assert_same(value, values[key].float())
    for a, b in zip(block.modules(), plain.modules(), strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys()
    plain.load_state_dict(block.state_dict())
    x = randn(2, 24, 64)
    assert_same(run(block, x).detach(), run(plain, x).detach())


def test_save_at_step_n_and_go_on(tmp_path):
    for name in ("coat", "delayed", "smooth", "blocks"):

        def train(block, optimizer, steps):
            found = []
            for step in steps:
                loss = (run(block, randn(2, 8, 64, seed=step)).float() - 1).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            return found

        block = llama_block(name)
        optimizer = qv.AdamW(block.parameters(), lr=1e-2, recipe=RECIPES[name])
        train(block, optimizer, range(5))
        qv.save(tmp_path / name, block, optimizer, step=5)
        wanted = train(block, optimizer, range(5, 8))
        block = llama_block(name, seed=9)
        optimizer = qv.AdamW(block.parameters(), lr=1e-2, recipe=RECIPES[name])
        qv.load(tmp_path / name, block, optimizer)
        assert train(block, optimizer, range(5, 8)) == wanted, name


def test_micro_batches_accumulate():
    block = llama_block("coat")
    total = None
    for i in range(3):
        alone = llama_block("coat")
        for net in (block, alone):
            run(net, randn(2, 8, 64, seed=i)).sum().backward()
        found = gradients(alone)
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    for got, wanted in zip(gradients(block), total, strict=True):
        # Two sums and three gradients, each rounded to e4m3 under the largest value.
        assert ((got - wanted).abs() <= 5 * 2**-4 * wanted.abs().max()).all()
