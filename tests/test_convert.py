"""convert and restore on models that know nothing of FP8."""

import copy

import pytest
import torch
from helpers import assert_same, randn
from torch import nn

import quaver as qv
from quaver import ScaledTensor
from quaver.nn import Linear

RECIPES = ["tensorwise", "fp8lm-o1", "fp8lm-o2"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.gate = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x * torch.sigmoid(self.gate(x)))


IDS = torch.arange(40).view(4, 10)


def build(seed=0, **options):
    torch.manual_seed(seed)
    return Model(**options)


def converted(model):
    return {name for name, m in model.named_modules() if type(m) is Linear}


LINEARS = {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "gate"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_linear_layer_but_the_skipped(name):
    model = build()
    modules = dict(model.named_modules())
    assert qv.convert(model, name) is model
    assert converted(model) == LINEARS
    assert dict(model.named_modules()) == modules  # the very same modules
    assert type(model.lm_head) is nn.Linear
    masters = [m.weight for m in model.modules() if type(m) is Linear]
    assert all(isinstance(w, ScaledTensor) == (name != "tensorwise") for w in masters)
    for p in model.parameters():
        assert isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), set()),
        (("gate",), {"gate"}),
        (("blocks.0.up",), {"blocks.0.up"}),
        (["up"], {"blocks.0.up", "blocks.1.up"}),
        (("blocks.1.*",), {"blocks.1.up", "blocks.1.down"}),
        (iter(["*down"]), {"blocks.0.down", "blocks.1.down"}),
        (("*",), LINEARS | {"lm_head"}),
    ],
)
def test_skip(skip, left):
    assert (
        converted(qv.convert(build(), skip=skip, allow_empty=True))
        == (LINEARS | {"lm_head"}) - left
    )


@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_a_recipe_without_fp8_layers_changes_nothing(name):
    model = build()
    assert qv.convert(model, name) is model and converted(model) == set()


def test_the_converted_model_is_close_to_the_plain_one():
    for name in RECIPES:
        plain, model = build(), qv.convert(build(), name)
        wanted, got = plain(IDS), model(IDS)
        assert (got - wanted).norm() < 0.1 * wanted.norm()  # some e4m3 roundings, 2^-4 each at most
        assert (got != wanted).any()


@pytest.mark.parametrize("name", RECIPES)
def test_restore_gives_back_plain_layers_with_the_weights(name):
    model = qv.convert(build(), name)
    values = {n: p.detach() + 0 for n, p in model.named_parameters()}
    keys = list(build().state_dict())
    assert qv.restore(model) is model
    assert converted(model) == set() and list(model.state_dict()) == keys
    for n, p in model.named_parameters():
        assert type(p) is nn.Parameter
        assert_same(p.detach(), values[n])
    model(IDS).sum().backward()
    assert type(model.gate.weight.grad) is torch.Tensor
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert_same(plain(IDS).detach(), model(IDS).detach())
    assert vars(model.gate).keys() == vars(plain.gate).keys()
    again = qv.convert(model, name)
    assert converted(again) == LINEARS
    again(IDS).sum().backward()


def test_converting_back_and_forth_loses_nothing_more():
    model = qv.convert(build())
    first = {n: p.detach() + 0 for n, p in model.named_parameters()}
    qv.convert(qv.restore(model))
    for n, p in model.named_parameters():
        assert_same(p.detach() + 0, first[n])


@pytest.mark.parametrize("name", RECIPES)
def test_tied_linear_layers_stay_tied(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    qv.convert(model, name)
    assert model[0].weight is model[2].weight
    assert len(list(model.parameters())) == 3
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe=name)
    x = randn(16, 32)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    twin = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    ours = ("history", "master_scale")
    state = {k: v + 0 for k, v in model.state_dict().items() if not k.endswith(ours)}
    twin.load_state_dict(state)
    twin = qv.convert(twin, name).eval()
    torch.testing.assert_close(model.eval()(x), twin(x), rtol=1e-5, atol=1e-6)
    qv.restore(model)
    assert model[0].weight is model[2].weight


@pytest.mark.parametrize("name", RECIPES)
def test_a_head_tied_to_the_embedding_is_left_alone(name):
    model = qv.convert(build(tied=True), name, skip=())
    assert converted(model) == LINEARS
    assert model.lm_head.weight is model.embed.weight
    assert type(model.lm_head.weight) is nn.Parameter


def test_a_layer_tied_to_a_skipped_one_is_left_alone():
    model = build()
    model.gate.weight = nn.Parameter(randn(32, 32))
    model.blocks[0].extra = nn.Linear(32, 32)
    model.blocks[0].extra.weight = model.gate.weight
    qv.convert(model, skip=("gate",))
    assert "blocks.0.extra" not in converted(model)
    assert model.blocks[0].extra.weight is model.gate.weight


def test_hooks_modes_and_frozen_weights_survive():
    model, seen = build(), []
    model.gate.register_forward_hook(lambda *a: seen.append("forward"))
    model.gate.register_forward_pre_hook(lambda *a: seen.append("pre"))
    model.gate.register_full_backward_hook(lambda *a: seen.append("backward"))
    model.blocks[0].eval()
    model.gate.weight.requires_grad_(False)
    qv.convert(model)
    model(IDS).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    assert not model.blocks[0].up.training and model.blocks[1].up.training
    assert model.gate.weight.grad is None and not model.gate.weight.requires_grad
    qv.restore(model)
    assert not model.gate.weight.requires_grad and not model.blocks[0].up.training
    seen.clear()
    model(IDS).sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_subclasses_and_computed_weights_are_left_alone():
    class Mine(nn.Linear):
        pass

    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    with pytest.warns(FutureWarning):
        old_style = nn.utils.weight_norm(nn.Linear(16, 16))
    model = nn.ModuleList([Mine(16, 16), parametrized, old_style, nn.MultiheadAttention(16, 2)])
    with pytest.raises(ValueError, match="no layer of the model became FP8; converted nothing"):
        qv.convert(model)
    assert qv.convert(model, allow_empty=True) is model and converted(model) == set()
    old_style(randn(2, 16)).sum().backward()


def test_converting_twice_is_converting_once_and_another_recipe_is_refused():
    model = qv.convert(build())
    weight = model.gate.weight
    qv.convert(model)
    assert model.gate.weight is weight
    with pytest.raises(ValueError, match="was converted by another recipe; restore it first"):
        qv.convert(model, "tensorwise")


def test_a_model_that_cannot_be_converted_is_left_whole():
    model = build()
    model.gate.double()
    before = dict(model.named_parameters())
    with pytest.raises((TypeError, ValueError), match=r"gate.*float64"):
        qv.convert(model)
    assert converted(model) == set()
    assert all(p is before[n] for n, p in model.named_parameters())


def test_refused_by_name():
    with pytest.raises(TypeError, match="skip must be several names, got the string 'gate'"):
        qv.convert(build(), skip="gate")
    with pytest.raises(TypeError, match=r"must be an nn.Module, got list"):
        qv.convert([build()])
    with pytest.raises(ValueError, match="unknown recipe 'int4'"):
        qv.convert(build(), "int4")


def test_a_bare_linear_layer_converts():
    layer = nn.Linear(16, 16)
    assert type(qv.convert(layer)) is Linear and type(qv.restore(layer)) is nn.Linear


@pytest.mark.parametrize("name", RECIPES)
def test_bf16_models(name):
    model = qv.convert(build().to(torch.bfloat16), name)
    optimizer = qv.AdamW(model.parameters(), recipe=name)
    model(IDS).float().square().mean().backward()
    optimizer.step()
    assert model.gate.weight.dtype == torch.bfloat16
    assert model(IDS).isfinite().all()
    assert qv.restore(model).gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_converted_without_data_is_filled_later(name):
    with torch.device("meta"):
        model = qv.convert(Model(), name)
    model = model.to_empty(device="cpu")
    full = qv.convert(build(), name)
    model.load_state_dict(full.state_dict())
    assert_same(model(IDS).detach(), full(IDS).detach())


@pytest.mark.parametrize("name", RECIPES)
def test_deepcopy_and_state_dict_of_a_whole_model(name):
    model = qv.convert(build(tied=True), name)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.embed.weight
    other = qv.convert(build(seed=1, tied=True), name)
    other.load_state_dict(model.state_dict())
    wanted = model(IDS.clone()).detach()
    for m in (twin, other):
        assert_same(m(IDS.clone()).detach(), wanted)
