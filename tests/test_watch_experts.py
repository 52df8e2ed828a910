"""qv.watch on stacks of experts."""

import copy

import pytest
import torch
from helpers import randn
from test_experts import TOKENS, causal

import quaver as qv
from quaver.cast_statistics import MEASURED, measured, measured_groups
from quaver.nn.experts import Experts
from quaver.watching import is_watched

E4M3 = torch.float8_e4m3fn
NAME = "model.layers.0.mlp.experts"


def build(recipe="tensorwise", family="Qwen3Moe", **options):
    model = qv.convert(causal(family), recipe)
    optimizer = qv.AdamW(model.parameters(), 1e-3, recipe=recipe)
    return model, optimizer, qv.watch(model, **({"every": 2, "fallback": "auto"} | options))


def advance(run):
    model, optimizer, watch = run
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if is_watched(model):
        watch.step()
    return loss.item()


def test_groups_are_measured_with_their_own_scales():
    x = randn(40, 32) * torch.cat((torch.full((10, 1), 1e-6), torch.ones(30, 1)))
    whole, own = measured(x, E4M3), measured_groups(x, [0, 10, 10, 40], E4M3)
    lost = MEASURED.index("flushed")
    assert whole[lost] >= 0.25 and own[lost] < 0.01
    assert own[0] == whole[0]
    assert measured_groups(x[:0], [0, 0, 0], E4M3).tolist() == [0.0] * len(MEASURED)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "coat"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_both_products_are_measured_and_no_bit_changes(recipe, family):
    run, other = build(recipe, family, fallback="off"), build(recipe, family, fallback="off")
    other[2].close()
    assert advance(run) == advance(other)
    assert advance(run) == advance(other)
    found = run[2].last[NAME]
    assert set(found) == {
        f"{name}.{what}"
        for name in ("gate_up_proj", "down_proj")
        for what in ("input", "weight", "grad_output")
    }
    weight = copy.deepcopy(other[0].get_submodule(NAME)).down_proj
    assert found["down_proj.weight"]["amax"] == pytest.approx(weight.abs().max().item(), rel=0.1)
    assert all(of["amax"] > 0 and of["flushed"] < 0.25 for of in found.values())
    run[2].close()
    assert all(m.observer is None for m in run[0].modules() if isinstance(m, Experts))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "coat"])
def test_a_stack_with_an_outlier_falls_back_and_comes_back(recipe):
    run = build(recipe, kurtosis=200.0, flushed=1.0)
    for _ in range(3):
        advance(run)
    assert run[2].plain == []
    experts = run[0].get_submodule(NAME)
    kept = experts.down_proj.detach().clone()
    with torch.no_grad():
        experts.down_proj[2, 3, 5] = 1e3
    advance(run)
    advance(run)
    assert NAME in run[2].plain
    state = copy.deepcopy(run[0].state_dict())
    with torch.no_grad():
        experts.down_proj.copy_(kept)
    for _ in range(20):
        advance(run)
    assert NAME not in run[2].plain
    run[0].load_state_dict(state)
    assert NAME in run[2].plain


def test_a_plain_stack_multiplies_as_before_the_conversion():
    plain = causal("Qwen3Moe")
    model = qv.convert(copy.deepcopy(plain), "tensorwise")
    model.get_submodule(NAME).plain = True
    x = randn(12, 64).requires_grad_()
    experts, weights = torch.randint(8, (12, 2)), torch.rand(12, 2)
    found = []
    for net in (plain, model):
        stack = net.get_submodule(NAME)
        y = stack(x, experts, weights)
        found.append([y.detach(), *torch.autograd.grad(
            y.square().sum(), [x, stack.gate_up_proj, stack.down_proj]
        )])  # fmt: skip
    for mine, wanted in zip(*found, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-6)
