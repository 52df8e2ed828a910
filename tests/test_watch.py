"""qv.watch: statistics of FP8 casts, and modules that compute without FP8 for a while."""

import copy
import dataclasses
import re

import pytest
import torch
from helpers import assert_same, randn
from torch import nn

import quaver as qv
from quaver import models
from quaver.nn import Norm
from quaver.rows import Rows

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = ["tensorwise", "fp8lm-o2", "fp8lm-o1"]


class Net(nn.Module):
    """`spike` multiplies one channel of what the second layer reads."""

    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 11)
        self.spike = 1.0

    def forward(self, x):
        h = torch.tanh(self.first(self.embed(x)))
        factor = torch.ones(h.shape[-1])
        factor[3] = self.spike
        return self.head(torch.tanh(self.second(h * factor)))


def build(recipe="tensorwise", seed=0, **options):
    torch.manual_seed(seed)
    model = qv.convert(Net(), recipe, skip=["head"])
    optimizer = qv.AdamW(model.parameters(), 1e-2, recipe=recipe)
    return model, optimizer, qv.watch(model, **({"every": 2, "fallback": "auto"} | options))


def loss_of(model, step, part=slice(None)):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(11, (2, 12, 5), generator=generator)
    return nn.functional.cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten())


def advance(run, first, last, spike=1.0):
    """Steps first to last - 1; {step: the names that are plain behind it}."""
    model, optimizer, watch = run
    model.spike, plain = spike, {}
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        watch.step()
        plain[step] = watch.plain
    return plain


def state(run):
    model, optimizer, _ = run
    return [*model.state_dict().values(), *(
        v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    )]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_planted_outliers_are_found_and_the_layer_comes_back(recipe):
    run = build(recipe)
    assert advance(run, 0, 7)[6] == []
    found = advance(run, 7, 26, spike=1e7)
    assert found[7] == []  # the next measured step is 8
    assert all(found[step] == ["second"] for step in range(8, 26))
    back = advance(run, 26, 46)
    assert back[45] == []


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("at", [7, 10, 29])
def test_a_run_resumes_with_the_same_bits(recipe, at, tmp_path):
    def whole(run, first):
        for step in range(first, 36):
            advance(run, step, step + 1, spike=1e7 if 6 <= step < 26 else 1.0)

    run = build(recipe)
    for step in range(at):
        advance(run, step, step + 1, spike=1e7 if 6 <= step < 26 else 1.0)
    qv.save(tmp_path / "run.qv", run[0], run[1])
    again = build(recipe, seed=1)
    qv.load(tmp_path / "run.qv", again[0], again[1])
    assert again[2].plain == run[2].plain
    whole(run, at)
    whole(again, at)
    for a, b in zip(state(run), state(again), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_watching_changes_no_bit_and_hooks_only_steps_that_it_measures():
    run, other = build(every=3, fallback="off"), build(every=50, fallback="off")
    other[2].close()
    hooked = []
    for step in range(7):
        hooked.append(bool(run[0].second._forward_hooks))
        assert (advance(run, step, step + 1, spike=1e7)) == {step: []}
        assert run[2].last["second"]["input"]["flushed"] > 0.5
        other[1].zero_grad()
        other[0].spike = 1e7
        loss_of(other[0], step).backward()
        other[1].step()
    assert hooked == [True, False, False, True, False, False, True]
    for a, b in zip(run[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_close_leaves_nothing_behind():
    model, _, watch = run = build()
    plain = set(copy.deepcopy(model).state_dict())
    advance(run, 0, 4, spike=1e7)
    assert watch.plain == ["second"]
    watch.close()
    assert watch.plain == []
    assert set(model.state_dict()) == plain - {"watch_steps", "watch_modules"}
    qv.watch(model).close()


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
def test_layers_with_finer_scales_are_watched(recipe):
    model, optimizer, watch = build(recipe, every=1)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step()
    names = {key for key in watch.last if "first" in str(key) or "second" in str(key)}
    assert names


@pytest.mark.parametrize("recipe", [*RECIPES, "coat", "coat-blockwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_layer_is_torchs(recipe, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(dtype)
    layer = qv.convert(nn.Sequential(copy.deepcopy(linear)), recipe, skip=[])[0]
    usual = copy.deepcopy(layer)
    with torch.no_grad():
        linear.weight.copy_(torch.as_tensor(layer.weight.detach().float()))
    layer.plain = True
    x, wanted_x = (randn(4, 7, 32, dtype=dtype).requires_grad_() for _ in range(2))
    y, wanted = layer(x), linear(wanted_x)
    usual(randn(4, 7, 32, dtype=dtype)).float().square().sum().backward()
    assert y.dtype == wanted.dtype
    # Of sums in another order; coat keeps weights and their gradients in bf16.
    tolerance = 2**-6 if torch.bfloat16 in (dtype, layer.weight.dtype) else 1e-5
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    y.float().square().sum().backward()
    wanted.float().square().sum().backward()
    for got, other in ((x, wanted_x), (layer.bias, linear.bias)):
        torch.testing.assert_close(
            got.grad.float(), other.grad.float(), rtol=4 * tolerance, atol=4 * tolerance
        )
    grad, kind = layer.weight.grad, usual.weight.grad
    assert type(grad) is type(kind)
    assert grad.dtype == kind.dtype
    whole = torch.as_tensor(grad.float())
    bound = 2**-4 if isinstance(grad, qv.ScaledTensor) else 4 * tolerance
    error = (whole - linear.weight.grad.float()).abs()
    assert (error <= bound * linear.weight.grad.float().abs().max()).all()


def test_gradients_accumulate_over_both_kinds_of_layers():
    """A tied weight, of which one layer is plain, and two micro-batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    net[2].weight = net[0].weight
    qv.convert(net, "fp8lm-o2", skip=[])
    net[2].plain = True
    for _ in range(2):
        net(randn(8, 32)).square().mean().backward()
    assert torch.as_tensor(net[0].weight.grad.float()).isfinite().all()


def test_a_plain_layer_forms_chosen_rows():
    torch.manual_seed(0)
    model = qv.convert(Net(), "tensorwise", skip=["head"])
    optimizer = qv.Grass(model, 1e-2, rank=8, every=3, recipe="tensorwise")
    for step in range(2):
        model.second.plain = step == 1
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert isinstance(model.second.weight.grad, Rows)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("smooth", [False, True])
def test_norms_and_mlps_fall_back_too(smooth):
    coat = qv.recipe.get("coat")
    activation = dataclasses.replace(coat.activation, smooth_swiglu=smooth)
    model = qv.convert(llama(), dataclasses.replace(coat, activation=activation))
    watch = qv.watch(model, every=2, fallback="auto")
    norms = [name for name, m in model.named_modules() if isinstance(m, Norm)]
    assert norms
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))

    def steps(count):
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=tokens, labels=tokens).loss.backward()
            model.zero_grad()
            watch.step()

    steps(4)
    assert watch.plain == []
    norm = model.model.layers[1].input_layernorm
    usual = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight[3] = 1e8
    steps(4)
    of_norm = {"model.layers.1.input_layernorm"} | {
        f"model.layers.1.self_attn.{name}_proj" for name in "qkv"
    }
    assert of_norm <= set(watch.plain)
    with torch.no_grad():
        norm.weight.copy_(usual)
    steps(16)
    assert watch.plain == []
    # One channel of the product is far above the others, which its own factor mends.
    mlp = model.model.layers[0].mlp
    kept = mlp.gate_proj.weight.detach().clone()
    with torch.no_grad():
        mlp.gate_proj.weight[5] *= 1e9
    steps(12)
    of_mlp = {"model.layers.0.mlp", "model.layers.0.mlp.down_proj"}
    assert of_mlp & set(watch.plain) == (set() if smooth else of_mlp)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(kept)
    steps(16)
    assert watch.plain == []


def test_a_writer_gets_every_statistic():
    class Writer(dict):
        def add_scalar(self, tag, value, step):
            self[tag, step] = value

    writer = Writer()
    run = build(every=4, writer=writer)
    advance(run, 0, 5)
    assert {step for _, step in writer} == {1, 5}
    assert writer["watch/second/plain", 1] == 0
    assert writer["watch/first.input/amax", 5] > 0
    assert writer["watch/first.grad_output/amax_jump", 5] > 0


def test_a_state_of_other_modules_is_refused():
    model, _, _ = build()
    torch.manual_seed(0)
    other = qv.convert(Net(), "tensorwise", skip=["head", "first"])
    qv.watch(other)
    state = model.state_dict()
    state["watch_modules"] = other.state_dict()["watch_modules"]
    with pytest.raises(RuntimeError, match=r"the shape \[1, 5\], wanted \[2, 5\]"):
        model.load_state_dict(state)


def test_a_state_without_a_watch_is_refused():
    model, _, _ = build()
    torch.manual_seed(0)
    other = qv.convert(Net(), "tensorwise", skip=["head"])
    with pytest.raises(RuntimeError, match="watch_modules"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an int from 1 on, got 0"),
        ({"calm": 1.5}, "calm must be an int from 1 on, got 1.5"),
        ({"fallback": "on"}, 'fallback must be "off" or "auto", got \'on\''),
        ({"flushed": -0.1}, "flushed must be a number from 0 on"),
        ({"saturated": None}, "saturated must be a number from 0 on"),
        ({"kurtosis": float("nan")}, "kurtosis must be a number from 0 on"),
        ({"amax_jump": "10"}, "amax_jump must be a number from 0 on"),
    ],
)
def test_options_are_checked(options, message):
    model = qv.convert(Net(), "tensorwise", skip=["head"])
    with pytest.raises(ValueError, match=re.escape(message)):
        qv.watch(model, **options)
    qv.watch(model)


def test_models_that_cannot_be_watched():
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        qv.watch("model")
    with pytest.raises(ValueError, match="has no FP8 layer"):
        qv.watch(Net())
    model = qv.convert(Net(), "tensorwise", skip=["head"])
    with pytest.raises(TypeError, match="compiled model runs no hooks"):
        qv.watch(torch.compile(model, backend="eager"))
    watch = qv.watch(model)
    with pytest.raises(ValueError, match="watched already"):
        qv.watch(model)
    with pytest.raises(RuntimeError, match="no watched module ran"):
        watch.step()


def test_gpt2_falls_back():
    """transformers' Conv1D holds its weight transposed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    model = qv.convert(transformers.GPT2LMHeadModel(config).eval(), "tensorwise")
    other = qv.restore(copy.deepcopy(model))
    for module in model.modules():
        if isinstance(module, qv.nn.LinearBase):
            module.plain = True
    tokens = torch.arange(16)[None]
    losses = [m(input_ids=tokens, labels=tokens).loss for m in (model, other)]
    assert_same(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_models_of_the_package_are_watched():
    model = models.build(models.load("tiny"))
    qv.convert(model, "coat")
    watch = qv.watch(model)
    assert any(name.endswith("mlp") for name in watch.watched)
