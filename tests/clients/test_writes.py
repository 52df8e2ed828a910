"""Whatever writes a parameter or a gradient, by whichever door, is seen by the next forward or
step; or it is refused, by an error that says what to do instead."""

import ctypes
import re

import numpy as np
import pytest
import torch
from small import RECIPES, assert_computes_with, batch, distance, mlp, plain, values
from torch import nn

import quaver as qv

REFUSAL = r"ScaledTensor|read-only|^numpy:|data pointer of Tensor"


def used(recipe):
    """A converted model that has run forward and backward: whatever it keeps, it has now."""
    model = mlp(recipe)
    x, y = batch()
    nn.functional.mse_loss(model(x), y).backward()
    return model


def other(weight, seed=5):
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / 8


def rows(w, x):
    w[3] = x[3]


def part(w, x):
    w[:, 2:5] = x[:, 2:5]


def masked(w, x):
    w[x > 0] = x[x > 0].to(w.dtype)


def by_numpy(w, x):
    w.numpy()[:] = x.numpy()


def by_memory(w, x):
    """As a collective or a kernel of another library writes."""
    source = x.to(w.dtype)
    ctypes.memmove(_address(w), source.data_ptr(), source.nbytes)


def _address(w):
    address = w.data_ptr()
    assert address != 0, "the address of nothing"
    return address


def by_storage(w, x):
    torch.empty(0, dtype=w.dtype).set_(w.untyped_storage()).copy_(x.reshape(-1))


# How people write: (write, values afterwards). Each writes into w the values of x, or some of them.
WRITES = {
    "copy_": lambda w, x: w.copy_(x),
    "add_": lambda w, x: w.add_(x),
    "sub_": lambda w, x: w.sub_(x),
    "mul_": lambda w, x: w.mul_(x),
    "mul_ by a number": lambda w, x: w.mul_(-3.0),
    "div_ by a number": lambda w, x: w.div_(-0.5),
    "*=": lambda w, x: w.__imul__(x),
    "zero_": lambda w, x: w.zero_(),
    "fill_": lambda w, x: w.fill_(0.25),
    "neg_": lambda w, x: w.neg_(),
    "clamp_": lambda w, x: w.clamp_(-0.01, 0.01),
    "lerp_": lambda w, x: w.lerp_(x.to(w.dtype), 0.5),
    "addcmul_": lambda w, x: w.addcmul_(x, x, value=8.0),
    "addcdiv_": lambda w, x: w.addcdiv_(x, torch.ones_like(x), value=-0.5),
    "masked_fill_": lambda w, x: w.masked_fill_(x > 0, 0.0),
    "index_copy_": lambda w, x: w.index_copy_(0, torch.tensor([1, 3]), x[[1, 3]].to(w.dtype)),
    "index_fill_": lambda w, x: w.index_fill_(0, torch.tensor([1, 3]), 0.5),
    "scatter_": lambda w, x: w.scatter_(0, torch.zeros(1, w.shape[1], dtype=torch.int64), 0.5),
    "row": rows,
    "columns": part,
    "mask": masked,
    "row view": lambda w, x: w[3].copy_(x[3]),
    "rows view": lambda w, x: w[8:16].copy_(x[8:16]),
    "columns view": lambda w, x: w[:, 2:5].zero_(),
    "transposed view": lambda w, x: w.t().copy_(x.t()),
    "row of transposed": lambda w, x: w.t()[0].zero_(),
    "T": lambda w, x: w.T.mul_(-1),
    "mT": lambda w, x: w.mT.add_(x.t()),
    "diagonal": lambda w, x: w.diagonal().fill_(0.5),
    "unbind": lambda w, x: w.unbind()[2].fill_(0.5),
    "unbind columns": lambda w, x: w.unbind(1)[2].fill_(0.5),
    "chunk": lambda w, x: w.chunk(4)[1].zero_(),
    "chunk columns": lambda w, x: w.chunk(4, dim=1)[1].zero_(),
    "split": lambda w, x: w.split(16)[3].mul_(0.5),
    "narrow": lambda w, x: w.narrow(1, 0, 8).zero_(),
    "select": lambda w, x: w.select(1, 3).fill_(0.5),
    "unsqueeze": lambda w, x: w.unsqueeze(0).copy_(x[None]),
    "squeeze": lambda w, x: w.unsqueeze(0).squeeze(0).mul_(2.0),
    "flatten": lambda w, x: w.flatten()[:64].zero_(),
    "view": lambda w, x: w.view(-1).copy_(x.reshape(-1)),
    "reshape": lambda w, x: w.reshape(16, -1)[2].zero_(),
    "unflatten": lambda w, x: w.unflatten(0, (4, 16))[1].zero_(),
    "permute": lambda w, x: w.permute(1, 0).mul_(-1),
    "movedim": lambda w, x: w.movedim(0, 1)[3].zero_(),
    "view_as": lambda w, x: w.view_as(x).mul_(-1),
    "as_strided": lambda w, x: w.as_strided((64,), (65,)).fill_(0.5),
    "expand": lambda w, x: w.expand(1, 64, 64).mul_(-1),
    "detach": lambda w, x: w.detach().mul_(-1),
    "out=": lambda w, x: torch.mul(x.to(w.dtype), 2, out=w),
    "out= of a row": lambda w, x: torch.mul(x[3].to(w.dtype), 2, out=w[3]),
    "_foreach_": lambda w, x: torch._foreach_add_([w], [x.to(w.dtype)], alpha=2),
    "_foreach_copy_": lambda w, x: torch._foreach_copy_([w], [x]),
    "_foreach_mul_": lambda w, x: torch._foreach_mul_([w], -2.0),
    "_foreach_zero_": lambda w, x: torch._foreach_zero_([w]),
    "_foreach_lerp_": lambda w, x: torch._foreach_lerp_([w], [x.to(w.dtype)], 0.5),
    "numpy": by_numpy,
    "data_ptr": by_memory,
    "storage": by_storage,
    "normal_": lambda w, x: w.normal_(std=0.1, generator=torch.Generator().manual_seed(3)),
    "uniform_": lambda w, x: w.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(3)),
    "set_": lambda w, x: w.set_(x.to(w.dtype)),
    "swap": lambda w, x: torch.utils.swap_tensors(w, nn.Parameter(x.to(w.dtype))),
    "resize_": lambda w, x: w.resize_(0),
}
INIT = {
    "init.xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "init.trunc_normal_": lambda w: nn.init.trunc_normal_(w, std=0.1),
    "init.kaiming_normal_": lambda w: nn.init.kaiming_normal_(w),
    "init.eye_": lambda w: nn.init.eye_(w),
    "init.constant_": lambda w: nn.init.constant_(w, 0.5),
    "init.sparse_": lambda w: nn.init.sparse_(w, 0.5),
}


def apply(write, target, x):
    """Whether `write` was taken; a refusal must name what refuses."""
    with torch.no_grad():
        try:
            write(target, x)
        except (RuntimeError, TypeError, ValueError, BufferError) as error:
            assert re.search(REFUSAL, str(error)), f"an unnamed refusal: {error!r}"
            return False
    return True


@pytest.mark.parametrize("through", ["parameter", "data", "detach"])
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_writes_into_a_weight(recipe, name, through):
    model = used(recipe)
    twin = mlp(dtype=model[0].weight.dtype)
    twin.load_state_dict(values(model))
    x = other(model[0].weight)
    targets = [
        {"parameter": m[0].weight, "data": m[0].weight.data, "detach": m[0].weight.detach()}[
            through
        ]
        for m in (model, twin)
    ]
    before = values(model)
    try:
        with torch.no_grad():
            WRITES[name](targets[1], x)
    except (RuntimeError, BufferError, TypeError, NotImplementedError):
        return  # torch itself refuses it
    if not apply(WRITES[name], targets[0], x):
        assert type(model[0].weight.data) is not torch.Tensor, "a plain tensor refuses nothing"
        assert all(torch.equal(p, before[n]) for n, p in values(model).items())
        return
    # Where torch leaves the parameter as it was (`.data.set_`), so does quaver.
    got, wanted = values(model)["0.weight"], plain(twin[0].weight)
    assert got.shape == wanted.shape
    if wanted.numel():
        # An f16 master within its scale keeps 2^-11 of each value; where 0 is wanted it is 0.
        assert torch.allclose(got, wanted, rtol=2**-9, atol=1e-5 * wanted.abs().max().item())
        assert_computes_with(model, {**before, "0.weight": wanted})


@pytest.mark.parametrize("name", INIT)
@pytest.mark.parametrize("recipe", RECIPES)
def test_modules_are_initialised_by_apply(recipe, name):
    model = used(recipe)

    def reset(module):
        if isinstance(module, nn.Linear):
            INIT[name](module.weight)

    before = values(model)
    model.apply(reset)
    assert not torch.equal(values(model)["0.weight"], before["0.weight"])
    assert_computes_with(model, values(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_assignments(recipe):
    """Of data, of the parameter itself, and of whole modules' state."""
    model = used(recipe)
    x = other(model[0].weight)
    model[0].weight.data = x.to(model[0].weight.dtype)
    assert distance(values(model)["0.weight"], x) < 2**-8
    assert_computes_with(model, values(model))
    model[0].weight.data = model[0].weight.data.clone()
    assert_computes_with(model, values(model) | {"0.weight": x})

    model = used(recipe)
    model[0].weight = nn.Parameter(x)
    assert_computes_with(model, values(model))
    assert distance(values(model)["0.weight"], x) < 2**-8
    nn.functional.mse_loss(model(batch()[0]), batch()[1]).backward()
    qv.AdamW(model.parameters(), lr=1e-3, recipe=recipe).step()
    assert_computes_with(model, values(model))

    for assign in (False, True):
        model = used(recipe)
        state = mlp(seed=7).state_dict()
        report = model.load_state_dict(state, strict=False, assign=assign)
        assert not report.unexpected_keys
        assert all(distance(p, state[n]) < 2**-8 for n, p in values(model).items())
        assert_computes_with(model, state)


@pytest.mark.parametrize("name", [n for n in WRITES if n not in ("set_", "swap", "resize_")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_writes_into_a_gradient(recipe, name):
    model = used(recipe)
    grad = model[0].weight.grad
    twin = plain(grad) if type(grad) is not torch.Tensor else grad.clone()
    before = twin.clone()
    x = other(grad) * plain(twin).abs().max().item()
    try:
        with torch.no_grad():
            WRITES[name](twin, x)
    except TypeError:
        return  # NumPy has no bf16
    if not apply(WRITES[name], grad, x):
        assert type(grad) is not torch.Tensor, "a plain tensor refuses nothing"
        assert torch.equal(plain(model[0].weight.grad), plain(before))
        return
    got = plain(model[0].weight.grad)
    wanted = plain(twin)
    # e4m3 keeps 2^-4 of each value down to 2^-14.8 of the largest.
    assert torch.allclose(got, wanted, rtol=2**-4, atol=2**-14 * wanted.abs().max().item())
    assert torch.equal(got[wanted == 0], wanted[wanted == 0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_assigned_gradients(recipe):
    for assign in ("grad", "data"):
        model = used(recipe)
        weight = model[0].weight
        x = other(weight).to(weight.dtype)
        if assign == "grad":
            weight.grad = x
        else:
            weight.grad.data = x
        assert distance(weight.grad, x) < 0.05
        torch.optim.SGD([weight], lr=1.0).step()
        assert_computes_with(model, values(model))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_buffer_that_is_filled_again(recipe):
    """NumPy's memory, `.data` and out= of an input: the next forward reads the new batch."""
    model = mlp(recipe).eval()
    buffer = np.zeros((8, 64), np.float32)
    x = torch.from_numpy(buffer)
    fills = (
        lambda new: buffer.__setitem__(slice(None), new.numpy()),
        lambda new: x.data.copy_(new),
        lambda new: torch.mul(new, 1.0, out=x),
        lambda new: ctypes.memmove(x.data_ptr(), new.data_ptr(), new.nbytes),
    )
    for seed, fill in enumerate(fills):
        new = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
        fill(new)
        with torch.no_grad():
            assert torch.equal(model(x), mlp(recipe).eval()(new.clone()))
