"""`linear` and `linear_backward` against the ops that they are made of, bit for bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FP8, assert_same, randn

E4M3, E5M2 = FP8
F32, BF16 = torch.float32, torch.bfloat16
ops = torch.ops.quaver
# The leading axes of x, K and N: whole, ragged in each axis, and without values.
SHAPES = [((32,), 48, 16), ((2, 9), 17, 33), ((1,), 5, 3), ((0,), 16, 16), ((3, 0), 7, 20)]

device = pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], name="device"
)(lambda request: request.param)


def cast(x, dtype, scale=None, history=None):
    """q, qt and scale of a matrix, padded."""
    x = F.pad(x, (0, -x.shape[1] % 16, 0, -x.shape[0] % 16))
    q, qt, used, amax = ops.cast_transpose(x, dtype, scale, history)
    return q, qt, used if scale is not None else used + (amax - amax)


def matrix(x):
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def warm(device, amax=3.0):
    """A history that forecasts."""
    return torch.tensor([16.0] + [amax] * 16, device=device)


def product(a, sa, b, sb, bias, dtype, fast, rows, cols):
    return ops.gemm(a, sa, b, sb, bias, dtype, fast)[:rows, :cols]


@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize(("lead", "k", "n"), SHAPES)
def test_linear(lead, k, n, input_major, device):
    x, bias = randn(*lead, k).to(device), randn(n, seed=2).to(device)
    weight = randn(n, k, seed=1).to(device)
    xq, xqt, xs = cast(matrix(x), E4M3, history=warm(device))
    wq, _, ws = cast(weight, E4M3)
    padded = F.pad(bias, (0, -n % 16))
    rows = math.prod(lead)
    wanted = product(xq, xs, wq, ws, padded, BF16, True, rows, n).reshape(*lead, n)
    given = weight.t().contiguous() if input_major else weight
    state, kept = warm(device), warm(device)
    y, q, qt, scale, w_scale = ops.linear(
        x, None, None, given, None, bias, n, E4M3, E4M3, BF16, True, input_major, state
    )
    ops.cast_transpose(matrix(x), E4M3, None, kept)
    for a, b in ((y, wanted), (q, xq), (qt, xqt), (scale, xs), (w_scale, ws), (state, kept)):
        assert_same(a, b)
    y, *nothing = ops.linear(x, xq, xs, wq, ws, bias, n, E4M3, E4M3, BF16, True, input_major, None)
    assert_same(y, wanted)
    assert [t.numel() for t in nothing] == [0] * 4


@pytest.mark.parametrize("input_major", [False, True])
@pytest.mark.parametrize("codes", [None, E4M3])
@pytest.mark.parametrize(("lead", "k", "n"), SHAPES)
def test_linear_backward(lead, k, n, codes, input_major, device):
    rows = math.prod(lead)
    x, dy, weight = (t.to(device) for t in (randn(*lead, k), randn(*lead, n, seed=1), randn(n, k)))
    _, xt, xs = cast(matrix(x), E4M3)
    _, wt, ws = cast(weight, E4M3)
    g, gt, gs = cast(matrix(dy), E5M2)
    channels = torch.exp2(torch.arange(k, device=device) % 3.0)
    dx = product(g, gs, wt, ws, None, F32, False, rows, k).reshape(*lead, k)
    dw = product(gt, gs, xt, xs, None, BF16, False, n, k)
    if input_major:
        dw = product(xt, xs, gt, gs, None, BF16, False, k, n) * channels.to(BF16)[:, None]
        weight = weight.t().contiguous()
    else:
        dw = dw * channels.to(BF16)
    dw = ops.quantize(dw, codes) if codes else (dw, *(dw.new_empty(0, dtype=F32),) * 2)
    rest = channels, n, k, E5M2, E4M3, F32, BF16, codes, input_major, None
    for w in (weight, wt):  # cast again under its scale, and given
        for given in ((None, None, None), (g, gt, gs)):
            got = ops.linear_backward(dy, *given, w, ws, xt, xs, *rest)
            for a, b in zip(got, (dx, *dw), strict=True):
                assert_same(a, b)
    only_x = ops.linear_backward(dy, None, None, None, wt, ws, None, None, *rest)
    assert_same(only_x[0], dx)
    assert [t.numel() for t in only_x[1:]] == [0] * 3
    only_w = ops.linear_backward(dy, None, None, None, None, None, xt, xs, *rest)
    assert only_w[0].numel() == 0
    for a, b in zip(only_w[1:], dw, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
@pytest.mark.parametrize("delayed", [False, True])
def test_a_value_that_is_not_finite_spreads(where, bad, delayed, device):
    tensors = {name: randn(16, 16) for name in ("x", "weight", "dy")}
    tensors[where][3, 5] = bad
    x, weight, dy = (t.to(device) for t in tensors.values())
    history = [warm(device) if delayed else None for _ in range(2)]
    y, _, qt, scale, w_scale = ops.linear(
        x, None, None, weight, None, None, 16, E4M3, E4M3, F32, True, False, history[0]
    )
    dx, dw, *_ = ops.linear_backward(
        dy, None, None, None, weight, w_scale, qt, scale, None, 16, 16, E5M2, E4M3, F32, F32, None,
        False, history[1],
    )  # fmt: skip
    for result, reached in ((y, where != "dy"), (dx, where != "x"), (dw, where != "weight")):
        assert bool(result.isnan().all()) == reached


X, W, G = randn(16, 16), randn(32, 16), randn(16, 32)
Q, ONE = X.to(E4M3), torch.ones(())
AFTER = (32, 16, E5M2, E4M3, F32, F32)
BAD = [
    (lambda: ops.linear(X, Q, None, W, None, None, 32, E4M3, E4M3, F32, True),
     "linear: codes and scale go together"),
    (lambda: ops.linear(X[0, 0], None, None, W, None, None, 32, E4M3, E4M3, F32, True),
     "linear: x must be .*, got no dimensions"),
    (lambda: ops.linear(X, None, None, Q, ONE, None, 64, E4M3, E4M3, F32, True),
     r"linear: codes of a result \[16, 64\] must give \[16, 64\], got \[16, 16\]"),
    (lambda: ops.linear(X, None, None, W, None, ONE[None], 32, E4M3, E4M3, F32, True),
     "linear: bias must have 32 values, got 1"),
    (lambda: ops.linear(X, None, None, W[:, :8], None, None, 32, E4M3, E4M3, F32, True),
     r"linear: weight must be \[32, 16\], got \[32, 8\]"),
    (lambda: ops.linear(X, None, None, W[0], None, None, 32, E4M3, E4M3, F32, True),
     "linear: weight must be a matrix, got 1"),
    (lambda: ops.linear(X, None, None, W, None, None, 32, F32, E4M3, F32, True),
     "dtype must be e4m3 or e5m2, got f32"),
    (lambda: ops.linear_backward(G, None, None, None, W.t(), ONE, None, None, None, *AFTER),
     r"linear_backward: weight must be \[32, 16\], got \[16, 32\]"),
    (lambda: ops.linear_backward(G, Q, None, None, None, None, None, None, None, *AFTER),
     "linear_backward: codes and scale go together"),
    (lambda: ops.linear_backward(G, None, None, None, W, None, None, None, None, *AFTER),
     "linear_backward: weight and weight_scale go together"),
    (lambda: ops.linear_backward(G, None, None, None, None, None, Q, None, None, *AFTER),
     "linear_backward: xt and x_scale go together"),
    (lambda: ops.linear_backward(G, Q, None, ONE, None, None, Q, ONE, None, *AFTER),
     "linear_backward: xt needs codes_t beside codes"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
