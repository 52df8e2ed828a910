"""What a rank computes between messages: shared scales, buckets, sums of shards."""

import math

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, everywhere, randn, random_bits

import quaver as qv
from quaver import ops, reference

E4M3, E5M2 = FP8
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("mu", [None, 1.0, 0.5, 0.35355339, 1e-30])
def test_shared_scales_are_those_of_the_oracle(dtype, mu):
    columns = [
        [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [0.0, 7.0, 7.0],
        [1e30, 1e-30, 1.0], [1e38, 3e38, 2e38], [448.0, 448.0, 448.0], [1e-40, 0.0, 1e-41],
        [NAN, 1.0, 1.0], [1.0, INF, 1.0], [1.0, 1.0, NAN], [449.0, 447.9, 1.0],
    ]  # fmt: skip
    amaxes = torch.tensor(columns).t().contiguous()
    given = None if mu is None else torch.full((len(columns),), mu)
    scales, sum_scales = ops.share_scales(amaxes, dtype, given)
    for i, column in enumerate(columns):
        # Sums and quotients beyond f32 stop at its maximum.
        wanted = reference.shared_scale(amaxes[:, i].tolist(), dtype, mu)
        if sum(column) > 3e38 or (mu and max(column) / mu > 3e38):
            continue
        assert scales[i] == wanted[0], (column, mu)
        assert sum_scales[i] == wanted[1], (column, mu)
    assert (scales > 0).all() and sum_scales.isfinite().all()


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
def test_a_sum_cannot_overflow_its_scale(dtype, ranks):
    # Every rank has the same largest value, of every mantissa: rounding up on all of them at once.
    top = torch.linspace(1, 2, 257) * 3.0
    for amax in top:
        scales, sum_scales = ops.share_scales(amax.expand(ranks, 1).contiguous(), dtype)
        q = ops.pack([amax[None]], dtype, 16, scales)
        shards = q.expand(ranks, 16).contiguous()
        out, seen, _ = ops.reduce_shards(shards, [1], 0, scales, sum_scales)
        total = ranks * q[0].float() * scales[0]
        assert seen[0] == total
        assert total <= reference.scale_max(dtype) * sum_scales[0]
        step = 0.0625 if dtype == E4M3 else 0.125
        assert abs(out[0].float() * sum_scales[0] - total) <= step * total


SIZES = [5, 0, 16, 700, 1, 4096 * 5 + 3]


def tensors(dtype=torch.float32):
    return [randn(n, seed=i).mul(10.0 ** (i - 3)).to(dtype) for i, n in enumerate(SIZES)]


@pytest.mark.parametrize("dtype", FP8)
def test_pack_encodes_each_tensor_at_its_place(dtype):
    plain = tensors()
    low = [qv.quantize(t, dtype) for t in tensors(torch.bfloat16)]
    mixed = [a if i % 2 else b for i, (a, b) in enumerate(zip(plain, low, strict=True))]
    scales = torch.tensor([0.5**i for i in range(len(mixed) - 1)] + [0.3])
    length = sum(map(ops.bucket_length, SIZES)) + 48
    (bucket,) = everywhere(lambda: [ops.pack(mixed, dtype, length, scales)])
    wanted = torch.zeros(length, dtype=dtype)
    at = 0
    for t, scale in zip(mixed, scales, strict=True):
        value = t.dequantize() if isinstance(t, qv.ScaledTensor) else t
        wanted[at : at + t.numel()] = reference.encode(value.float() / scale, dtype)
        at += ops.bucket_length(t.numel())
    assert_same(bucket, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_of_plain_tensors_copies(dtype):
    plain = tensors(dtype)
    bucket = ops.pack(plain, dtype, sum(map(ops.bucket_length, SIZES)))
    at = 0
    for t in plain:
        assert_same(bucket[at : at + t.numel()], t)
        at += ops.bucket_length(t.numel())


def test_a_changed_power_of_two_scale_rounds_no_normal_code():
    """A gradient that is FP8 already is not rounded again by the shared scale."""
    t = qv.quantize(randn(4096))
    for factor in (1, 2, 8):
        again = ops.pack([t], E4M3, 4096, (t.scale * factor).reshape(1))
        normal = t.qdata.float().abs() >= factor * 2.0**-6
        assert_same((again.float() * t.scale * factor)[normal], t.dequantize()[normal])


def buckets(ranks, dtype):
    """Codes of every rank, [ranks, length], and scales."""
    scales = torch.tensor([2.0 ** (i - 3) for i in range(len(SIZES))])
    length = sum(map(ops.bucket_length, SIZES)) + 32
    rows = []
    for r in range(ranks):
        parts = [random_bits(n, 10 * r + i).clamp(-3, 3).nan_to_num(0) for i, n in enumerate(SIZES)]
        own = scales if dtype in FP8 else None
        rows.append(ops.pack([p.to(torch.float32) for p in parts], dtype, length, own))
    return torch.stack(rows), scales if dtype in FP8 else None


def oracle(shards, scales, sum_scales, first, out_dtype):
    ranks, length = shards.shape
    index = torch.full((first + length,), -1)
    at = 0
    for i, n in enumerate(SIZES):
        index[at : at + ops.bucket_length(n)] = i
        at += ops.bucket_length(n)
    index = index[first:]
    one = torch.ones(len(SIZES) + 1)
    scale = one if scales is None else torch.cat([scales, one[:1]])
    sum_scale = one if sum_scales is None else torch.cat([sum_scales, one[:1]])
    total = shards[0].float() * scale[index]
    for r in range(1, ranks):
        total = total + shards[r].float() * scale[index]
    amax = torch.stack([
        total[index == i].abs().amax() if (index == i).any() else torch.zeros(())
        for i in range(len(SIZES))
    ])  # fmt: skip
    value = total / sum_scale[index]
    scaled = out_dtype in reference.FORMATS
    out = reference.encode(value, out_dtype) if scaled else value.to(out_dtype)
    if out_dtype in FP8:
        at_max = out.float().abs() == torch.finfo(out_dtype).max
        saturated = [int((at_max & (index == i)).sum()) for i in range(len(SIZES))]
    else:
        saturated = [0] * len(SIZES)
    return out, amax, torch.tensor(saturated, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_shards_are_summed_in_rank_order(dtype, keep, ranks):
    whole, scales = buckets(ranks, dtype)
    out_dtype = torch.float32 if keep else dtype
    sum_scales = None if keep else torch.linspace(0.01, 0.9, len(SIZES))
    results = []
    for first, last in ((0, 736), (736, 5024), (5024, whole.shape[1])):
        shards = whole[:, first:last].contiguous()
        got = everywhere(
            lambda shards=shards, first=first: list(
                ops.reduce_shards(shards, SIZES, first, scales, sum_scales, out_dtype)
            )
        )
        wanted = oracle(shards, scales, sum_scales, first, out_dtype)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)
        results.append(got)
    # How a bucket is cut decides nothing.
    out, amax, saturated = everywhere(
        lambda: list(ops.reduce_shards(whole, SIZES, 0, scales, sum_scales, out_dtype))
    )
    assert_same(torch.cat([r[0] for r in results]), out)
    assert_same(torch.stack([r[1] for r in results]).amax(0), amax)
    # Vectors of padding belong to nobody's count.
    assert_same(torch.stack([r[2] for r in results]).sum(0).int(), saturated)


def heavy(shape, seed):
    """Student's t of 3 degrees of freedom, rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((5, *shape), generator=generator)
    value = normal[0] / normal[1:4].square().mean(0).sqrt()
    return value * torch.exp2(normal[4, :, :1])


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_mean_of_heavy_tailed_gradients_is_two_roundings_off(ranks):
    """FP8-LM's figure 7; bench_all_reduce.py has the whole table."""
    squares = {"two_shot": 0.0, "ring": 0.0}
    whole = 0.0
    for seed in range(3):
        shared = heavy((256, 256), seed)
        values = [shared + 0.3 * heavy((256, 256), 100 * (r + 1) + seed) for r in range(ranks)]
        mean = sum(v.double() for v in values) / ranks
        q, scale, _ = reference.two_shot(values, E4M3)
        ring = reference.ring_mean(values, E4M3, ranks**-0.5)
        squares["two_shot"] += float((q.double() * scale - mean).square().sum())
        squares["ring"] += float((ring - mean).square().sum())
        whole += float(mean.square().sum())
    error = {way: math.sqrt(square / whole) for way, square in squares.items()}
    print(f"{ranks} ranks: two_shot {error['two_shot']:.4f}, ring {error['ring']:.4f}")
    assert error["two_shot"] <= 0.037
    assert ranks < 4 or error["two_shot"] <= 0.6 * error["ring"]


def test_what_is_not_finite_shows_in_the_amax():
    shards = torch.ones(3, 32, dtype=torch.bfloat16)
    shards[1, 3], shards[2, 20] = NAN, INF
    out, amax, _ = ops.reduce_shards(shards, [16, 16])
    assert amax[0].isnan() and amax[1] == INF
    assert out[3].isnan() and out[20] == INF and out[0] == 3


def test_bad_arguments_are_named():
    x, one = randn(16), torch.ones(1)
    codes = ops.pack([x], E4M3, 16, one)
    for call, message in (
        (lambda: ops.pack([], E4M3, 16, one), "no tensors"),
        (lambda: ops.pack([x], E4M3, 16), "a bucket of e4m3 needs scales"),
        (lambda: ops.pack([x], E4M3, 0, one), "1 tensors take 16 values, the bucket has 0"),
        (lambda: ops.pack([x], E4M3, 17, one), "multiple of 16, got 17"),
        (lambda: ops.pack([x], E4M3, -1, one), "length must not be negative, got -1"),
        (lambda: ops.pack([x], torch.int32, 16, one), "dtype must be"),
        (lambda: ops.pack([x, x], E4M3, 32, one), "scales must be 2 contiguous float32, got 1"),
        (lambda: ops.share_scales(x, E4M3), r"amaxes must be \[ranks, tensors\], got 1 axes"),
        (lambda: ops.share_scales(x[None], torch.float16), "must be e4m3 or e5m2, got f16"),
        (lambda: ops.share_scales(x[None], E4M3, one), "mu must be 16 contiguous float32, got 1"),
        (lambda: ops.share_scales(x[:0, None], E4M3), "got 0 ranks"),
        (lambda: ops.reduce_shards(codes, [16]), r"shards must be \[ranks, length\], got 1 axes"),
        (lambda: ops.reduce_shards(codes[None, :5].contiguous(), [5]), "multiple of 16, got 5"),
        (lambda: ops.reduce_shards(codes[None], [16], 8), "first must be a multiple of 16"),
        (lambda: ops.reduce_shards(codes[None], [-1]), "sizes must not be negative, got -1"),
        (lambda: ops.reduce_shards(codes[None], [16], 0, x), "scales must be 1 contiguous"),
        (lambda: ops.reduce_shards(codes[None], [16], dtype=torch.bfloat16), "f32 or that of the"),
    ):
        with pytest.raises(REFUSAL, match=message):
            call()
