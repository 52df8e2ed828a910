"""Subset-Norm in native code: sums of subsets and the fused step against their oracles."""

import math

import pytest
import torch
from helpers import FP8, assert_same, everywhere, randn
from subspaces import HYPER, rules, steps

import quaver as qv
from quaver import reference
from quaver.optim import SubsetNorm

# The fused step


def width_of(shape, size):
    rows, cols = shape[0], math.prod(shape[1:])
    return size or (cols if rows >= cols else -cols)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (300, 700), (700, 300), (3, 5, 7), (1, 1)])
@pytest.mark.parametrize("size", [None, 1, 100, 17000, 10**7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_is_the_oracles(shape, size, dtype):
    """With the same bits on every instruction set and number of threads."""
    if size == 1 and math.prod(shape) > 10**4:
        pytest.skip("the oracle would sum some 200,000 subsets one by one")
    kind = str(dtype).removeprefix("torch.").replace("float", "f")
    rule = rules(kind, SubsetNorm(size=size, dtype=dtype))
    found = everywhere(lambda: [*_values(*steps(rule, shape, count=3))])
    w, m, v = randn(*shape), torch.zeros(shape, dtype=dtype), torch.zeros_like(found[2].flatten())
    lr, (beta1, beta2), *rest = HYPER.values()
    for t in range(1, 4):
        g, width = randn(*shape, seed=t), width_of(shape, size)
        w, m, v = reference.subset_adamw(w, m, v, g, width, t, lr, beta1, beta2, *rest)
    for a, b in zip(found, (w, m, v.view(found[2].shape)), strict=True):
        assert_same(a, b)


def _values(w, state):
    return w, state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *FP8])
@pytest.mark.parametrize("width", [1, 7, 40, -40, 1000, -960, 0])
def test_sums_of_subsets_are_the_oracles(dtype, width):
    grads = [randn(24, 40).to(dtype), randn(24, 40, seed=1).t().to(dtype), torch.zeros(0, 40)]
    grads = [g.clone() if width != -40 else g for g in grads]
    amax, *sums = everywhere(lambda: [(out := qv.ops.subset_sums(grads, [width] * 3))[0], *out[1]])
    for g, found in zip(grads, sums, strict=True):
        wanted = reference.subset_sums(g, width) if g.numel() else torch.zeros(max(-width, 0))
        assert_same(found, wanted)
    assert_same(
        amax, torch.stack([g.float().abs().max() if g.numel() else torch.zeros(()) for g in grads])
    )


def test_one_subset_of_many_pieces_is_the_oracles():
    x = randn(70_001)
    _, (whole, runs) = qv.ops.subset_sums([x, x], [10**9, 20_000])
    assert_same(whole, reference.subset_sums(x, 10**9))
    assert_same(runs, reference.subset_sums(x, 20_000))
    torch.testing.assert_close(whole[0], x.double().square().sum().float(), rtol=1e-5, atol=0)


def test_amaxes_of_subset_sums_are_amaxes():
    scaled = qv.quantize(randn(40, 30) * 3)
    bad = qv.quantize(torch.tensor([[1.0, math.inf]]))
    grads = [randn(7, 30), randn(9), scaled, torch.tensor([[math.nan, 1.0]]), bad]
    amax, sums = qv.ops.subset_sums(grads, [30, 0, -30, 0, 2])
    wanted = qv.ops.amaxes([g.dequantize() if i == 2 else g for i, g in enumerate(grads)])
    assert_same(amax[:3], wanted[:3])
    assert not amax[3:].isfinite().any()
    assert [len(s) for s in sums] == [7, 0, 30, 0, 1]


def test_sums_of_subsets_are_checked():
    for grads, subsets, message in (
        ([torch.ones(6, 4)], [-5], "minus a divisor of the 24 elements, got -5"),
        ([torch.ones(6, 4)], [-(2**63)], "subsets must be above -2\\^63"),
        ([torch.ones(6, 4)], [4, 4], "wanted 1 subsets, got 2"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.quaver.subset_sums(grads, [torch.empty(0)] * len(grads),
                                         [torch.empty(0)] * len(grads), subsets)  # fmt: skip


@pytest.mark.parametrize("how", ["nearest", "stochastic", "remainder", "remainder8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_step_takes_every_rounding(how, dtype):
    rule = rules(second=SubsetNorm(), bf16_master=how)
    start = randn(40, 33).to(dtype)
    found = everywhere(lambda: [steps(rule, start=start, shape=(40, 33), count=3)[0]])[0]
    exact = steps(rules(second=SubsetNorm()), start=start.float(), shape=(40, 33), count=3)[0]
    assert (found.float() - exact).abs().max() < 0.03


def test_native_subsets_are_checked():
    def call(width, count, sums=0):
        w, m, v = torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(count)
        qv.ops.adam_(
            [w], [m], [v], [torch.ones(6, 4)], grad_amax=torch.ones(1),
            steps=[torch.zeros((), dtype=torch.int64)],
            hyper=torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.0]], dtype=torch.float64),
            skipped=torch.zeros((), dtype=torch.int64), subsets=[width],
            subset_sums=() if sums is None else [torch.ones(sums or count)],
        )  # fmt: skip

    call(4, 6), call(-4, 4), call(5, 5), call(10**18, 1)
    for width, count, sums, message in (
        (4, 5, 6, "exp_avg_sq has 5 values, its weight 6 subsets"),
        (-5, 5, 5, "minus a divisor of the 24 elements, got -5"),
        (-(2**63), 5, 5, "subsets must be above -2\\^63"),
        (4, 6, 5, "subset_sums must be 6 contiguous"),
        (4, 6, None, "subsets need the sums of their squared gradients"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(width, count, sums)
