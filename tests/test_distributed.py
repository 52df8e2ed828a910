"""The mean over ranks, by real processes over gloo, against the oracle."""

import math

import pytest
import ranks
import torch
from helpers import FP8, assert_same

import quaver as qv
from quaver import reference
from quaver.distributed import all_reduce_mean, reduce_scatter_mean

E4M3, E5M2 = FP8
SHAPES = [(33, 17), (5,), (64, 128), (1,), (300, 7), ()]


def gradients(rank, seed=0):
    """Heavy-tailed, with as much noise of each rank; every tensor has its own size."""
    found = []
    for i, shape in enumerate(SHAPES):
        common = torch.Generator().manual_seed(100 * seed + i)
        own = torch.Generator().manual_seed(100 * seed + i + 10_000 * (rank + 1))
        value = torch.zeros(shape)
        for generator in (common, own):
            normal = torch.randn((4, *shape), generator=generator)
            value += normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t of 3 degrees
        found.append(value * 10.0 ** (i - 3))
    return found


def parts(tensors):
    return [(t.qdata.view(torch.uint8), t.scale, t.amax) for t in tensors]


def two_shot(rank, dtype, bucket):
    tensors = gradients(rank)
    found = []
    for i in range(0, len(tensors), bucket):
        found += all_reduce_mean(tensors[i : i + bucket], dtype)
    return parts(found)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_two_shot_has_the_oracles_bits_on_every_rank_and_in_every_bucket(size):
    results = ranks.run(size, two_shot, E4M3, len(SHAPES))
    every = [gradients(rank) for rank in range(size)]
    for i, got in enumerate(results[0]):
        q, scale, amax = reference.two_shot([g[i] for g in every], E4M3)
        assert_same(got[0].view(E4M3), q)
        assert_same(got[1], scale)
        assert_same(got[2], amax)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            for x, y in zip(a, b, strict=True):
                assert_same(x, y)
    if size == 3:
        for bucket in (1, 2):
            for a, b in zip(results[0], ranks.run(size, two_shot, E4M3, bucket)[0], strict=True):
                for x, y in zip(a, b, strict=True):
                    assert_same(x, y)


def even(rank):
    """A tensor that a ring of 3 cuts where the oracle does."""
    return torch.randn(48, 16, generator=torch.Generator().manual_seed(rank)) + 1.0


def other_forms(rank):
    """ring, owners, f32 results, FP8 inputs, what is not finite."""
    tensors = gradients(rank)
    owners = [i % 3 for i in range(len(tensors))]
    low = [qv.quantize(t) for t in tensors]
    bad = gradients(rank)
    if rank == 1:
        bad[2][3, 4], bad[4][5, 6] = float("nan"), float("-inf")
    return {
        "ring": parts(all_reduce_mean(tensors, E4M3, "ring")),
        "even ring": parts(all_reduce_mean([even(rank)], E4M3, "ring")),
        "mu": parts(all_reduce_mean([even(rank)], E4M3, "ring", mu=torch.tensor([0.25]))),
        "e5m2": parts(all_reduce_mean(tensors, E5M2)),
        "low": parts(all_reduce_mean(low)),
        "bf16": parts(all_reduce_mean([t.bfloat16() for t in tensors])),
        "bad": parts(all_reduce_mean(bad)),
        "bad ring": parts(all_reduce_mean(bad, algorithm="ring")),
        "owned": [None if t is None else parts([t])[0] for t in
                  reduce_scatter_mean(tensors, owners, result=E4M3)],
        "f32": reduce_scatter_mean(tensors, owners),
        "bad f32": [t if t is None else t.isnan().any() for t in reduce_scatter_mean(bad, owners)],
        "nobody": reduce_scatter_mean(tensors[:1], [2]),
        "none": all_reduce_mean([]),
    }  # fmt: skip


def test_other_forms():
    size = 3
    results = ranks.run(size, other_forms)
    every = [gradients(rank) for rank in range(size)]
    columns = [list(column) for column in zip(*every, strict=True)]
    for name in ("ring", "even ring", "mu", "e5m2", "low", "bf16", "bad", "bad ring"):
        for other in results[1:]:
            for a, b in zip(results[0][name], other[name], strict=True):
                for x, y in zip(a, b, strict=True):
                    assert_same(x, y, name)
    rows = [even(rank) for rank in range(size)]
    shared, _ = reference.shared_scale([v.abs().amax().item() for v in rows], E4M3)
    for name, mu in (("even ring", 3**-0.5), ("mu", 0.25)):
        q, scale, _ = results[0][name][0]
        # The scale is a power of two: that of the paper's mu, or up to twice as large.
        power = 2.0 ** round(math.log2(shared / (scale * size)))
        assert mu / 2 < power <= mu
        # Two codes differ by 2^-4 or more; a third is rounded in the scale.
        wanted = reference.ring_mean(rows, E4M3, power)
        torch.testing.assert_close(
            q.view(E4M3).double() * scale.double(), wanted, rtol=1e-7, atol=0
        )
    for i, values in enumerate(columns):
        q, scale, amax = reference.two_shot(values, E5M2)
        assert_same(results[0]["e5m2"][i][0].view(E5M2), q)
        q, scale, amax = reference.two_shot([v.bfloat16().float() for v in values], E4M3)
        assert_same(results[0]["bf16"][i][0].view(E4M3), q)
        # FP8 gradients change their scale for the shared one, which rounds subnormals alone.
        q, scale, amax = reference.two_shot(values, E4M3)
        mean = sum(v.double() for v in values) / size
        low = results[0]["low"][i]
        # Two roundings by 2^-4 of what is rounded, and those of subnormals.
        magnitude = sum(v.double().abs() for v in values) / size
        floor = max(v.abs().amax() for v in values) * 2.0**-16
        error = (low[0].view(E4M3).double() * low[1] - mean).abs()
        assert (error <= 0.13 * magnitude + floor).all()
        assert_same(low[1], scale)
        bad = results[0]["bad"][i][2], results[0]["bad ring"][i][2]
        assert all(a.isnan() == (i in (2, 4)) for a in bad)
        for rank in range(size):
            mine, f32 = results[rank]["owned"][i], results[rank]["f32"][i]
            if rank != i % 3:
                assert mine is None and f32 is None
                continue
            assert_same(mine[0].view(E4M3), q)
            assert_same(mine[1], scale)
            assert_same(mine[2], amax)
            total, _, _ = reference.two_shot(values, E4M3, torch.float32)
            assert_same(f32, total / size)
            assert results[rank]["bad f32"][i] == (i in (2, 4))
    assert [r["nobody"][0] is None for r in results] == [True, True, False]
    assert all(r["none"] == [] for r in results)


def test_a_world_of_one_needs_no_group():
    tensors = gradients(0)
    for algorithm in ("two_shot", "ring"):
        for t, mean in zip(tensors, all_reduce_mean(tensors, algorithm=algorithm), strict=True):
            q, _, amax = reference.two_shot([t], E4M3)
            assert mean.shape == t.shape and mean.dtype == t.dtype
            assert_same(mean.qdata, q)
            assert_same(mean.amax, amax)
    assert_same(reduce_scatter_mean(tensors, [0] * 6, result=E4M3)[2].qdata, mean_codes(tensors[2]))


def mean_codes(t):
    return reference.two_shot([t], E4M3)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: all_reduce_mean([x], torch.float16), "must be float8_e4m3fn or float8_e5m2"),
        (lambda x: all_reduce_mean([x], algorithm="tree"), "one of .*ring.*, got 'tree'"),
        (lambda x: all_reduce_mean([x], mu=x), "mu goes with ring, got algorithm 'two_shot'"),
        (lambda x: all_reduce_mean([x, x.double()]), "tensor 1 must be of .*, got torch.float64"),
        (lambda x: all_reduce_mean([x, x.to("meta")]), "on one device, got cpu and meta"),
        (lambda x: reduce_scatter_mean([x], [1]), r"wanted 1 ranks below 1, got \[1\]"),
        (lambda x: reduce_scatter_mean([x], [0], result=E5M2), "result must be float32 or"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4))
