"""Linear in use: modes, derivatives, micro-batches, recomputation, state dicts and mistakes."""

import io

import pytest
import torch
from helpers import FP8, assert_same, bits, randn
from linears import RECIPES, assert_copies_fresh, layer, plain, variant, weight_codes
from torch import nn
from torch.utils.checkpoint import checkpoint

import quaver as qv
from quaver import ScaledTensor, recipe, reference
from quaver.nn import Linear

E4M3, E5M2 = FP8


@pytest.mark.parametrize("outer", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_output_type(outer):
    net, x = layer(), randn(16, 48).requires_grad_()
    with torch.autocast("cpu", outer):
        y = net(x)
    assert y.dtype == outer
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", outer), torch.autocast("cpu", enabled=False):
        assert net(x).dtype == torch.float32


def test_inference_mode_and_training_after_it():
    net = layer()
    x = randn(16, 48)
    wanted = net.eval()(x).detach()
    with torch.inference_mode():
        assert_same(net(x), wanted)
        y = net(net(x).repeat(1, 2)[:, :48])
        assert y.isfinite().all()
    fresh = layer()
    fresh.weight.__dict__.pop("fp8_weight")
    with torch.inference_mode():
        fresh(x)
    optimizer = qv.AdamW(fresh.parameters())
    fresh.train()(x).sum().backward()
    optimizer.step()
    assert_same(bits(fresh.refresh().q), bits(weight_codes(fresh)[0]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_weight_changed_before_its_backward_is_refused(name):
    net = layer(name)
    optimizer = qv.AdamW(net.parameters(), recipe=name)
    x = randn(16, 48).requires_grad_()
    first, second = net(x), net(x)
    first.sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"changed in place between|modified by an inplace oper"):
        second.sum().backward()


# First order only: a gradient is right, or refused where it is asked for, and never 0.


def penalty(net, x):
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    grad.square().sum().backward()


def direction(net, x):
    torch.func.jvp(lambda v: net(v).sum(), (x,), (torch.ones_like(x),))


DERIVATIVES = {
    "gradient penalty": penalty,
    "of a square": lambda net, x: penalty(lambda v: net(v).square(), x),
    "create_graph": lambda net, x: net(x).sum().backward(create_graph=True),
    "hvp": lambda net, x: torch.autograd.functional.hvp(lambda v: net(v).sum(), x, x.detach()),
    "hessian": lambda net, x: torch.autograd.functional.hessian(lambda v: net(v).sum(), x),
    "jvp": direction,
    "func.grad": lambda net, x: torch.func.grad(lambda v: net(v).sum())(x),
    "func.vjp": lambda net, x: torch.func.vjp(net, x),
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x, vectorize=True),
}


@pytest.mark.parametrize("how", DERIVATIVES)
@pytest.mark.parametrize("name", RECIPES)
def test_any_but_a_first_derivative_by_backward_is_refused_by_name(how, name):
    x = randn(4, 48).requires_grad_()
    with pytest.raises(RuntimeError, match=r"quaver\.restore"):
        DERIVATIVES[how](layer(name), x)


@pytest.mark.parametrize(
    ("kind", "sums"), [("e4m3", "bf16"), ("e4m3", "f32"), ("bf16", "bf16"), ("f32", "f32")]
)
def test_micro_batches_accumulate_as_the_recipe_says(kind, sums):
    net = layer(variant(weight_grad=kind, grad_accumulate=sums))
    exact, scale = torch.zeros(32, 48, dtype=torch.float64), 0.0
    for i in range(6):
        x, dy = randn(16, 48, seed=i), randn(16, 32, seed=50 + i)
        net(x).backward(dy)
        xq, xs, _ = reference.quantize(x, E4M3)
        gq, gs, _ = reference.quantize(dy, E5M2)
        exact += reference.gemm(gq.t(), gs, xq.t(), xs)
        scale = max(scale, exact.abs().max().item())
    grad = net.weight.grad
    low = isinstance(grad, ScaledTensor)
    stored = grad.qdata.dtype if low else grad.dtype
    assert stored == {"bf16": torch.bfloat16, "f32": torch.float32}[sums]
    half_ulp = {"e4m3": 2**-4, "bf16": 2**-8, "f32": 2**-20}
    # 6 gradients and 5 sums are rounded, none beyond the largest sum.
    off = 6 * half_ulp[kind] + 5 * half_ulp[sums]
    assert ((plain(grad).double() - exact).abs() <= off * scale).all()
    assert qv.ops.grad_norm([grad])[1].item() == pytest.approx(scale, rel=2 * off)


def test_a_weight_used_twice_sums_its_gradients():
    for kind in ("e4m3", "bf16", "f32"):
        net = layer(variant(weight_grad=kind), 32, 32, bias=False)
        x = randn(16, 32)
        (net(x) + net(x * 2)).sum().backward()
        once = layer(variant(weight_grad=kind), 32, 32, bias=False)
        once(x * 3).sum().backward()
        got, wanted = plain(net.weight.grad), plain(once.weight.grad)
        assert ((got - wanted).abs() <= 4 * 2**-4 * wanted.abs().max()).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_gradient_checkpointing_gives_the_same_gradients_and_history(use_reentrant, name):
    def build():
        torch.manual_seed(0)
        return qv.convert(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), recipe=name
        )

    nets, losses = [build(), build()], [[], []]
    optimizers = [qv.AdamW(n.parameters(), lr=1e-2, recipe=name) for n in nets]
    for step in range(20):
        for i, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            x = randn(16, 32, seed=step).requires_grad_()
            y = checkpoint(net, x, use_reentrant=use_reentrant) if i else net(x)
            loss = (y - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[i].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert_same(plain(a), plain(b))


@pytest.mark.parametrize("name", RECIPES)
def test_state_dicts_through_files(name):
    net = layer(name)
    for i in range(3):
        net(randn(16, 48, seed=i)).sum().backward()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = layer(name, seed=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = randn(16, 48)
    assert_same(other(x.clone()).detach(), net(x.clone()).detach())
    if net.input_history is not None:
        assert_same(other.input_history, net.input_history)
    plain_state = nn.Linear(48, 32).state_dict()
    other.load_state_dict(plain_state, strict=False)  # f32 weights are encoded on the way in
    assert_copies_fresh(other)
    error = (plain(other.weight.detach()) - plain_state["weight"]).abs().max()
    half_ulp = 2**-8 if recipe.get(name).linear.master == "bf16" else 2**-11
    assert error <= plain_state["weight"].abs().max() * half_ulp


@pytest.mark.parametrize("name", RECIPES)
def test_another_module_dtype_keeps_the_history_and_trains(name):
    net = layer(name).to(torch.bfloat16)
    assert net.weight.dtype == torch.bfloat16
    if net.input_history is not None:
        assert net.input_history.dtype == net.grad_history.dtype == torch.float32
    optimizer = qv.AdamW(net.parameters(), recipe=name)
    x = randn(16, 48, dtype=torch.bfloat16)
    before = plain(net.weight.detach()).clone()
    net(x).float().square().sum().backward()
    assert net.weight.grad.dtype == torch.bfloat16
    optimizer.step()
    assert (plain(net.weight.detach()) != before).any()
    assert_copies_fresh(net.float())


def test_refused_by_name():
    net = layer()
    for x, error, message in (
        (randn(4, 47), ValueError, r"last axis must be 48, got \(4, 47\)"),
        (torch.tensor(1.0), ValueError, r"last axis must be 48, got \(\)"),
        (
            randn(4, 48).double(),
            TypeError,
            "must be float32, .* got torch.float64",
        ),
        (torch.ones(4, 48, dtype=torch.int64), TypeError, "got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            net(x)
    with pytest.raises(ValueError, match="recipe 'bf16' has no FP8 linear layer"):
        Linear(4, 4, recipe="bf16")
    with pytest.raises(ValueError, match="unknown recipe 'fp9'"):
        Linear(4, 4, recipe="fp9")
    assert "delayed scaling, f16-tensor weight" in repr(net)
