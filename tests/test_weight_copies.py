"""A forward and its backward read the weight as it is, whatever wrote it."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same, randn
from linears import RECIPES, assert_copies_fresh, layer, plain
from torch import nn

import quaver as qv
from quaver import ScaledTensor, recipe
from quaver.nn import linear as implementation
from quaver.nn import product
from quaver.nn import weight as weights


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


def count_casts(monkeypatch):
    calls = []
    real = weights.cast_weight

    def counting(weight, *args, **kwargs):
        calls.append(weight.shape)
        return real(weight, *args, **kwargs)

    for module in (weights, implementation, product):
        monkeypatch.setattr(module, "cast_weight", counting)
    return calls


@pytest.mark.parametrize(("k", "casts"), [(48, 0), (50, 3)])
def test_a_master_is_cast_once_a_step_and_not_for_each_micro_batch(k, casts, monkeypatch):
    net = layer("fp8lm-o2", k)
    optimizer = qv.AdamW(net.parameters(), recipe="fp8lm-o2")
    calls = count_casts(monkeypatch)
    for step in range(3):
        for i in range(4):
            net(randn(16, k, seed=4 * step + i)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    net(randn(16, k))
    assert len(calls) == casts  # none where the optimizer's pass writes the copies itself


# Plain weights: whatever writes one, the next forward and its backward read what is there.


def fused_step(net):
    net.weight.grad = torch.ones_like(net.weight)
    torch.optim.AdamW([net.weight], lr=0.1, fused=True).step()
    net.weight.grad = None


def write_numpy(net):
    values = net.weight.detach().view(torch.int16)  # NumPy has no bf16
    values.numpy()[:] = values.flip(0).numpy()


def merge(net):
    """As PEFT's merge_and_unload, with and without safe_merge."""
    net.weight.data += randn(32, 2, seed=1).to(net.weight) @ randn(2, 48, seed=2).to(net.weight)
    net.weight.data = net.weight.data.clone() * 2


WRITES = {
    "fused AdamW": fused_step,
    "data.add_": lambda net: net.weight.data.add_(0.1),
    "data =": lambda net: setattr(net.weight, "data", randn(32, 48, seed=3).to(net.weight)),
    "numpy": write_numpy,
    "merge": merge,
    "storage": lambda net: net.weight.untyped_storage().copy_(
        randn(32, 48, seed=4).to(net.weight).untyped_storage()
    ),
    "foreach": lambda net: torch._foreach_mul_([net.weight.data], 3.0),
    "swap_tensors": lambda net: torch.utils.swap_tensors(
        net.weight, nn.Parameter(randn(32, 48, seed=5).to(net.weight))
    ),
}
PLAIN = [name for name in RECIPES if not isinstance(layer(name).weight, ScaledTensor)]


def results(net):
    x = randn(16, 48).requires_grad_()
    y = net(x)
    y.square().sum().backward()
    return [y.detach(), x.grad]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_weight_is_read_anew_by_every_forward(name, write):
    net = layer(name)
    before = results(net)
    WRITES[write](net)
    after = results(net)
    assert (after[0] != before[0]).any()
    fresh = layer(name)
    fresh.weight.data = net.weight.data.clone()
    for got, wanted in zip(after, results(fresh), strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_made_of_a_plain_weight_outlives_a_pass(name, monkeypatch):
    net, calls = layer(name), []

    def recording(real, place):
        def call(*args, **options):
            calls.append(args[place])
            return real(*args, **options)

        return call

    # The ops cast it each time; with scales of rows and blocks, `cast_weight` does before them.
    casts = {"linear": 3, "linear_backward": 4}
    if net.rule.grain != "tensor":
        casts = {"cast_weight": 0}
    for name, place in casts.items():
        monkeypatch.setattr(product, name, recording(getattr(product, name), place))
    results(net), results(net)
    assert len(calls) == 4 and all(w is net.weight for w in calls)
    assert net.fp8_weight is None and "fp8_weight" not in net.weight.__dict__


# cached_weights


@pytest.mark.parametrize("name", PLAIN)
def test_cached_weights_are_cast_once_in_the_block_and_give_the_same_bits(name, monkeypatch):
    net = nn.Sequential(layer(name), nn.ReLU(), layer(name, 32, 16))
    wanted = results(net)
    calls = count_casts(monkeypatch)
    with qv.cached_weights(net) as model:
        assert model is net
        for _ in range(3):
            for a, b in zip(results(net), wanted, strict=True):
                assert_same(a, b)
        assert len(calls) == 2
        with torch.no_grad():
            net[0].weight.mul_(2)  # a write that moves the version is seen
        assert (results(net)[0] != wanted[0]).any()
    net[0].weight.data.div_(2)
    assert_same(results(net)[0], wanted[0])


def test_cached_weights_end_with_the_block_and_belong_to_a_thread():
    net, x = layer("tensorwise"), randn(16, 48)
    before = net(x).detach()
    with pytest.raises(KeyboardInterrupt), qv.cached_weights(net):
        net(x)
        raise KeyboardInterrupt
    with qv.cached_weights(net):
        assert_same(net(x).detach(), before)
        net.weight.data.mul_(3)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: net(x).detach()).result()
        assert_same(net(x).detach(), before)  # documented: no such write inside
    assert_same(other, net(x).detach())
    assert (other != before).any()


def test_a_master_without_kept_copies_gives_the_same_bits(monkeypatch):
    linear = dataclasses.replace(recipe.get("fp8lm-o2").linear, cache="none")
    lean = dataclasses.replace(recipe.get("fp8lm-o2"), linear=linear)
    nets = [layer("fp8lm-o2"), layer(lean)]
    optimizers = [qv.AdamW(n.parameters(), lr=0.1, recipe=lean) for n in nets]
    for _ in range(3):
        found = [results(net) for net in nets]
        for got, wanted in zip(*found, strict=True):
            assert_same(got, wanted)
        for optimizer in optimizers:
            optimizer.step()
    assert qv.memory_report(nets[1])["weight_fp8"] == 0
    assert qv.memory_report(nets[0])["weight_fp8"] == 2 * 32 * 48


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
