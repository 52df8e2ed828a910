"""Layers that read one input share its cast, within one forward of the module that holds them."""

import copy
import inspect
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import FP8, assert_same, randn
from linears import saved
from torch import nn
from torch.utils.checkpoint import checkpoint

import quaver as qv
from quaver.nn import cast, product

E4M3, _ = FP8
RECIPES = ["tensorwise", "fp8lm-o2"]


class Attention(nn.Module):
    """q, k and v read one input, out another of the same width."""

    def __init__(self, width=48):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x, scale=1.0):
        return self.out(self.q(x) * self.k(x) * scale + self.v(x))


class Listed(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 32) for _ in range(3)])

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def build(name="tensorwise", kind=Attention):
    torch.manual_seed(0)
    return qv.convert(kind(), name)


def count(monkeypatch):
    """Shapes of the inputs that are cast."""
    calls, real = [], product.linear

    def counting(x, codes, *args):
        if codes is None:
            calls.append(tuple(x.shape))
        return real(x, codes, *args)

    monkeypatch.setattr(product, "linear", counting)
    return calls


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("kind", "casts"), [(Attention, 2), (Listed, 1)])
def test_one_cast_and_one_saved_copy(name, kind, casts, monkeypatch):
    net = build(name, kind)
    alone = copy.deepcopy(net)
    for module in alone.modules():
        if isinstance(module, cast.Holder):
            module.__class__ = kind
    calls = count(monkeypatch)
    x = randn(64, 48).requires_grad_()
    found, y = saved(lambda: net(x), net)
    assert calls == [(64, 48)] * casts
    assert found[E4M3] == casts * 64 * 48
    calls.clear()
    assert_same(y.detach(), alone(x).detach())
    assert len(calls) > casts
    assert type(net).__name__ == kind.__name__ and isinstance(net, kind)
    assert inspect.signature(net.forward) == inspect.signature(kind().forward)


def new_batch(x, buffer):
    buffer[:] = randn(*x.shape, seed=1).numpy()


CHANGES = {
    "numpy buffer": new_batch,
    "data.copy_": lambda x, _: x.data.copy_(randn(*x.shape, seed=1)),
    "in place": lambda x, _: x.copy_(randn(*x.shape, seed=1)),
    "data =": lambda x, _: setattr(x, "data", randn(*x.shape, seed=1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_the_next_forward_reads_the_new_batch(change, training):
    net = build().train(training)
    buffer = randn(64, 48).numpy()
    x = torch.from_numpy(buffer)
    before = net(x).detach()
    CHANGES[change](x, buffer)
    after = net(x).detach()
    assert (after != before).any()
    assert_same(after, net(x.clone()).detach())


def test_layers_called_outside_of_their_holder_cast_each():
    net = build()
    buffer = randn(64, 48).numpy()
    x = torch.from_numpy(buffer)
    net.q(x)
    buffer[:] = 2 * buffer
    assert_same(net.q(x).detach(), net.q(x.clone()).detach())


def test_a_change_in_place_within_the_forward_is_seen():
    class Changing(Attention):
        def forward(self, x):
            first = self.q(x)
            return first, self.k(x.mul_(3))

    net = build(kind=Changing)
    x = randn(64, 48)
    _, second = net(x.clone())
    assert_same(second.detach(), net.k(x * 3).detach())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_nothing(error):
    net = build()

    def fail(*_):
        raise error

    handle = net.k.register_forward_hook(fail)
    with pytest.raises(error):
        net(randn(64, 48))
    assert cast._thread.scopes == []
    handle.remove()
    net(randn(64, 48))
    assert cast._thread.scopes == []


def test_two_threads_get_their_own_casts():
    """One tensor is cast by two modules of other formats at the same time."""
    nets = [build(), build("fp8lm-o2")]
    x = randn(64, 48)
    wanted = [net.eval()(x).detach() for net in nets]
    barrier = threading.Barrier(2)

    def run(i):
        barrier.wait()
        return [nets[i](x).detach() for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        for results, expected in zip(pool.map(run, range(2)), wanted, strict=True):
            for got in results:
                assert_same(got, expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_too_and_restore_takes_it_back(copier, monkeypatch):
    net = copier(build())
    calls = count(monkeypatch)
    net(randn(64, 48))
    assert len(calls) == 2
    qv.restore(net)
    assert type(net) is Attention and type(net.q) is nn.Linear


def test_a_holder_that_was_wrapped_is_not_restored_by_half():
    """FSDP2 puts a subclass of the module's class in its place."""

    class Wrapper:
        pass

    net = build()
    net.__class__ = type("Wrapped", (Wrapper, type(net)), {})
    with pytest.raises(ValueError, match="the model was made a Wrapped after convert"):
        qv.restore(net)
    assert type(net.q) is qv.nn.Linear


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    grads = []
    for recompute in (False, True):
        net, x = build(), randn(64, 48).requires_grad_()
        y = checkpoint(net, x, use_reentrant=use_reentrant) if recompute else net(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    for got, wanted in zip(*grads, strict=True):
        assert_same(got, wanted)


def test_inference_tensors_are_cast_each_time():
    net = build().eval()
    with torch.inference_mode():
        x = randn(64, 48)
        wanted = net(x * 3)
        net(x)
        assert_same(net(x.mul_(3)), wanted)
