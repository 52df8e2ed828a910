"""Which norms and MLPs are recognised, and what is said of the others."""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from blocks import MLPS, NORMS, Gated, PlainRMSNorm
from torch import nn

import quaver as qv
from quaver import models, structure
from quaver.nn import MLP, Linear, Norm


def linear(k=48, n=32):
    return nn.Linear(k, n)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_recognised_by_what_they_compute(norm):
    module = NORMS[norm](48)
    form = structure.norm_form(module)
    assert form.width == 48
    assert form.centered == ("LayerNorm" in norm)
    assert form.offset == (1.0 if "1 +" in norm else 0.0)


class Odd(PlainRMSNorm):
    def forward(self, x):
        return super().forward(x) + 0.01


class Epsilon(PlainRMSNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.weight


class Crash(PlainRMSNorm):
    def forward(self, x):
        raise KeyError("needs a mask")


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Odd(48), "something else than RMSNorm or LayerNorm"),
        (Epsilon(48), "something else than RMSNorm or LayerNorm"),
        (Crash(48), "does not run on one matrix: .*needs a mask"),
        (nn.LayerNorm((4, 48)), "normalises over 2 axes"),
        (nn.RMSNorm(48).double(), "its weight is torch.float64"),
    ],
)
def test_a_norm_that_is_none(module, why):
    with pytest.raises(structure.NotRecognized, match=why):
        structure.norm_form(module)
    net = nn.Sequential(module, linear())
    qv.convert(net, "coat")
    assert type(net[0]) is type(module)
    assert "0" in qv.convert_report(net).left


def test_batch_norms_are_no_norms():
    assert not structure.is_norm(nn.BatchNorm1d(48)) and not structure.is_norm(nn.GroupNorm(4, 48))
    assert not structure.is_norm(nn.Linear(4, 4)) and not structure.is_norm(nn.PReLU(48))


class Readers(nn.Module):
    """A norm whose result `read` uses."""

    def __init__(self, read):
        super().__init__()
        self.norm, self.a, self.b = nn.RMSNorm(48), linear(), linear()
        self.head, self.read = linear(), read

    def forward(self, x):
        return self.read(self, self.norm(x), x)


READS = {
    "one": (lambda m, y, x: m.a(y), None),
    "two": (lambda m, y, x: m.a(y) + m.b(y), None),
    "residual": (lambda m, y, x: m.a(y) + y[..., :32], "getitem reads it"),
    "sum": (lambda m, y, x: m.a(x + y), "add reads it"),
    "skipped": (lambda m, y, x: m.a(y) + m.head(y), "head reads it, which has no FP8 linear layer"),
    "unused": (lambda m, y, x: m.a(x), "nothing reads it"),
    "result": (lambda m, y, x: (m.a(y), y), "output reads it"),
    "control flow": (lambda m, y, x: m.a(y) if y.sum() > 0 else y, "cannot be traced"),
}


@pytest.mark.parametrize("name", READS)
def test_a_norm_is_swapped_where_fp8_linear_layers_alone_read_it(name):
    read, why = READS[name]
    net = Readers(read)
    qv.convert(net, "coat", skip=("head",))
    report = qv.convert_report(net)
    assert isinstance(net.norm, Norm) == (why is None)
    if why is None:
        assert report.converted["norm"] == "norm" and "norm" not in report.left
        return
    assert "norm" not in report.converted
    assert re.search(why, report.left["norm"]), report.left["norm"]
    assert report.left["head"] == "it is skipped"
    assert f"norm: {report.left['norm']}" in str(report)


@pytest.mark.parametrize("form", MLPS)
def test_mlps_are_recognised_by_their_operations(form):
    net = qv.convert(MLPS[form](), "coat")
    assert isinstance(net, MLP) and isinstance(net, type(MLPS[form]()))
    assert net.plan.kind == {"gelu gated": "gelu", "tanh gated": "gelu_tanh",
                             "plain": "gelu_tanh"}.get(form, "silu")  # fmt: skip


def changed(forward, **modules):
    class Other(Gated):
        pass

    Other.forward = forward
    net = Other(48, 80)
    for name, module in modules.items():
        setattr(net, name, module)
    return net


class Mine(nn.Linear):
    pass


def product(m, gate, up):
    return F.silu(m.gate_proj(gate)) * m.up_proj(up)


def with_side_effect(m, x):
    y = m.down_proj(product(m, x, x))
    m.seen = m.up_proj(x).sum()
    return y


# Forwards that are nearly an MLP's, and what is said of each.
STRANGE = {
    "relu": (
        lambda m, x: m.down_proj(F.relu(m.gate_proj(x)) * m.up_proj(x)),
        "activation is none of silu, gelu, gelu_tanh",
    ),
    "dropout": (lambda m, x: m.down_proj(F.dropout(product(m, x, x))), "activation is none of"),
    "after": (lambda m, x: m.down_proj(product(m, x, x)) * 2, "no converted nn.Linear"),
    "another input": (
        lambda m, x: m.down_proj(product(m, x, x * 2)),
        "up_proj reads something else than the MLP's input",
    ),
    "twice": (
        lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.gate_proj(x)),
        "gate_proj is its gate and its other branch",
    ),
    "side effect": (with_side_effect, "its forward does more: up_proj"),
    "two inputs": (lambda m, x, z: m.down_proj(product(m, x, z)), "reads 2 inputs"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_another_mlp_is_left_and_works(name):
    forward, why = STRANGE[name]
    torch.manual_seed(0)
    plain = changed(forward)
    net = copy.deepcopy(plain)
    qv.convert(net, "coat")
    assert not isinstance(net, MLP)
    assert re.search(why, qv.convert_report(net).left[""])
    assert f"left the model: {qv.convert_report(net).left['']}" in str(qv.convert_report(net))
    x = [torch.randn(16, 48)] * (2 if name == "two inputs" else 1)
    got, wanted = (run_seeded(m, x) for m in (net, plain))
    assert (got - wanted).norm() <= 0.15 * wanted.norm()


def run_seeded(module, x):
    torch.manual_seed(1)  # of a dropout
    return module(*x)


def test_linear_layers_of_other_kinds_are_left():
    net = qv.convert(changed(Gated.forward, up_proj=Mine(48, 80)), "coat")
    report = qv.convert_report(net)
    assert not isinstance(net, MLP) and "no converted nn.Linear" in report.left[""]
    assert report.left["up_proj"] == "it is a Mine, a linear layer of another kind"


def test_a_replaced_forward_is_left():
    net = Gated(48, 80)
    net.forward = lambda x: net.down_proj(x)
    qv.convert(net, "coat")
    assert "forward was replaced" in qv.convert_report(net).left[""]


def test_skipping_norms_and_mlps_by_name():
    net = nn.ModuleDict({"block": nn.Sequential(nn.RMSNorm(48), Gated(48, 80))})
    qv.convert(net, "coat", skip=("block.0", "*.1"))
    report = qv.convert_report(net)
    assert report.left == {"block.0": "it is skipped", "block.1": "it is skipped"}
    assert set(report.converted.values()) == {"linear"}


@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("data", [True, False])
def test_our_models_convert_whole_with_and_without_data(family, data):
    config = models.Config(family=family, dim=32, layers=2, heads=2, ffn=48)
    with torch.device("cpu" if data else "meta"):
        model = models.build(config)
    qv.convert(model, "coat")
    report = qv.convert_report(model)
    kinds = list(report.converted.values())
    assert (kinds.count("linear"), kinds.count("norm"), kinds.count("mlp")) == (8, 4, 2)
    assert set(report.left) == {"lm_head", "norm"}
    again = dict(report.converted)
    qv.convert(model, "coat")
    assert qv.convert_report(model).converted == again
    with pytest.raises(ValueError, match="was converted by another recipe; restore it first"):
        qv.convert(model, "fp8lm-o2")
    qv.restore(model)
    assert not any(isinstance(m, (Norm, MLP, Linear)) for m in model.modules())
    assert qv.convert_report(model).converted == {}


def test_a_recipe_may_leave_norms_or_mlps():
    base = qv.recipe.get("coat")
    for what in ("norm", "mlp"):
        part = dataclasses.replace(base.activation, **{what: False})
        net = nn.Sequential(nn.RMSNorm(48), Gated(48, 80))
        qv.convert(net, dataclasses.replace(base, activation=part))
        assert isinstance(net[0], Norm) == (what != "norm")
        assert isinstance(net[1], MLP) == (what != "mlp")
        net(torch.randn(16, 48)).sum().backward()
