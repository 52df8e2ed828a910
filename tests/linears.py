"""Linear layers of tests, and checks of their codes and products."""

import dataclasses

import torch
from helpers import FP8, randn

from quaver import ScaledTensor, recipe, reference
from quaver.nn import Linear

E4M3, E5M2 = FP8
RECIPES = [name for name in recipe.names() if recipe.get(name).linear is not None]


def layer(name="fp8lm-o2", k=48, n=32, bias=True, seed=0):
    torch.manual_seed(seed)
    return Linear(k, n, bias, recipe=name)


def plain(t):
    return t.dequantize() if isinstance(t, ScaledTensor) else t


def variant(**changes):
    base = recipe.get("fp8lm-o2")
    return dataclasses.replace(base, name="v", linear=dataclasses.replace(base.linear, **changes))


def codes(x, dtype, rule, grain=None):
    """The codes and scales of x as a product's operand."""
    return reference.quantize(x, dtype, None, grain or rule.grain, 128, rule.power_of_two)[:2]


def kept_grain(rule):
    """The grain of the transposed input that backward keeps."""
    return rule.grain if rule.kept == "grain" else rule.kept


def weight_codes(net, transposed=False):
    """Those of the weight [N, K], or of its transpose."""
    w = net.weight.detach()
    if isinstance(w, ScaledTensor):
        q, scale = reference.fp8_weight(w.qdata, w.scale)
        return (q.t() if transposed else q), scale
    return codes(w.t() if transposed else w, E4M3, net.rule, net.rule.weight_grain)


def check_close(got, q1, s1, q2, s2, dtype, addend=None):
    """Within the roundings of one product to `dtype`; the codes themselves are given."""
    wanted = reference.gemm(q1, s1, q2, s2, addend)
    bound = reference.gemm_tolerance(q1, s1, q2, s2, dtype, addend)
    assert ((got.double() - wanted).abs() <= bound).all()


def assert_copies_fresh(net):
    x = randn(5, net.in_features, seed=9)
    y = net.eval()(x).detach()
    bias = None if net.bias is None else net.bias.detach()
    check_close(y, *codes(x, E4M3, net.rule), *weight_codes(net), torch.float32, bias)
    net.train()


def saved(function, *modules):
    """Storages that autograd saves while `function` runs, without the modules' parameters: {dtype:
    bytes}."""
    found = {}
    seen = {
        p.untyped_storage().data_ptr()
        for module in modules
        for p in module.parameters()
        if not isinstance(p, ScaledTensor)
    }

    def pack(t):
        key = t.untyped_storage().data_ptr()
        if key not in seen:
            found[t.dtype] = found.get(t.dtype, 0) + t.untyped_storage().nbytes()
        seen.add(key)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return found, result
