"""Linear layers that do not train: products, gradients of their input, memory, moves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, randn
from torch import nn

import quaver as qv
from quaver.nn import FrozenLinear
from quaver.nn.frozen import freeze_linear

FORMATS = ("nf4", "fp8", "keep")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_decoded_weight(format, input_major, dtype):
    weight, bias = randn(33, 70, seed=1).to(dtype), randn(70 if input_major else 33, seed=2)
    layer = FrozenLinear(weight, bias.to(dtype), format, input_major)
    decoded = layer.dequantize()
    assert decoded.dtype == dtype and decoded.shape == weight.shape
    if format == "keep":
        assert_same(decoded, weight)
    if format == "nf4":
        assert_same(decoded, qv.quantize_nf4(weight).dequantize())
    w = decoded.t() if input_major else decoded
    x = randn(2, 5, w.shape[1], seed=3).to(dtype).requires_grad_()
    y = layer(x)
    assert_same(y, F.linear(x, w, bias.to(dtype)))
    dy = randn(*y.shape, seed=4).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_same(dx, dy @ w)
    assert (layer.in_features, layer.out_features) == (w.shape[1], w.shape[0])


@pytest.mark.parametrize("format", FORMATS)
def test_backward_saves_nothing(format):
    layer, saved = FrozenLinear(randn(64, 64), None, format), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        layer(randn(3, 64).requires_grad_())
    assert saved == [] and list(layer.parameters()) == []


def test_bytes_an_element():
    weight = torch.empty(4096, 11008, device="meta", dtype=torch.bfloat16)
    found = {
        format: FrozenLinear(weight, None, format).nbytes / weight.numel() for format in FORMATS
    }
    print({format: round(b, 5) for format, b in found.items()})
    assert found["nf4"] <= 0.5163 and found["fp8"] <= 1.001 and found["keep"] == 2


@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_a_cast_of_the_model_leaves_the_codes(format):
    layer = FrozenLinear(randn(64, 200), randn(64), format)
    before = layer.dequantize(torch.float32)
    layer.to(torch.bfloat16)
    assert_same(layer.dequantize(torch.float32), before)
    assert layer.bias.dtype == torch.bfloat16
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert_same(twin.dequantize(), layer.dequantize())
    assert layer.to("meta").codes.is_meta


def test_autocast_decides_the_type():
    layer = FrozenLinear(randn(16, 32), randn(16))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(randn(4, 32))
    assert_same(y, layer(randn(4, 32).bfloat16()))


def test_every_layer_of_a_module_is_replaced_once():
    class Conv1D(nn.Module):
        """Has the weight of transformers' class of that name."""

        def __init__(self):
            super().__init__()
            self.nf, self.weight = 8, nn.Parameter(randn(4, 8))
            self.bias = nn.Parameter(randn(8))

        def forward(self, x):
            return x @ self.weight + self.bias

    shared = nn.Linear(8, 8)
    model = nn.Sequential(Conv1D(), shared, nn.Sequential(shared), nn.LayerNorm(8))
    x = randn(3, 4)
    wanted = model(x)
    assert freeze_linear(model, "keep", qv.structure.is_conv1d) == 2
    assert model[1] is model[2][0] and isinstance(model[0], FrozenLinear)
    torch.testing.assert_close(model(x), wanted.detach())


@pytest.mark.parametrize("format", FORMATS)
def test_it_compiles_in_one_graph(format):
    layer, x = FrozenLinear(randn(32, 64), randn(32), format), randn(3, 64).requires_grad_()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x))
    dy = randn(3, 32, seed=2)
    (dx,), (wanted,) = (torch.autograd.grad(t, x, dy) for t in (y, layer(x)))
    torch.testing.assert_close(dx, wanted)


def test_the_report_counts_codes_as_weights():
    layer = FrozenLinear(randn(64, 64).bfloat16(), randn(64).bfloat16())
    report = qv.memory_report(nn.Sequential(layer))
    assert report["weight"] == layer.nbytes + 128 and report["other"] == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="format must be one of nf4, fp8, keep, got 'int8'"):
        FrozenLinear(randn(4, 4), None, "int8")
    with pytest.raises(ValueError, match="weight must be a matrix, got 1 dimensions"):
        FrozenLinear(randn(4))
    with pytest.raises(TypeError, match=r"weight must be float32, .* got torch.float64"):
        FrozenLinear(randn(4, 4).double())
    with pytest.raises(TypeError, match="plain tensor, got ScaledTensor; dequantize it first"):
        FrozenLinear(qv.quantize(randn(4, 4)))
    layer = FrozenLinear(randn(4, 8))
    with pytest.raises(ValueError, match=r"input's last axis must be 8, got \[2, 4\]"):
        layer(randn(2, 4))
    with pytest.raises(TypeError, match=r"input must be float32, .* got torch.int64"):
        layer(torch.zeros(2, 8, dtype=torch.int64))
