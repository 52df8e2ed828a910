"""The state_dict of a model with ScaledTensor weights: plain readable values that go anywhere and
come back as the same codes, and that nobody can write by mistake."""

import copy
import io
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from helpers import assert_same, bits, randn
from torch import nn

import quaver as qv
from quaver.read_only import ReadOnlyTensor


def build(recipe="fp8lm-o2", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    return model if recipe is None else qv.convert(model, recipe)


def trained(steps=2):
    model = build()
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe="fp8lm-o2")
    for step in range(steps):
        model(randn(8, 32, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model[0].weight.mul_(1.37)  # a scale that is no power of two
    return model


def assert_same_weights(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        for x, y in zip(qv.tensor.plain_tensors(p), qv.tensor.plain_tensors(q), strict=True):
            assert_same(x.detach(), y.detach())


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location=lambda storage, location: storage)


def through_safetensors(state, path):
    safetensors.torch.save_file(state, path / "model.safetensors")
    return safetensors.torch.load_file(path / "model.safetensors")


def through_dcp(state, path):
    dcp.save({"model": state}, checkpoint_id=path / "dcp", no_dist=True)
    target = {k: torch.zeros_like(v) for k, v in state.items()}
    dcp.load({"model": target}, checkpoint_id=path / "dcp", no_dist=True)
    return target


WAYS = {
    "direct": lambda state, path: state,
    "deepcopy": lambda state, path: copy.deepcopy(state),
    "pickle": lambda state, path: pickle.loads(pickle.dumps(state)),
    "torch.save": lambda state, path: through_file(state),
    "safetensors": through_safetensors,
    "torch's distributed checkpoint": through_dcp,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_state_dict_gives_the_same_codes_back(way, assign, tmp_path):
    model, other = trained(), build(seed=1)
    state = WAYS[way](model.state_dict(), tmp_path)
    if way != "direct":
        assert all(type(v) is torch.Tensor for v in state.values())
    result = other.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_weights(model, other)
    x = randn(4, 32, seed=9)
    assert_same(other(x), model(x))
    optimizer = qv.AdamW(other.parameters(), recipe="fp8lm-o2")  # and it trains on
    other(x).sum().backward()
    optimizer.step()
    assert (bits(other[0].weight.qdata) != bits(model[0].weight.qdata)).any()


def test_save_model_of_safetensors(tmp_path):
    model, other = trained(), build(seed=1)
    safetensors.torch.save_model(model, tmp_path / "m.safetensors")
    safetensors.torch.load_model(other, tmp_path / "m.safetensors")
    assert_same_weights(model, other)


def test_values_are_exact_and_have_memory():
    model = trained()
    state = model.state_dict()
    value = state["0.weight"]
    assert type(value) is ReadOnlyTensor and value.dtype == torch.float32
    assert value.data_ptr() != 0 and value.data_ptr() != state["1.weight"].data_ptr()
    assert_same(value.values, model[0].weight.detach().dequantize())
    assert state["0.weight_master_scale"].tolist() == [
        model[0].weight.scale.item(), model[0].weight.amax.item()
    ]  # fmt: skip
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight
    assert "0.weight_master_scale" not in model.state_dict(keep_vars=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_plain_models_state_loads_to_the_nearest_codes(dtype):
    plain, model = build(None, seed=3).to(dtype), build()
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys and all("history" in k for k in result.missing_keys)
    value = plain[0].weight.detach()
    value = value.float() if dtype == torch.float64 else value
    assert_same(model[0].weight.qdata, qv.quantize(value, torch.float16).qdata)
    assert isinstance(model[0].weight, nn.Parameter)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.zeros(3, 3)}, strict=False)


def test_values_that_somebody_changed_are_loaded_without_the_old_scale():
    model, other = trained(), build()
    state = copy.deepcopy(model.state_dict())
    state["0.weight"] *= 1000
    other.load_state_dict(state)
    assert_same(other[0].weight.qdata, qv.quantize(state["0.weight"], torch.float16).qdata)


def test_other_models_take_the_values():
    model = trained()
    state = model.state_dict()
    plain = build(None)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight_master_scale"):
        plain.load_state_dict(state)
    plain.load_state_dict(state, strict=False)
    assert_same(plain[0].weight.detach(), state["0.weight"].values)
    other = build("tensorwise")
    assert "0.weight_master_scale" not in other.load_state_dict(state, strict=False).unexpected_keys
    assert_same(other[0].weight.detach(), state["0.weight"].values)


def test_tied_weights_are_one_entry_of_memory():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

    model = qv.convert(Tied(), "fp8lm-o2")
    state = model.state_dict()
    assert state["a.weight"] is state["b.weight"]
    before = model.a.weight.detach().dequantize()
    model.load_state_dict(copy.deepcopy(state))
    assert model.a.weight is model.b.weight
    assert_same(model.a.weight.detach().dequantize(), before)


# Nobody writes decoded values


def value():
    return trained(0).state_dict()["0.weight"]


REFUSED = {
    "add_": lambda t: t.add_(1),
    "copy_ to a row": lambda t: t[3].copy_(torch.zeros(32)),
    "copy_ to all rows": lambda t: t[:].copy_(torch.zeros(48, 32)),
    "fill_": lambda t: t.fill_(2),
    "setitem": lambda t: t.__setitem__(0, 1.0),
    "a view of a view": lambda t: t.view(-1)[3:].unsqueeze(0).zero_(),
    "detach": lambda t: t.detach().mul_(2),
    ".data": lambda t: t.data.mul_(2),
    ".data =": lambda t: setattr(t, "data", torch.zeros(48, 32)),
    "out=": lambda t: torch.add(torch.ones(48, 32), 1, out=t),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
    "set_": lambda t: t.set_(torch.zeros(48, 32)),
    "resize_": lambda t: t.resize_(3),
    "apply_": lambda t: t.apply_(lambda x: x + 1),
    "an optimizer": lambda t: step(nn.Parameter(t)),
    "numpy": lambda t: t.numpy().__setitem__(0, 1.0),
    "np.asarray": lambda t: np.asarray(t).__setitem__(0, 1.0),
}


def step(p):
    p.grad = torch.ones(48, 32)
    torch.optim.SGD([p], lr=1.0).step()


@pytest.mark.parametrize("name", REFUSED)
def test_a_write_to_decoded_values_is_refused_by_name(name):
    t = value()
    before = t.values.clone()
    with pytest.raises((RuntimeError, ValueError), match=r"decoded values of a Scaled|read-only"):
        REFUSED[name](t)
    assert_same(t.values, before)


def test_copy_to_a_whole_value_writes_the_weight():
    """torch's distributed checkpoint loads so, and many others' averages are written so."""
    model, saved = build(), trained()
    taken, x = copy.deepcopy(saved.state_dict()), randn(4, 32, seed=9)
    target = model.state_dict()
    before = model[0].weight._version
    model(x)
    for name, value in target.items():
        value.detach().copy_(taken[name])
        assert_same(value.clone(), taken[name])
    assert model[0].weight._version > before
    assert_close(model[0].weight, saved[0].weight)
    # Other scales round to other e4m3 codes, 5 % of two layers; weights left as they were are far.
    assert (model(x) - saved(x)).norm() < 0.1 * saved(x).norm()
    model.load_state_dict(target)
    assert_same_weights(model, saved)
    assert_same(model(x), saved(x))


def assert_close(a, b):
    """To one code of f16, or a subnormal of it under the scale."""
    a, b = a.detach().dequantize(), b.detach().dequantize()
    torch.testing.assert_close(a, b, rtol=2.0**-10, atol=b.abs().max().item() * 2.0**-24)


def test_a_copy_that_fails_changes_neither():
    model = build()
    value = model.state_dict()["0.weight"]
    codes, before = model[0].weight.qdata.clone(), value.clone()
    with pytest.raises(RuntimeError, match=r"expand|size"):
        value.copy_(torch.zeros(3, 3))
    assert_same(model[0].weight.qdata, codes)
    assert_same(value.clone(), before)


@pytest.mark.parametrize("load", [False, True])
def test_torchs_distributed_checkpoint_loads_in_place(load, tmp_path):
    model, other = trained(), build(seed=1)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    if load:
        other.load_state_dict(state)
        assert_same_weights(model, other)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        if isinstance(p, qv.ScaledTensor):
            assert_close(p, q)
        else:
            assert_same(p.detach(), q.detach())


def test_an_average_over_state_dicts_follows():
    """timm's and many others': after n steps 1 - decay^n of the way. Each step is far below half
    a code; the noise of rounding is averaged over 1,536 values."""
    torch.manual_seed(0)
    decay, steps = 0.999, 400
    average, goal = build(), build()
    with torch.no_grad():
        average[0].weight.fill_(0.9), goal[0].weight.fill_(0.7)
    for _ in range(steps):
        for e, v in zip(average.state_dict().values(), goal.state_dict().values(), strict=True):
            e.copy_(decay * e + (1 - decay) * v)
    moved = 0.9 - average[0].weight.detach().dequantize().mean().item()
    assert moved == pytest.approx(0.2 * (1 - decay**steps), rel=0.02)


def test_copies_of_decoded_values_are_plain_and_writable():
    t = value()
    before = t.values.clone()
    for other in (
        t.clone(), t + 0, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.to(torch.float64),
        torch.from_dlpack(t, copy=True), torch.from_numpy(np.array(t)),
        torch.zeros(48, 32).copy_(t),
    ):  # fmt: skip
        assert type(other) is torch.Tensor
        other.add_(1)
    assert_same(t.values, before)


def test_rows_and_blocks_have_read_only_views():
    """Their codes cannot be viewed with the scales."""
    for granularity in ("row", "block"):
        t = qv.quantize(randn(4, 256), granularity=granularity)
        for view in (t[1:3], t.t(), t.view(-1), t.unbind(0)[1]):
            assert type(view) is ReadOnlyTensor
            with pytest.raises(RuntimeError, match="decoded values"):
                view.zero_()
        assert_same(t[1:3].values, t.dequantize()[1:3])


def test_gradients_flow_through_views():
    for granularity in ("tensor", "row"):
        p = nn.Parameter(qv.quantize(randn(6, 8), torch.float16, granularity=granularity))
        for take in (
            lambda t: t[:, 2:5], lambda t: t.diagonal(), lambda t: t.t()[0], lambda t: t[..., 2],
        ):  # fmt: skip
            p.grad = None
            (take(p) * 3).sum().backward()
            wanted = torch.zeros(6, 8)
            take(wanted).fill_(3)
            assert_same(p.grad, wanted)
