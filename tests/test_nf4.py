"""NF4 weights: codes, both levels of scales, bytes, awkward values."""

import math

import pytest
import torch
from helpers import assert_same, everywhere, randn

import quaver as qv
from quaver import reference
from quaver.nf4 import ABSMAX_BLOCK
from quaver.reference import dynamic_map

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(), (1,), (0, 5), (7, 9), (64,), (3, 5, 13), (256, 384), (33, 1003)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_codes_and_values_are_the_references(shape, dtype, block):
    x = randn(*shape, seed=3).to(dtype)
    codes, absmax = qv.ops.nf4_encode(x, block)
    for got, wanted in zip((codes, absmax), reference.nf4_encode(x, block), strict=True):
        assert_same(got, wanted)
    for to in FLOATS:
        got = qv.ops.nf4_decode(codes, absmax, x.numel(), to, block)
        assert_same(got, reference.nf4_decode(codes, absmax, x.numel(), to, block))


def test_every_instruction_set_gives_the_same_bits():
    x = randn(70_001, seed=1) * torch.exp2(randn(70_001, seed=2) * 8)

    def codes_and_values():
        codes, absmax = qv.ops.nf4_encode(x)
        values = (qv.ops.nf4_decode(codes, absmax, 70_001, to) for to in FLOATS)
        return [codes, absmax, *values]

    everywhere(codes_and_values)


def test_the_first_code_of_a_byte_is_in_its_high_bits():
    x = torch.tensor([1.0, -1.0, 0.0])
    assert qv.quantize_nf4(x).codes.tolist() == [0xF0, 0x77]


@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(double):
    x = randn(4, 64, seed=1)
    x[1] = 0
    x[2, ::3] = 0
    y = qv.quantize_nf4(x, double=double).dequantize()
    assert bool((y[x == 0] == 0).all()) and not bool(y.isnan().any())
    nothing = torch.zeros(3, 100)
    assert_same(qv.quantize_nf4(nothing, double=double).dequantize(), nothing)


def test_bytes_an_element():
    x = torch.empty(4096, 4096, device="meta", dtype=torch.bfloat16)
    for double, most in ((True, 0.5163), (False, 0.5626)):
        w = qv.quantize_nf4(x, double=double)
        print(f"{w.nbytes / x.numel():.5f} bytes an element, {double=}")
        assert w.nbytes <= most * x.numel()
        assert w.dequantize().shape == x.shape and w.dequantize().dtype == torch.bfloat16


def test_codes_of_magnitudes_are_the_nearest():
    x = randn(512, 1024, seed=5) * (1 + randn(512, 1, seed=6).abs())
    w, plain = qv.quantize_nf4(x), qv.quantize_nf4(x, double=False)
    assert_same(w.codes, plain.codes)
    exact = (plain.absmax - w.absmax_offset).view(-1, ABSMAX_BLOCK)
    assert_same(w.absmax_scale, exact.abs().amax(1))
    distance = (exact[:, :, None] / w.absmax_scale[:, None, None] - dynamic_map()).abs()
    taken = distance.gather(2, w.absmax.view(-1, ABSMAX_BLOCK, 1).long()).squeeze(2)
    assert bool((taken <= distance.amin(2) + 1e-7).all())
    error = (w.dequantize() - x).norm() / x.norm()
    assert error < 0.1 and error < (plain.dequantize() - x).norm() / x.norm() * 1.01


def test_the_published_library_has_the_same_codes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed, dtype in enumerate(FLOATS):
        x = (randn(512, 768, seed=seed) * 0.02).to(dtype)
        theirs, state = functional.quantize_4bit(
            x, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        w = qv.quantize_nf4(x)
        assert_same(w.codes, theirs.flatten())
        assert_same(dynamic_map(), functional.create_dynamic_map())
        assert (state.offset - w.absmax_offset).abs() <= 1e-6 * w.absmax_offset
        differ = (state.absmax.flatten() != w.absmax).float().mean()
        print(f"{dtype}: {differ:.4%} of the 8-bit codes differ")
        assert differ < 0.01
        exact = qv.quantize_nf4(x, double=False).absmax
        table = dynamic_map()
        scale = state.state2.absmax.repeat_interleave(256)[: exact.numel()]
        other = table[state.absmax.flatten().long()] * scale + state.offset
        mine = (w.magnitudes() - exact).abs()
        assert bool((mine <= (other - exact).abs() + 1e-6 * w.absmax_offset).all())
        theirs = functional.dequantize_4bit(theirs, state)
        assert (theirs.float() - w.dequantize().float()).abs().max() < 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = randn(3, 100)
    x[1, 5] = bad
    with pytest.raises(ValueError, match="quantize_nf4: weight must be finite, got 1 of 300"):
        qv.quantize_nf4(x)
    codes, absmax = qv.ops.nf4_encode(x)  # the op spreads them
    assert not bool(absmax[1].isfinite()) and bool(absmax[2].isfinite())
    y = qv.ops.nf4_decode(codes, absmax, 300, torch.float32)
    assert not bool(y[64:128].isfinite().all()) and bool(y[128:].isfinite().all())


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"quantize_nf4: weight must be float32, .* torch.int32"):
        qv.quantize_nf4(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"nf4_encode: block must be a power of two .* got 96"):
        qv.quantize_nf4(torch.zeros(3), block=96)
    with pytest.raises(ValueError, match="nf4_decode: codes must be 2 uint8 for 3 elements, got 5"):
        qv.ops.nf4_decode(torch.zeros(5, dtype=torch.uint8), torch.ones(1), 3, torch.float32)
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16"):
        qv.ops.nf4_decode(torch.zeros(2, dtype=torch.uint8), torch.ones(1), 3, torch.float8_e4m3fn)
