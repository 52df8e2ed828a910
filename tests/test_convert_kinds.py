"""Linear layers of other kinds than nn.Linear: converted, or named with a reason."""

import copy
import dataclasses
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import assert_same, randn
from linears import RECIPES, plain
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quaver as qv
from quaver import recipe
from quaver.nn import LinearBase, linear
from quaver.nn.rows import choose_rows


class Conv1D(nn.Module):
    """As transformers writes it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def __repr__(self):
        return f"Conv1D(nf={self.nf}, nx={self.nx})"

    def forward(self, x):
        shape = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


def pair(chosen, k, n):
    """A converted Conv1D and a converted nn.Linear of the same values."""
    torch.manual_seed(0)
    conv, linear = Conv1D(n, k), nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias.normal_())
    return [qv.convert(nn.Sequential(m), chosen)[0] for m in (conv, linear)]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("k", "n"), [(48, 32), (17, 33)])
def test_a_conv1d_has_the_bits_of_a_linear_layer(name, k, n):
    # To nearest: Philox numbers elements, which lie in another order.
    nearest = {"master_rounding": "nearest", "bf16_master": "nearest"}
    chosen = dataclasses.replace(recipe.get(name), **nearest)
    nets = pair(chosen, k, n)
    optimizers = [qv.AdamW(net.parameters(), lr=0.01, recipe=chosen) for net in nets]
    for step in range(2):
        found = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            x = randn(2, 8, k, seed=step).requires_grad_()
            y = net(x)
            y.square().sum().backward()
            grad = plain(net.weight.grad)
            found.append([y.detach(), x.grad, grad if net.input_major is False else grad.t()])
            optimizer.step()
            optimizer.zero_grad()
        for got, wanted in zip(*found, strict=True):
            # The same products; summed in another order only where the operands are exchanged.
            torch.testing.assert_close(
                got, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item()
            )
        assert_same(found[0][0], found[1][0]) if step == 0 else None


class Chooser:
    rows = torch.tensor([3, 20])

    def choose(self, weight):
        return self.rows


@pytest.mark.parametrize("name", ["coat", "coat, some rows", "fp8lm-o2", "coat-blockwise"])
@pytest.mark.parametrize(("k", "n"), [(48, 32), (32, 32)])
def test_a_conv1d_is_smoothed_as_a_linear_layer_is(name, k, n):
    name, _, some = name.partition(", ")
    found, x, dy, chooser = [], randn(24, k), randn(24, n, seed=1), Chooser()
    for net in pair(name, k, n):
        net.channel_amax = torch.exp2(torch.arange(k) % 7.0) * 0.75
        net.refresh()
        choose_rows(net.weight, chooser.choose if some else None)
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        y.backward(dy)
        grad = net.weight.grad.to_dense() if some else plain(net.weight.grad)
        grad = (grad.t() if net.input_major else grad).float()
        # The rows of the weight as it lies are what both layers have.
        found.append([y.detach(), leaf.grad, grad[chooser.rows][:, chooser.rows] if some else grad])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("name", RECIPES)
def test_a_conv1d_keeps_its_parameter_class_and_keys(name):
    model = nn.Sequential(Conv1D(32, 48), nn.GELU(), Conv1D(16, 32))
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    qv.convert(model, name)
    mlp = {"": "mlp"} if recipe.get(name).activation is not None else {}
    assert qv.convert_report(model).converted == {"0": "linear", "2": "linear"} | mlp
    assert isinstance(model[0], Conv1D) and isinstance(model[0], LinearBase)
    assert not isinstance(model[0], nn.Linear)  # PEFT would take its weight for [out, in]
    assert model[0].weight.shape == (48, 32)
    assert (model[0].in_features, model[0].out_features) == (48, 32)
    gained = ("_history", "_master_scale")
    assert [k for k in model.state_dict() if not k.endswith(gained)] == keys
    again = copy.deepcopy(model)
    x = randn(8, 48)
    assert_same(again.eval()(x).detach(), model.eval()(x).detach())
    qv.restore(model)
    assert type(model[0]) is Conv1D and vars(model[0]).keys() == vars(twin[0]).keys()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=2**-8, atol=2**-20)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(randn(4, 16, 32))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(4, 16))

    def forward(self, x):
        return F.linear(x, self.weight)


class Mine(nn.Linear):
    pass


LEFT = {
    "experts": (Experts, "gate_up_proj is a stack of matrices"),
    "router": (Router, "it is a Router, no linear layer, and multiplies by weight"),
    "subclass": (lambda: Mine(16, 16), "it is a Mine, a linear layer of another kind"),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        "its weight is computed, by a parametrization or a hook",
    ),
    "lazy": (lambda: nn.LazyLinear(16), "it has no shape yet; run a batch through the model"),
    "lazy convolution": (lambda: nn.LazyConv1d(16, 3), "it has no shape yet"),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), "it is a Conv2d, no linear layer"),
    "attention": (lambda: nn.MultiheadAttention(16, 2), "multiplies by in_proj_weight"),
    "recurrent": (lambda: nn.LSTM(16, 16), "it is a LSTM, no linear layer"),
}


@pytest.mark.parametrize("what", LEFT)
@pytest.mark.parametrize("name", ["tensorwise", "coat"])
def test_what_stays_is_named_with_a_reason(what, name):
    make, reason = LEFT[what]
    model = nn.ModuleDict({"this": make(), "other": nn.Linear(16, 16)})
    qv.convert(model, name)
    report = qv.convert_report(model)
    assert report.converted == {"other": "linear"}
    assert reason in report.left["this"]
    assert reason in str(report)


def test_embeddings_and_vectors_are_not_named():
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.PReLU(16))
    assert qv.convert_report(qv.convert(model, "tensorwise")).left == {}


def test_a_lazy_layer_converts_after_its_first_batch():
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU())
    with pytest.raises(ValueError, match="it has no shape yet; run a batch through the model"):
        qv.convert(model, "coat")
    model(randn(4, 8))
    qv.convert(model, "coat")
    assert qv.convert_report(model).converted == {"0": "linear"}
    model(randn(4, 8)).sum().backward()


# roles


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 64), nn.ModuleList([nn.Linear(32, 32)])
        self.shared_expert_gate = nn.Linear(32, 1)


def test_heads_routers_and_gates_are_left_for_their_role():
    model = transformers.LlamaForSequenceClassification(tiny_llama(num_labels=32))
    model.model.layers[0].mlp = Experts()
    report = qv.convert_report(qv.convert(model, "tensorwise"))
    left = {name.removeprefix("model.layers.0.mlp."): why for name, why in report.left.items()}
    assert left == {
        "score": "it is the model's head",
        "gate": "it chooses between experts",
        "shared_expert_gate": "it chooses between experts",
    }
    assert report.share == 1 and "100% of the weights" in str(report)
    named = qv.convert(transformers.LlamaForSequenceClassification(tiny_llama()), skip=())
    assert "score" in qv.convert_report(named).converted, "names in skip take the place of roles"
    small = qv.convert(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 10)))
    assert "its output has 10 values" in qv.convert_report(small).left["1"]


def tiny_llama(**changes):
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, **changes,
    )  # fmt: skip


def test_a_warning_names_the_share_where_it_is_small():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.LSTM(16, 64), "c": nn.Embedding(99, 64)})
    with pytest.warns(UserWarning, match="only 1% of the weights are FP8(.|\n)*left b: it is a LS"):
        qv.convert(model, "tensorwise")
    assert qv.convert_report(model).share == 16 / (16 + 4 * (16 + 64) * 4)


# skip


def test_a_name_in_skip_that_fits_nothing_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "block": nn.Sequential(nn.Linear(16, 16))})
    for name in ("tensorwise", "bf16"):
        with pytest.raises(ValueError, match="no module of the model is called 'haed'"):
            qv.convert(model, name, skip=("a", "haed"))
        with pytest.raises(ValueError, match=r"'block' is no layer but holds some; 'block\.\*'"):
            qv.convert(model, name, skip=("block",))
    assert not any(isinstance(m, LinearBase) for m in model.modules())
    qv.convert(model, "tensorwise", skip=("block.*",))
    assert qv.convert_report(model).left == {"block.0": "it is skipped"}


# Optimizers that were built before


@pytest.mark.parametrize("make", [qv.AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_older_than_the_models_weights_warns_once(make):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = make(model.parameters())
    qv.convert(model, "fp8lm-o2")
    model(randn(8, 16)).sum().backward()
    with pytest.warns(UserWarning, match="2 of its parameters are not the model's any more"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        fresh = make(model.parameters())
        fresh.step()


STEPS = {
    (
        "coat",
        "fp8lm-o2",
    ): "by f32, f32, nearest; .* 'coat', which has e4m3-expand, e4m3-expand, sto",
    (
        "fp8lm-o2",
        "fp8lm-o1",
    ): "by f32, f32, stochastic; .* which has e4m3-tensor, f16-tensor, stoch",
    ("tensorwise", "fp8lm-o2"): None,  # no master, so nothing differs
    ("coat", "coat"): None,
    ("bf16", "coat"): None,
}


@pytest.mark.parametrize("names", STEPS)
def test_an_optimizer_of_another_recipe_than_the_model_warns_once(names):
    converted, stepped = names
    model = qv.convert(nn.Sequential(nn.Linear(16, 16)), converted)
    optimizer = qv.AdamW(model.parameters(), recipe=stepped)
    model(randn(8, 16)).sum().backward()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    assert len(found) == (STEPS[names] is not None)
    for warning in found:
        assert re.search(STEPS[names], str(warning.message)), warning.message


@pytest.mark.parametrize("name", ["tensorwise", "coat"])
@pytest.mark.parametrize("fused", [False, True])
def test_plain_parameters_stay_those_of_an_older_optimizer(name, fused):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    qv.convert(model, name)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    x, before = randn(8, 16), model(randn(8, 16)).detach()
    model(x).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert (model(randn(8, 16)) != before).any()
    qv.restore(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tensorwise", "coat", "fp8lm-o2"])
def test_restore_gives_the_dtype_that_the_model_has_by_then(name, dtype):
    model = qv.convert(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), name)
    qv.restore(model.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    model(randn(8, 16).to(dtype)).sum().backward()


# Other people's tools over converted layers


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


def test_parametrized_layers_compute_and_restore_names_the_remedy():
    for name in ("tensorwise", "fp8lm-o2"):
        model = qv.convert(nn.Sequential(nn.Linear(48, 32, bias=False)), name)
        x = randn(16, 48)
        wanted = model.eval()(x).detach()
        nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
        torch.testing.assert_close(model(x).detach(), 2 * wanted)
        model(x).sum().backward()
        with pytest.raises(ValueError, match=r"0 is parametrized; call .*remove_parametrizations"):
            qv.restore(model)
        nn.utils.parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
        qv.restore(model)
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("name", RECIPES)
def test_flops_are_counted_as_those_of_plain_layers(name):
    counts = []
    for chosen in (None, name):
        net = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16))
        if chosen is not None:
            qv.convert(net, chosen)
        x = randn(16, 48).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Alike(nn.Linear):
    """A subclass that its library has named as one that computes as nn.Linear does."""

    def extra(self):
        return self.in_features


def test_a_named_subclass_becomes_fp8_and_stays_its_class():
    linear.LINEARS.add(Alike)  # of this test alone
    torch.manual_seed(0)
    model = nn.Sequential(Alike(16, 32), nn.Linear(32, 16))
    plain = copy.deepcopy(model)
    qv.convert(model, "tensorwise")
    assert isinstance(model[0], Alike) and isinstance(model[0], qv.nn.Linear)
    assert model[0].extra() == 16 and set(qv.convert_report(model).converted) == {"0", "1"}
    x = torch.randn(4, 16)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x)) and type(twin[0]) is type(model[0])
    assert (model(x) - plain(x)).norm() < 0.1 * plain(x).norm()  # two casts to e4m3
    qv.restore(model)
    assert type(model[0]) is Alike and torch.equal(model(x), plain(x))


def test_histories_that_leave_the_meta_device_are_new():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    rule = dataclasses.replace(qv.recipe.get("tensorwise").linear, scaling="delayed")
    qv.convert(model, dataclasses.replace(qv.recipe.get("tensorwise"), linear=rule))
    for _ in range(3):  # memory that is not zero, where it comes from the allocator
        torch.full((17,), 7.0)
    model.to_empty(device="cpu")
    assert not model[0].input_history.any() and not model[0].grad_history.any()


def test_a_router_in_a_module_of_its_own_stays():
    class Moe(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.routed_experts = nn.Module(), nn.Linear(32, 32)
            self.router.gate = nn.Linear(32, 32)

    left = qv.convert_report(qv.convert(Moe(), "tensorwise")).left
    assert left == {"router.gate": "it chooses between experts"}
