"""Linear: forward, dgrad and wgrad against f64 over the codes that were multiplied, and shapes."""

import pytest
import torch
from helpers import FP8, assert_same, randn
from linears import RECIPES, check_close, codes, kept_grain, layer, plain, saved, weight_codes

from quaver import ScaledTensor, reference

E4M3, E5M2 = FP8


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
