"""Every value to and from FP8, against ml_dtypes and against the definition of the formats."""

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import FP8, assert_same, bits, everywhere, isa, randn, random_bits

import quaver as qv
from quaver import reference

ONE = torch.ones(())
ML = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}


def every(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def encode(x, dtype, scale=ONE, **options):
    return qv.quantize(x, dtype, scale=scale, **options).qdata


def ml_encode(x, dtype):
    """ml_dtypes, with its overflow (NaN in e4m3, infinity in e5m2) mapped to saturation."""
    top = torch.finfo(dtype).max
    with np.errstate(invalid="ignore"):  # a NaN stays one
        codes = np.clip(x.float().numpy(), -top, top).astype(ML[dtype])
    return torch.from_numpy(codes.view(np.uint8))


def assert_like_ml(x, dtype):
    got = encode(x, dtype)
    nan = x.isnan()
    assert (bits(got)[nan] == 0x7F).all()
    assert got.float()[~nan].isfinite().all()
    assert_same(bits(got)[~nan], ml_encode(x, dtype)[~nan])


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", qv._C.available_isas())
def test_every_16_bit_value_encodes_as_ml_dtypes(source, dtype, name):
    with isa(name):
        assert_like_ml(every(source), dtype)


@pytest.mark.parametrize("dtype", FP8)
def test_ten_million_random_floats_encode_as_ml_dtypes(dtype):
    assert_like_ml(random_bits(10_000_000), dtype)


@pytest.mark.parametrize("dtype", FP8)
def test_floats_around_every_tie_encode_as_ml_dtypes(dtype):
    table = reference.magnitudes(dtype)
    middle = ((table[1:] + table[:-1]) / 2).float()
    edge = torch.cat([table.float(), middle, torch.tensor([torch.finfo(dtype).max * 1.03125])])
    around = torch.cat([edge, edge.nextafter(edge * 2), edge.nextafter(edge * 0)])
    assert_like_ml(torch.cat([around, -around]), dtype)


@pytest.mark.parametrize("dtype", [*FP8, torch.float16])
def test_encode_is_the_nearest_value(dtype):
    x = torch.cat([random_bits(200_000, 1), every(torch.bfloat16).float()])
    assert_same(encode(x, dtype), reference.encode(x, dtype))


@pytest.mark.parametrize("x", [float("inf"), 2.0**127, 500.0, 448.0, 470.0])
def test_saturation_is_signed_and_shows_in_the_amax(x):
    for sign in (1, -1):
        t = qv.quantize(torch.tensor([sign * x]), scale=ONE)
        assert t.qdata.item() == sign * torch.finfo(t.qdata.dtype).max
        assert t.amax.item() == x


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", FP8)
def test_every_code_decodes_exactly(dtype, out):
    q = torch.arange(256).to(torch.uint8).view(dtype)
    (got,) = everywhere(lambda: [torch.ops.quaver.dequantize(q, ONE, out, "tensor", 128)])
    finite = q.float().isfinite()
    assert_same(got[finite], q.to(out)[finite])
    assert_same(got.isnan(), q.float().isnan())


def test_every_f16_code_decodes_exactly():
    q = every(torch.float16)
    got = everywhere(lambda: [torch.ops.quaver.dequantize(q, ONE, torch.float32, "tensor", 128)])
    assert_same(got[0], q.float())


@pytest.mark.parametrize("dtype", [*FP8, torch.float16])
def test_a_decoded_value_encodes_to_its_code(dtype):
    q = reference.encode(reference.magnitudes(dtype), dtype)
    assert_same(encode(q.float(), dtype), q)
    assert_same(encode(-q.float(), dtype), reference.encode(-q.float(), dtype))


@pytest.mark.parametrize("dtype", [*FP8, torch.float16])
def test_stochastic_rounding_by_its_definition(dtype):
    for seed in (0, 7, 2**40 + 3):
        x = random_bits(10_001, seed)
        got = everywhere(lambda x=x, s=seed: [encode(x, dtype, rounding="stochastic", seed=s)])
        assert_same(got[0], reference.encode_stochastic(x, dtype, seed))


@pytest.mark.parametrize("dtype", FP8)
def test_stochastic_rounding_is_unbiased(dtype):
    n = 200_000
    smallest = reference.magnitudes(dtype)[1].item()
    for x in (1.0625 + 1 / 64, -3.3, 0.3 * smallest, 2.7 * smallest, 100.1):
        got = encode(torch.full((n,), x), dtype, rounding="stochastic", seed=3).double()
        low, high = got.min().item(), got.max().item()
        assert low < x < high  # two neighbours
        assert len(got.unique()) == 2
        p = (x - low) / (high - low)
        sigma = (high - low) * (p * (1 - p) / n) ** 0.5
        assert abs(got.mean().item() - x) < 4 * sigma


def test_stochastic_bits_depend_on_seed_and_index_only():
    x = randn(100_000)

    def cast(x, seed):
        return bits(encode(x, FP8[0], rounding="stochastic", seed=seed))

    whole = cast(x, 1)
    assert_same(cast(x[:777], 1), whole[:777])
    assert_same(cast(x.view(250, 400), 1).flatten(), whole)
    assert_same(cast(x.to(torch.float64).float(), 1), whole)
    assert (cast(x, 2) != whole).float().mean() > 0.1


def values(n, seed=0):
    """Finite values of 30 binades, with zeros."""
    x = torch.ldexp(randn(n, seed=seed), torch.randint(-20, 10, (n,)))
    x[::97] = 0
    return x


@pytest.mark.parametrize("n", [0, 1, 15, 511, 513, 100_003])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_gives_the_same_bits_everywhere(source, n):
    x = values(n).to(source)
    for dtype in (*FP8, torch.float16):
        for given in (None, ONE * 0.3):

            def cast(dtype=dtype, given=given):
                t = qv.quantize(x, dtype, scale=given)
                return [t.qdata, t.scale, t.amax, t.dequantize(torch.float32)]

            got = everywhere(cast)
            for mine, wanted in zip(got, reference.quantize(x, dtype, given), strict=False):
                assert_same(mine, wanted)


def test_the_other_ops_give_the_same_bits_everywhere():
    x, y = values(70 * 1030, 1).view(70, 1030), values(70 * 1030, 2).view(70, 1030)
    everywhere(lambda: list(torch.ops.quaver.cast_transpose(x, FP8[0], None, None, True)))
    tensors = [x, y.bfloat16(), x[:7], qv.quantize(y, FP8[1])]
    everywhere(lambda: list(qv.ops.grad_norm(tensors)))
    for source in (*FP8, torch.bfloat16):

        def add(source=source):
            q = x.bfloat16() if source == torch.bfloat16 else qv.quantize(x, source).qdata
            scale, amax = torch.tensor(2.0**-3), torch.tensor(1.0)
            torch.ops.quaver.accumulate_(q, scale, amax, y, None, None)
            return [q, scale, amax]

        everywhere(add)
