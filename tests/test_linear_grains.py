"""Linear layers with scales of rows and blocks, beyond what holds for every recipe."""

import copy
import dataclasses

import pytest
import torch
from helpers import FP8, assert_same, randn
from linears import check_close, codes, layer, saved, weight_codes

import quaver as qv
from quaver import recipe
from quaver.nn import Linear

E4M3, E5M2 = FP8
FINE = ["rowwise", "blockwise"]


def rule_of(name, **changes):
    base = recipe.get(name)
    return dataclasses.replace(base, name="v", linear=dataclasses.replace(base.linear, **changes))


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_weight_in_bf16(name, dtype):
    chosen = rule_of(name, weight_product="bf16", grad_output=E5M2)
    torch.manual_seed(0)
    net = Linear(200, 144, recipe=chosen)
    x, dy = randn(130, 200, dtype=dtype).requires_grad_(), randn(130, 144, seed=1, dtype=dtype)
    found, y = saved(lambda: net(x), net)
    assert E4M3 not in found and found[dtype] == 130 * 200 * x.element_size()  # x as it is
    y.backward(dy)
    rule = net.rule
    check_close(x.grad, *codes(dy, E5M2, rule), *weight_codes(net, transposed=True), dtype)
    low = [t.detach().bfloat16().t() for t in (dy, x)]
    one = torch.ones(())
    check_close(net.weight.grad, low[0], one, low[1], one, torch.bfloat16)


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_frozen_weights_multiply_like_trained_ones(name, power_of_two):
    from quaver.nn.weight import freeze_weight

    chosen = rule_of(name, power_of_two=power_of_two)
    torch.manual_seed(0)
    net, frozen = Linear(300, 150, recipe=chosen), Linear(300, 150, recipe=chosen)
    frozen.load_state_dict(net.state_dict())
    frozen.weight = freeze_weight(frozen.weight, frozen.rule)
    net.weight.requires_grad_(False)
    again = copy.deepcopy(frozen)
    with torch.no_grad():
        again.weight.qdata.zero_()
    again.load_state_dict(frozen.state_dict())  # to the same codes
    assert_same(again.weight.qdata, frozen.weight.qdata)
    assert_same(again.weight.scale, frozen.weight.scale)
    results = []
    for each in (net, frozen):
        x = randn(20, 300).requires_grad_()
        y = each(x)
        y.backward(randn(20, 150, seed=1))
        results.append((y.detach(), x.grad))
    assert_same(results[0][0], results[1][0])
    if name == "blockwise":  # the transpose of a tile has its codes
        assert_same(results[0][1], results[1][1])
    else:  # cast a second time, from e4m3: half an ulp more for each weight
        error = (results[0][1] - results[1][1]).norm() / results[0][1].norm()
        assert error < 2**-4


def test_a_fine_weight_is_cast_once_in_a_block_of_casts():
    for name in FINE:
        net, x = layer(name, 200, 130), randn(20, 200)
        outside = net(x)
        with qv.cached_weights(net):
            y = net(x)
            y.sum().backward()
        grad = net.weight.grad.clone()
        net.weight.grad = None
        outside.sum().backward()
        assert_same(y.detach(), outside.detach())
        assert_same(net.weight.grad, grad)
