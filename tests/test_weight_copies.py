"""The FP8 copies of a weight follow whatever changes it."""

import copy

import pytest
import torch
from helpers import assert_same, randn
from test_linear import RECIPES, assert_copies_fresh, layer, plain
from torch import nn

import quaver as qv
from quaver import ScaledTensor
from quaver.nn import linear as implementation


def in_place(net):
    with torch.no_grad():
        net.weight.mul_(torch.linspace(-1, 1, net.in_features))


CHANGES = {
    "mul_": lambda net: net.weight.detach().mul_(-3.0),
    "no_grad": in_place,
    "copy_": lambda net: net.weight.detach().copy_(randn(*net.weight.shape, seed=5)),
    "init": lambda net: nn.init.normal_(net.weight),
    "zero_": lambda net: net.weight.detach().zero_(),
    "reset_parameters": lambda net: net.reset_parameters(),
    "load_state_dict": lambda net: net.load_state_dict(layer_like(net).state_dict()),
    "assign": lambda net: net.load_state_dict(layer_like(net).state_dict(), assign=True),
    "to": lambda net: net.to(torch.bfloat16).to(torch.float32),
    "new parameter": lambda net: setattr(net, "weight", nn.Parameter(layer_like(net).weight.data)),
}


def layer_like(net):
    name = "fp8lm-o2" if isinstance(net.weight, ScaledTensor) else "tensorwise"
    return layer(name, net.in_features, net.out_features, seed=7)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["fp8lm-o2", "tensorwise"])
@pytest.mark.parametrize("k", [48, 50])
def test_the_copies_follow_any_change_of_the_weight(change, name, k):
    net = layer(name, k)
    assert_copies_fresh(net)
    before = plain(net.weight.detach()).clone()
    CHANGES[change](net)
    changed = plain(net.weight.detach())
    assert change == "to" or (changed != before).any()
    assert_copies_fresh(net)


@pytest.mark.parametrize("write", ["mul_", "copy_", "lerp_"])
def test_the_copies_follow_a_write_through_data(write):
    """What averaging and older optimizers do; a master's write is seen by the tensor itself."""
    net = layer("fp8lm-o2")
    other = randn(32, 48, seed=5)
    data = net.weight.data
    {"mul_": lambda: data.mul_(3.0), "copy_": lambda: data.copy_(other),
     "lerp_": lambda: data.lerp_(other, 0.5)}[write]()  # fmt: skip
    assert_copies_fresh(net)


def count_encodes(monkeypatch):
    calls = []
    real = implementation.GemmWeight.encode

    def encode(weight, *rest):
        calls.append(weight.shape)
        return real(weight, *rest)

    monkeypatch.setattr(implementation.GemmWeight, "encode", staticmethod(encode))
    return calls


@pytest.mark.parametrize(("name", "k", "encodes"), [("fp8lm-o2", 48, 0), ("fp8lm-o2", 50, 3),
                                                   ("tensorwise", 48, 3)])  # fmt: skip
def test_a_weight_is_encoded_once_a_step_and_not_for_each_micro_batch(
    name, k, encodes, monkeypatch
):
    net = layer(name, k)
    optimizer = qv.AdamW(net.parameters(), recipe=name)
    calls = count_encodes(monkeypatch)
    for step in range(3):
        for i in range(4):
            net(randn(16, k, seed=4 * step + i)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    net(randn(16, k))
    assert len(calls) == encodes  # none where the optimizer's pass writes the copies itself


@pytest.mark.parametrize("name", RECIPES)
def test_deepcopies_go_their_own_way(name):
    net = layer(name)
    twin = copy.deepcopy(net)
    x = randn(16, 48)
    assert_same(twin(x.clone()).detach(), net(x.clone()).detach())
    with torch.no_grad():
        twin.weight.mul_(2.0)
    assert_copies_fresh(twin)
    assert_copies_fresh(net)
    optimizer = qv.AdamW(twin.parameters(), lr=0.1, recipe=name)
    before = plain(net.weight.detach()).clone()
    twin(x).sum().backward()
    optimizer.step()
    assert_copies_fresh(twin)
    assert_copies_fresh(net)
    assert_same(plain(net.weight.detach()), before)
    assert net.weight.grad is None


# --- weight gradients -----------------------------------------------------------------------------
