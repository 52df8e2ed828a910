"""COAT's activations with products of blocks: each value is cast once, products read its codes as
they are, and a step keeps the bytes that it keeps under one scale a tensor."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import FP8, assert_same, randn
from linears import check_close, codes, weight_codes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quaver as qv
from quaver import ScaledTensor, models, recipe, reference

E4M3, _ = FP8
NAME = "coat-blockwise"


class Gated(nn.Module):
    def __init__(self, k, f):
        super().__init__()
        self.gate, self.up = nn.Linear(k, f, bias=False), nn.Linear(k, f, bias=False)
        self.down = nn.Linear(f, k, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Casts(TorchDispatchMode):
    """Counts the casts of matrices, by op and granularity."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "quaver::cast_layouts":
            self.found[args[2]] += 1
        elif name.endswith("_layouts") or name in ("quaver::quantize", "quaver::cast_transpose"):
            self.found[name.removeprefix("quaver::")] += 1
        return func(*args, **(kwargs or {}))


def test_no_value_is_cast_twice():
    """Of three layers' inputs and gradients, the fused ops cast all but the first gradient."""
    net = qv.convert(nn.Sequential(nn.RMSNorm(256), Gated(256, 384)), NAME)
    with Casts() as casts:
        y = net(randn(130, 256).requires_grad_())
    assert casts.found == {"normalize_layouts": 1, "activate_layouts": 1, "tile": 3}  # the weights
    with Casts() as casts:
        y.backward(randn(130, 256, seed=1))
    assert casts.found == {"activate_backward_layouts": 1, "block": 1, "tile": 3}


@pytest.mark.parametrize("rows", [128, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_multiply_the_codes_of_a_norm(rows, dtype):
    torch.manual_seed(0)
    net = qv.convert(nn.Sequential(nn.RMSNorm(300, eps=1e-5), nn.Linear(300, 150, False)), NAME)
    norm, linear = net
    nn.init.normal_(norm.weight, 1.0, 0.3)
    x, dy = (randn(rows, n, seed=n, dtype=dtype) for n in (300, 150))
    y = norm(x)
    exact = reference.normalize(x, norm.weight.detach(), None, 1e-5, False)[0]
    q, scale, qt, qt_scale = reference.cast_layouts(exact, E4M3, "block", True, tiles_t=True)
    assert_same(y.qdata, q[:rows, :300].contiguous())
    assert_same(y.scale, scale[:rows].contiguous())
    assert_same(y.qt, qt)
    assert_same(y.qt_scale, qt_scale)
    result = linear(y)
    check_close(result.detach(), y.qdata, y.scale, *weight_codes(linear), dtype)
    result.backward(dy)
    operands = *codes(dy.t(), E4M3, linear.rule), qt[:300, :rows], qt_scale
    check_close(linear.weight.grad, *operands, torch.bfloat16)


def test_a_layer_without_a_fused_producer_keeps_tiles_too():
    linear = qv.convert(nn.Sequential(nn.Linear(300, 150, False)), NAME)[0]
    x = randn(200, 300)
    with qv.saved_activations(linear) as saved:
        y = linear(x)
    assert saved.bytes == 304 * 208 + 4 * 3 * 2  # padded codes and the scales of their tiles
    y.sum().backward()
    ones = torch.ones(150, 200)
    wanted = *codes(ones, E4M3, linear.rule), *codes(x.t(), E4M3, linear.rule, "tile")
    check_close(linear.weight.grad, *wanted, torch.bfloat16)


def llama(name):
    torch.manual_seed(0)
    config = models.Config(vocab=256, dim=128, layers=2, heads=2, kv_heads=2, ffn=384)
    return qv.convert(models.build(config), name)


def step_report(name):
    model = llama(name)
    optimizer = qv.AdamW(model.parameters(), recipe=name)
    tokens = torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16), qv.saved_activations(model) as saved:
        loss = F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    return qv.memory_report(model, optimizer, saved)


def test_a_step_keeps_the_bytes_of_coat():
    """But for the scales of tiles: 4 bytes for 16,384 values."""
    ours, coat = step_report(NAME), step_report("coat")
    operands = 2 * (128 + 128 + 128 + 384) * 4 * 128  # of four layers' products, in two blocks
    assert ours["activation"] <= coat["activation"] + 4 * operands // 128**2
    same = [kind for kind in coat if kind not in ("activation", "activation_linear", "total",
                                                  "activation_by_layer")]  # fmt: skip
    assert {kind: ours[kind] for kind in same} == {kind: coat[kind] for kind in same}


@pytest.mark.slow
def test_it_learns_as_the_recipes_that_it_joins():
    def train(name):
        model, losses = llama(name), []
        optimizer = qv.AdamW(model.parameters(), lr=3e-3, recipe=name)
        generator = torch.Generator().manual_seed(2)
        table = torch.randint(256, (256,), generator=generator)  # the next token of each
        for _ in range(60):
            tokens = torch.randint(256, (8, 33), generator=generator)
            for i in range(1, 33):
                tokens[:, i] = torch.where(
                    torch.rand(8, generator=generator) < 0.8, table[tokens[:, i - 1]], tokens[:, i]
                )
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(tokens[:, :-1]).float()
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses[-10:]) / 10, losses[0]

    found = {name: train(name) for name in (NAME, "coat", "blockwise", "bf16")}
    last, first = found[NAME]
    assert last < 0.7 * first
    for name, (other, _) in found.items():
        assert last == pytest.approx(other, rel=0.01), (name, found)


def test_gradients_between_layers_are_codes_of_blocks():
    net = qv.convert(Gated(256, 384), NAME)
    seen = {}
    for name in ("gate", "up"):
        getattr(net, name).register_forward_hook(
            lambda layer, arguments, y, name=name: (
                y.register_hook(lambda g: seen.__setitem__(name, g)) and None
            )
        )
    net(randn(130, 256).requires_grad_()).sum().backward()
    for g in seen.values():
        assert isinstance(g, ScaledTensor) and g.qdata.dtype == E4M3
        assert g.qlayout.grain == "block" and g.scale.shape == (130, 3)
        assert g.qt.shape == (384, 144) and g.qt_scale.shape == (384, 2)
        wanted = g.dequantize(torch.float64)
        other = reference.dequantize(g.qt, g.qt_scale, torch.float32, "block").double()
        # Both are roundings of one value, under powers of two: alike but for subnormal codes.
        assert (other.t()[:130] == wanted).float().mean() > 0.9


def test_the_recipe_is_coats_but_for_its_products():
    ours, coat = recipe.get(NAME), recipe.get("coat")
    assert ours.activation == coat.activation and ours.bf16_master == coat.bf16_master
    assert (ours.linear.grain, ours.linear.kept, ours.linear.power_of_two) == (
        "block",
        "tile",
        True,
    )
