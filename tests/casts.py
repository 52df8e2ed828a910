"""Inputs of normalize and activate, and checks of what they cast and save."""

import torch
from helpers import assert_same, randn

from quaver import reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(0, 5), (5, 0), (1, 1), (1, 16), (3, 33), (16, 48), (17, 511), (2, 512), (70, 513),
          (129, 64), (3, 1100)]  # fmt: skip
KINDS = ("silu", "gelu", "gelu_tanh")
ULP = 2.0**-24  # half an ulp of f32: the relative error of one operation


def channel(cols, seed, dtype=torch.float32):
    return (1 + 0.3 * randn(cols, seed=seed)).to(dtype)


def check_cast(got, wanted, what=""):
    """(q, qt, scale, amax), bit for bit."""
    q, qt = got
    for name, a, b in zip(("q", "qt", "scale", "amax"),
                          (q.qdata, qt.qdata, q.scale, q.amax), wanted, strict=True):  # fmt: skip
        assert_same(a, b, f"{what} {name}")


def check_saved(saved, x, block, what=""):
    codes, scale = reference.save_groups(x, block)
    assert_same(saved.codes, codes, f"{what} codes")
    assert_same(saved.scale, scale, f"{what} scales")


def activation_error(x, up, kind):
    """Of f(x) * up: 16 ulp of a gate, and one of each product."""
    return 16 * 2 * ULP * x.double().abs() * (1 if up is None else up.double().abs())
