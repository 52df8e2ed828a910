"""Converted layers under another default dtype, and on the meta device."""

import contextlib
import dataclasses

import pytest
import torch
from blocks import Gated, llama_block, run
from helpers import assert_same
from linears import RECIPES, layer
from torch import nn

import quaver as qv
from quaver import recipe


def randn(*shape, seed=0):
    """In f32 whatever the default is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@contextlib.contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    parts = nn.LayerNorm(32), Gated(32, 48), nn.RMSNorm(32), nn.Linear(32, 16)
    return nn.Sequential(*parts).to(dtype)


def losses(name, model):
    qv.convert(model, name)
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=name)
    found = []
    for step in range(6):
        x = randn(16, 32, seed=step % 2).to(model[0].weight.dtype)
        loss = (model(x).float() - 1).square().mean()
        loss.backward()
        qv.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval()
    qv.memory_report(model, optimizer)
    qv.restore(model)
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_default_dtype_changes_no_bit_of_a_f32_model(name, dtype):
    wanted = losses(name, net())
    model = net()
    with default(dtype):
        got = losses(name, model)
    assert got == wanted
    assert got[-1] < got[0]


def subspace_recipe(projector):
    momentum = qv.optim.Subspace(rank=8, every=2, projector=projector)
    return dataclasses.replace(recipe.get("snsm"), exp_avg=momentum)


OPTIMIZERS = {
    **{
        name: lambda model, name=name: qv.AdamW(model.parameters(), 1e-2, recipe=name)
        for name in recipe.step_names()
    },
    **{
        f"snsm-{projector}": lambda model, projector=projector: qv.AdamW(
            model.parameters(), 1e-2, recipe=subspace_recipe(projector)
        )
        for projector in ("topk", "random", "srht")
    },
    "microadam": lambda model: qv.MicroAdam(model.parameters(), 1e-2, density=0.1),
    **{
        f"grass-{select}": lambda model, select=select: qv.Grass(
            model, 1e-2, rank=8, every=2, select=select
        )
        for select in ("top", "sample")
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_changes_no_bit_of_an_optimizer(name, dtype):
    def trained(model):
        optimizer = OPTIMIZERS[name](model)
        for step in range(4):
            (model(randn(16, 32, seed=step)) - 1).square().mean().backward()
            qv.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    wanted, model = trained(net()), net()
    with default(dtype):
        got = trained(model)
    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_the_default_dtype_trains(name, dtype):
    with default(dtype):
        model = net(dtype)
        assert model[3].weight.dtype == dtype
        found = losses(name, model)
    assert found[-1] < found[0]


def test_a_float64_model_is_refused_by_name():
    refused = pytest.raises(TypeError, match=r"1\.gate_proj has a weight of torch.float64")
    with default(torch.float64), refused:
        qv.convert(net(torch.float64), "coat")


# meta


@pytest.mark.parametrize("name", [*RECIPES, "smooth"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_meta_model_gives_meta_results(name, autocast):
    block = llama_block(name).to("meta")
    x = torch.empty(2, 24, 64, device="meta", requires_grad=True)
    with torch.device("meta"):
        y = run(block, x, autocast)
    y.sum().backward()
    assert y.device.type == "meta" and y.shape == x.shape
    for p in (x, *block.parameters()):
        assert p.grad.device.type == "meta" and p.grad.shape == p.shape


@pytest.mark.parametrize("name", RECIPES)
def test_a_meta_operand_among_others_is_refused(name):
    x, meta = randn(4, 48), torch.empty(4, 48, device="meta")
    with pytest.raises(RuntimeError, match="Linear: the input is on meta and weight on cpu"):
        layer(name)(meta)
    with pytest.raises(RuntimeError, match="Linear: the input is on cpu and weight on meta"):
        layer(name).to("meta")(x)
    for what in ("bias", "input_history", "grad_history"):
        some = layer(name)
        value = getattr(some, what)
        if value is None:
            continue
        moved = value.detach().to("meta")
        setattr(some, what, nn.Parameter(moved) if what == "bias" else moved)
        with pytest.raises(RuntimeError, match=f"the input is on cpu and {what} on meta"):
            some(x)


def test_a_norm_whose_parts_are_apart_is_refused():
    model = qv.convert(net(), "coat")
    model[0].weight = nn.Parameter(torch.empty(32, device="meta"))
    with pytest.raises(RuntimeError, match="LayerNorm: the input is on cpu and weight on meta"):
        model(randn(4, 32))
    with pytest.raises(RuntimeError, match="RMSNorm: the input is on meta and weight on cpu"):
        model[2](torch.empty(4, 32, device="meta"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_on_meta_is_filled_and_then_computes(name):
    full, model = qv.convert(net(), name), qv.convert(net().to("meta"), name)
    model.to_empty(device="cpu")
    model.load_state_dict(full.state_dict())
    x = randn(16, 32)
    assert_same(model.eval()(x).detach(), full.eval()(x).detach())
