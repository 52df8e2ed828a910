"""Linear: forward, dgrad and wgrad against f64 over the codes that were multiplied, and use."""

import dataclasses
import io

import pytest
import torch
from helpers import FP8, assert_same, bits, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import quaver as qv
from quaver import ScaledTensor, recipe, reference
from quaver.nn import Linear

E4M3, E5M2 = FP8
RECIPES = [name for name in recipe.names() if recipe.get(name).linear is not None]
INF = float("inf")


def layer(name="fp8lm-o2", k=48, n=32, bias=True, seed=0):
    torch.manual_seed(seed)
    return Linear(k, n, bias, recipe=name)


def plain(t):
    return t.dequantize() if isinstance(t, ScaledTensor) else t


def variant(**changes):
    base = recipe.get("fp8lm-o2")
    return dataclasses.replace(base, name="v", linear=dataclasses.replace(base.linear, **changes))


def codes(x, dtype, rule, grain=None):
    """The codes and scales of x as a product's operand."""
    return reference.quantize(x, dtype, None, grain or rule.grain, 128, rule.power_of_two)[:2]


def kept_grain(rule):
    """The grain of the transposed input that backward keeps."""
    return rule.grain if rule.kept == "grain" else rule.kept


def weight_codes(net, transposed=False):
    """Those of the weight [N, K], or of its transpose."""
    w = net.weight.detach()
    if isinstance(w, ScaledTensor):
        q, scale = reference.fp8_weight(w.qdata, w.scale)
        return (q.t() if transposed else q), scale
    return codes(w.t() if transposed else w, E4M3, net.rule, net.rule.weight_grain)


def check_close(got, q1, s1, q2, s2, dtype, addend=None):
    """Within the roundings of one product to `dtype`; the codes themselves are given."""
    wanted = reference.gemm(q1, s1, q2, s2, addend)
    bound = reference.gemm_tolerance(q1, s1, q2, s2, dtype, addend)
    assert ((got.double() - wanted).abs() <= bound).all()


def assert_copies_fresh(net):
    x = randn(5, net.in_features, seed=9)
    y = net.eval()(x).detach()
    bias = None if net.bias is None else net.bias.detach()
    check_close(y, *codes(x, E4M3, net.rule), *weight_codes(net), torch.float32, bias)
    net.train()


SIZES = [(16, 48, 32), (1, 1, 1), (5, 7, 3), (33, 17, 65), (130, 257, 144)]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_dgrad_and_wgrad_against_f64(name, size, dtype):
    m, k, n = size
    net = layer(name, k, n)
    if dtype == torch.bfloat16:
        net.bias.data = net.bias.data.bfloat16()  # a bias in f32 would be rounded to bf16 first
    x = randn(m, k, dtype=dtype).requires_grad_()
    dy = randn(m, n, seed=1, dtype=dtype)
    y = net(x)
    y.backward(dy)
    rule = net.rule
    x_codes = codes(x.detach(), E4M3, rule)
    assert y.dtype == x.grad.dtype == dtype
    check_close(y.detach(), *x_codes, *weight_codes(net), dtype, net.bias.detach())
    check_close(
        x.grad, *codes(dy, rule.grad_output, rule), *weight_codes(net, transposed=True), dtype
    )
    operands = (*codes(dy.t(), rule.grad_output, rule),
                *codes(x.detach().t(), E4M3, rule, kept_grain(rule)))  # fmt: skip
    wgrad = reference.gemm(*operands)
    grad = net.weight.grad
    assert grad.dtype == net.weight.dtype
    product = dtype if isinstance(grad, ScaledTensor) else grad.dtype
    bound = reference.gemm_tolerance(*operands, product)
    if isinstance(grad, ScaledTensor):  # e4m3: half an ulp of a normal, or of a subnormal
        assert grad.qdata.dtype == E4M3
        bound = bound * 2 + wgrad.abs() * 2**-4 + grad.scale.double() * 2**-10
    assert ((plain(grad).double() - wgrad).abs() <= bound).all()
    torch.testing.assert_close(
        net.bias.grad.double(), dy.double().sum(0), rtol=torch.finfo(net.bias.dtype).eps, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 48), (2, 1, 4, 48), (0, 48), (3, 0, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_number_of_axes(shape, bias):
    net = layer(bias=bias)
    x = randn(*shape).requires_grad_()
    y = net(x)
    assert y.shape == (*shape[:-1], 32)
    y.sum().backward()
    flat = x.detach().reshape(-1, 48).requires_grad_()
    other = layer(bias=bias)
    z = other(flat)
    z.sum().backward()
    assert_same(y.detach().reshape(-1, 32), z.detach())
    assert_same(x.grad.reshape(-1, 48), flat.grad)
    assert_same(plain(net.weight.grad), plain(other.weight.grad))
    if 0 in shape:
        assert plain(net.weight.grad).abs().max() == 0
    if bias:
        assert_same(net.bias.grad, other.bias.grad)


def test_strided_and_expanded_inputs():
    net = layer()
    base = randn(5, 48, 4)
    for x in (base.transpose(1, 2), base[..., 0], base[:1, :, 0].expand(7, 48), base[::2, :, 1]):
        assert_same(net(x).detach(), net(x.contiguous()).detach())
    x = randn(8, 48).requires_grad_()
    net(x).sum().backward()  # an expanded output gradient
    net(x).t().contiguous().t().square().sum().backward()  # and one in column order
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_a_layer_without_features_does_what_torch_does(size):
    net = layer(k=size[0], n=size[1])
    x = randn(3, size[0]).requires_grad_()
    y = net(x)
    assert_same(y.detach(), net.bias.detach().expand(3, size[1]).contiguous())
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", RECIPES)
def test_frozen_weight_and_frozen_input(name):
    reference_net, net = layer(name), layer(name)
    x = randn(16, 48).requires_grad_()
    reference_net(x).sum().backward()
    wanted = x.grad.clone()
    net.weight.requires_grad_(False)
    x.grad = None
    net(x).sum().backward()
    assert net.weight.grad is None
    assert_same(x.grad, wanted)
    net = layer(name)
    net(x.detach()).sum().backward()
    assert_same(plain(net.weight.grad), plain(reference_net.weight.grad))
    net.requires_grad_(False)
    assert not net(x.detach()).requires_grad


def saved(function, *modules):
    """Storages that autograd saves while `function` runs, without the modules' parameters: {dtype:
    bytes}."""
    found = {}
    seen = {
        p.untyped_storage().data_ptr()
        for module in modules
        for p in module.parameters()
        if not isinstance(p, ScaledTensor)
    }

    def pack(t):
        key = t.untyped_storage().data_ptr()
        if key not in seen:
            found[t.dtype] = found.get(t.dtype, 0) + t.untyped_storage().nbytes()
        seen.add(key)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return found, result


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_saved_in_fp8_and_nothing_else(name, dtype):
    net = layer(name)
    x = randn(64, 48, dtype=dtype).requires_grad_()
    found, y = saved(lambda: net(x), net)
    scales = {"tensor": 1, "row": 48, "block": 48, "tile": 1}[kept_grain(net.rule)]
    assert found == {E4M3: 64 * 48, torch.float32: 4 * scales}
    y.float().sum().backward()
    net.weight.requires_grad_(False)
    found, _ = saved(lambda: net(x), net)
    assert E4M3 not in found  # dgrad needs no input


@pytest.mark.parametrize("name", ["fp8lm-o2", "tensorwise"])
def test_delayed_scaling_follows_the_oracle(name):
    """40 steps, growing and shrinking, with an infinity in the middle of both passes."""
    net = layer(name, bias=False)
    delayed = recipe.get(name).linear.scaling == "delayed"
    inputs, grads = reference.DelayedScale(E4M3), reference.DelayedScale(E5M2)
    wq, ws = weight_codes(net)
    for step in range(40):
        x = (randn(16, 48, seed=step) * 1.5 ** (step % 9)).requires_grad_()
        dy = randn(16, 32, seed=100 + step) * 1.7 ** -(step % 7)
        if step == 20:
            with torch.no_grad():
                x[3, 3] = INF
            dy[2, 2] = INF
        y = net(x)
        y.backward(dy)
        if step == 20:
            inputs.cast(x.detach()), grads.cast(dy)
            assert not (y.isfinite().any() or x.grad.isfinite().any())
            continue
        if delayed:
            xq, xs, _ = inputs.cast(x.detach())
            gq, gs, _ = grads.cast(dy)
        else:
            xq, xs, _ = reference.quantize(x.detach(), E4M3)
            gq, gs, _ = reference.quantize(dy, E5M2)
        check_close(y.detach(), xq, xs, wq, ws, torch.float32)
        check_close(x.grad, gq, gs, wq.t(), ws, torch.float32)


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_batches_without_values_teach_delayed_scaling_nothing(rows, size):
    """After 20 empty or all-zero batches the first values are cast as by current scaling."""
    nets = [layer("fp8lm-o2", bias=False), layer("tensorwise", bias=False)]
    with torch.no_grad():
        nets[1].weight.copy_(nets[0].weight.dequantize())
    for _ in range(20):
        nets[0](torch.zeros(rows, 48)).sum().backward()
    found = []
    for net in nets:
        x = (randn(16, 48) * size).requires_grad_()
        y = net(x)
        y.backward(randn(16, 32, seed=1) * size)
        found.append([y.detach(), x.grad])
    for got, wanted in zip(*found, strict=True):
        # The weight's scales differ by a power of two at most: only subnormal codes differ.
        assert (got - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_an_outlier_does_not_blind_the_next_step(where):
    """One batch 10^6 times larger; current scaling forgets it at once, and so does delayed."""
    net = layer("fp8lm-o2", bias=False)
    exact = net.weight.detach().dequantize()
    for step in range(30):
        huge = 1e6 if step == 20 else 1.0
        x = (randn(16, 48, seed=step) * (huge if where == "input" else 1)).requires_grad_()
        dy = randn(16, 32, seed=100 + step) * (huge if where == "gradient" else 1)
        y = net(x)
        y.backward(dy)
        for got, wanted in ((y.detach(), x.detach() @ exact.t()), (x.grad, dy @ exact)):
            assert (got - wanted).norm() <= 0.1 * wanted.norm(), step  # e5m2 is off by 5.3 %


def test_eval_leaves_no_trace_and_ignores_the_history():
    net = layer()
    for step in range(20):
        net(randn(16, 48, seed=step).requires_grad_()).sum().backward()
    state = net.input_history.clone(), net.grad_history.clone()
    assert state[0][0] >= 16
    net.eval()
    x = randn(16, 48) * 1000
    y = net(x)  # far beyond the history, and yet not saturated
    net(x.requires_grad_()).sum().backward()
    assert_same(net.input_history, state[0])
    assert_same(net.grad_history, state[1])
    wq, ws = weight_codes(net)
    check_close(
        y.detach(), *reference.quantize(x.detach(), E4M3)[:2], wq, ws, torch.float32, net.bias
    )


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


def test_an_infinity_is_not_saturated_away():
    """Neither forward nor backward may turn one into a number that looks sound: it reaches what its
    scale does, at least the row, or in the weight's gradient the column, that it is in."""
    for name in RECIPES:
        net = layer(name, bias=False)
        whole = net.rule.grain == "tensor"
        x = randn(16, 48).requires_grad_()
        with torch.no_grad():
            x[3, 3] = INF
        for y in (net(x), net.eval()(x)):
            assert not y[... if whole else 3].isfinite().any()
            assert whole or y.isfinite().sum() == 15 * 32
        net.train()(x).sum().backward()
        assert not plain(net.weight.grad)[:, ... if whole else 3].isfinite().any()
        net.weight.grad = None
        x = randn(16, 48).requires_grad_()
        dy = randn(16, 32)
        dy[3, 3] = -INF
        net(x).backward(dy)
        bad = ... if whole else 3
        assert not plain(net.weight.grad)[bad].isfinite().any()
        assert not x.grad[bad].isfinite().any()
        assert whole or (net.weight.grad.isnan().sum(), x.grad.isnan().sum()) == (48, 48)


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
}


@pytest.mark.parametrize("how", DERIVATIVES)
@pytest.mark.parametrize("name", RECIPES)
def test_a_second_derivative_is_refused_by_name(how, name):
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


def test_a_non_finite_gradient_survives_to_the_optimizer():
    for where in ("input", "gradient"):
        for kind in ("e4m3", "bf16", "f32"):
            net = layer(variant(weight_grad=kind))
            x, dy = randn(16, 48), randn(16, 32)
            (x if where == "input" else dy)[3, 3] = INF
            net(x).backward(dy)
            net(randn(16, 48)).sum().backward()
            bad = [p.grad for p in net.parameters()]
            assert not qv.ops.grad_norm(bad)[0].isfinite(), (where, kind)


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
