"""gemm against f64, within the roundings of its own accumulation."""

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, isa, randn

import quaver as qv
from quaver import _C, reference

E4M3, E5M2 = FP8
OUT = [torch.float32, torch.bfloat16, torch.float16]


def operand(rows, k, dtype=E4M3, granularity="tensor", seed=0, spread=1.0):
    return qv.quantize(randn(rows, k, seed=seed) * spread, dtype, granularity=granularity)


def check(a, b, out_dtype, bias=None, **options):
    got = qv.gemm(a, b, out_dtype, bias, **options)
    wanted = reference.gemm(a.qdata, a.scale, b.qdata, b.scale, bias)
    bound = reference.gemm_tolerance(a.qdata, a.scale, b.qdata, b.scale, out_dtype, bias)
    assert got.dtype == out_dtype and got.shape == wanted.shape
    excess = (got.double() - wanted).abs() - bound
    assert not (excess > 0).any(), f"off by {excess.max().item()} more than {bound.max().item()}"
    return got


SHAPES = [(1, 1, 1), (16, 16, 16), (3, 5, 7), (65, 33, 129), (1, 48, 500), (128, 1, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", OUT)
def test_against_f64(shape, out_dtype):
    m, n, k = shape
    bias = randn(n, seed=3, dtype=out_dtype)
    for type_a in FP8:
        for type_b in FP8:
            a, b = operand(m, k, type_a, seed=1), operand(n, k, type_b, seed=2, spread=0.01)
            check(a, b, out_dtype)
            check(a, b, out_dtype, fast_accumulate=False)
            check(a, b, out_dtype, bias)


@pytest.mark.parametrize("out_dtype", OUT)
def test_row_scales(out_dtype):
    decades = 1 if out_dtype == torch.float16 else 6  # products stay below f16's maximum
    spread = torch.logspace(-decades, decades, 20)[:, None]
    a = operand(20, 70, granularity="row", seed=1, spread=spread)
    b = operand(20, 70, granularity="row", seed=2, spread=1 / spread)
    plain = operand(20, 70, E5M2, seed=3)
    bias = randn(20, seed=4, dtype=out_dtype)
    for x, y in ((a, b), (a, plain), (plain, b)):
        check(x, y, out_dtype)
        check(x, y, out_dtype, bias)


GRAINS = ("tensor", "row", "block", "tile")


@pytest.mark.parametrize("out_dtype", OUT)
@pytest.mark.parametrize("shape", [(20, 17, 70), (129, 144, 300), (1, 130, 256)])
def test_every_pair_of_grains(shape, out_dtype):
    m, n, k = shape
    spread = torch.logspace(-1, 1, k)
    bias = randn(n, seed=4, dtype=out_dtype)
    for grain_a in GRAINS:
        for grain_b in GRAINS:
            a = operand(m, k, E4M3, grain_a, 1, spread)
            b = operand(n, k, E5M2, grain_b, 2, 1 / spread)
            check(a, b, out_dtype)
            check(a, b, out_dtype, bias)


@pytest.mark.parametrize("name", _C.available_isas())
def test_every_instruction_set(name):
    with isa(name):
        for out_dtype in OUT:
            for grain in GRAINS:
                a = operand(33, 200, E4M3, grain, 1)
                b = operand(70, 200, E5M2, grain, 2, 0.01)
                check(a, b, out_dtype, randn(70, seed=3, dtype=out_dtype))


def test_a_layout_is_told_by_the_shape_of_its_scales():
    q, one = torch.zeros(256, 256).to(E4M3), torch.ones(())
    for shape in ((), (1, 1), (256,), (256, 1), (256, 2), (2, 2)):
        assert not torch.ops.quaver.gemm(q, torch.ones(shape), q, one, None, OUT[0]).any()
    for shape in ((2, 256), (2, 1), (128, 2), (4,), (256, 1, 1)):
        wanted = (
            r"scale_b must be 1 float32, \[256, 1\] for rows, \[256, 2\] for 1 x 128 blocks or "
        )
        with pytest.raises(REFUSAL, match=wanted):
            torch.ops.quaver.gemm(q, one, q, torch.ones(shape), None, OUT[0])


def test_scales_that_are_nan_reach_their_rows_alone():
    x = randn(256, 256, seed=1)
    x[3, 200] = float("inf")
    a, _ = qv.ops.cast_layouts(x, E4M3, "block")
    b, _ = qv.ops.cast_layouts(randn(64, 256), E4M3, "tile")
    for out_dtype in OUT:
        y = qv.gemm(a, b, out_dtype)
        assert y[3].isnan().all() and y.isnan().sum() == 64


@pytest.mark.parametrize("out_dtype", OUT)
@pytest.mark.parametrize("granularity", GRAINS)
def test_out_and_accumulate(out_dtype, granularity):
    a, b = operand(17, 40, E5M2, granularity, 1), operand(9, 40, E4M3, granularity, 2)
    product = qv.gemm(a, b, out_dtype)
    for out in (torch.full((17, 9), float("nan")), torch.full((9, 17), float("nan")).t()):
        out = out.to(out_dtype)
        assert qv.gemm(a, b, out=out) is out
        assert_same(out, product)
    start = randn(17, 9, seed=5, dtype=out_dtype) * 10
    out = start.clone()
    qv.gemm(a, b, out=out, accumulate=True)
    wanted = reference.gemm(a.qdata, a.scale, b.qdata, b.scale) + start.double()
    parts = (a.qdata, a.scale, b.qdata, b.scale)
    bound = reference.gemm_tolerance(*parts, out_dtype, start)
    assert ((out.double() - wanted).abs() <= bound).all()


def test_products_of_integers_are_exact():
    """Small integers sum exactly in f32 in any order, so every bit is known."""
    x = torch.randint(-8, 9, (40, 300), generator=torch.Generator().manual_seed(0)).float()
    a = qv.quantize(x, scale=torch.tensor(0.5))
    b = qv.quantize(x[:24].flip(1), scale=torch.tensor(2.0))
    assert_same(qv.gemm(a, b, torch.float32), (x.double() @ x[:24].flip(1).t().double()).float())


def test_one_rounding_to_bf16():
    """257 rounds to 256 in bf16; 257 + 2 = 259 rounds to 260: a second rounding would give 258."""
    a = qv.quantize(torch.tensor([[16.0] * 16 + [1.0]]), scale=torch.ones(()))
    b = qv.quantize(torch.ones(1, 17), scale=torch.ones(()))
    assert qv.gemm(a, b).item() == 256
    two = torch.tensor([2.0], dtype=torch.bfloat16)
    assert qv.gemm(a, b, bias=two).item() == 260
    out = two[:, None].clone()
    assert qv.gemm(a, b, out=out, accumulate=True).item() == 260


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 0, 8), (0, 0, 0), (4, 3, 0)])
@pytest.mark.parametrize("out_dtype", OUT)
def test_empty(shape, out_dtype):
    m, n, k = shape
    a, b = operand(m, k), operand(n, k)
    assert_same(qv.gemm(a, b, out_dtype), torch.zeros(m, n, dtype=out_dtype))
    bias = randn(n, dtype=out_dtype)
    assert_same(qv.gemm(a, b, out_dtype, bias), bias.expand(m, n).contiguous())


def test_extreme_scales():
    one = torch.ones(2, 16).to(E4M3)
    for sa, sb in (
        (2.0**-126, 2.0**126),
        (2.0**127, 2.0**-127),
        (2.0**-100, 2.0**-40),
        (1e30, 1e30),
    ):
        a, b = (qv.ScaledTensor(one, torch.tensor(s)) for s in (sa, sb))
        wanted = (torch.tensor(sa) * torch.tensor(sb) * 16).expand(2, 2)
        torch.testing.assert_close(qv.gemm(a, b, torch.float32), wanted, rtol=1e-6, atol=0)


def test_non_finite_codes_and_scales_show():
    nan = qv.quantize(torch.tensor([[float("nan"), 1.0], [1.0, 1.0]]))
    y = qv.gemm(nan, operand(3, 2), torch.float32)
    assert y[0].isnan().all() and y[1].isfinite().all()
    for scale in (float("nan"), float("inf")):
        for out_dtype in OUT:
            for bias in (None, torch.ones(48, dtype=out_dtype)):
                a, b = operand(16, 32), operand(48, 32)
                a.scale.fill_(scale)
                assert not qv.gemm(a, b, out_dtype, bias).isfinite().any()


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_fp8_out(dtype, granularity):
    """The codes are those of quantize on a product that is within its tolerance."""
    a, b = operand(33, 70, E4M3, granularity, 1), operand(48, 70, E5M2, granularity, 2)
    parts = (a.qdata, a.scale, b.qdata, b.scale)
    for bias in (None, randn(48, seed=3) * 10):
        wide = qv.gemm(a, b, torch.float32, bias)
        for scale in (torch.tensor(0.25), torch.tensor(0.3)):
            got = qv.gemm(a, b, dtype, bias, out_scale=scale)
            q, _, amax = reference.quantize(wide, dtype, scale)
            assert isinstance(got, qv.ScaledTensor) and got.scale is scale
            assert_same(got.qdata, q)
            assert_same(got.amax, amax)
            low, high = reference.gemm_quantize(*parts, dtype, scale, bias)
            value = got.qdata.double()
            assert ((low.double() <= value) & (value <= high.double())).all()


def test_fp8_out_saturates_and_its_amax_tells():
    a, b = operand(16, 32, seed=1), operand(16, 32, seed=2)
    got = qv.gemm(a, b, E4M3, out_scale=torch.tensor(2.0**-10))
    wide = qv.gemm(a, b, torch.float32)
    assert got.amax == wide.abs().max()
    assert got.qdata.float().abs().max() == torch.finfo(E4M3).max
    a.scale.fill_(float("inf"))
    assert not qv.gemm(a, b, E4M3, out_scale=torch.ones(())).amax.isfinite()


@pytest.mark.parametrize("shape", [(0, 16, 16), (16, 0, 16), (16, 16, 0)])
def test_empty_fp8_out(shape):
    m, n, k = shape
    got = qv.gemm(operand(m, k), operand(n, k), E4M3, out_scale=torch.ones(()))
    assert_same(got.qdata, torch.zeros(m, n).to(E4M3))
    assert got.amax == 0


def test_f16_out_overflows_as_torch_does():
    a, b = operand(1, 16), operand(1, 16)
    a.qdata.fill_(448), b.qdata.fill_(448)
    a.scale.fill_(1), b.scale.fill_(1)
    assert qv.gemm(a, b, torch.float16).item() == float("inf")


def test_strided_operands():
    a = operand(32, 24, seed=1)
    b = operand(16, 12, seed=2)
    strided = qv.ScaledTensor(a.qdata[::2, ::2], a.scale)
    dense = qv.ScaledTensor(a.qdata[::2, ::2].contiguous(), a.scale)
    assert_same(qv.gemm(strided, b), qv.gemm(dense, b))
    assert_same(qv.gemm(b, strided), qv.gemm(b, dense))


REFUSED = [
    (lambda a, b: qv.gemm(a, operand(4, 9)), r"must share K, got \[4, 8\] and \[4, 9\]"),
    (lambda a, b: qv.gemm(a, b.dequantize()), "b must be a ScaledTensor, got Tensor"),
    (
        lambda a, b: qv.gemm(a, qv.ScaledTensor(b.qdata[0], b.scale)),
        "must be matrices, got 2 and 1",
    ),
    (
        lambda a, b: qv.gemm(a, operand(4, 8, torch.float16)),
        "must be e4m3 or e5m2, got e4m3 and f16",
    ),
    (
        lambda a, b: qv.gemm(a, b, E4M3),
        "out_scale and an FP8 out_dtype go together, got .*e4m3fn without",
    ),
    (
        lambda a, b: qv.gemm(a, b, out_scale=torch.ones(())),
        "out_scale and an FP8 out_dtype go together, got .*bfloat16 with",
    ),
    (
        lambda a, b: qv.gemm(a, b, out=torch.ones(4, 4), out_scale=torch.ones(())),
        "out_scale goes with an FP8 out_dtype, not with out=",
    ),
    (
        lambda a, b: qv.gemm(a, b, E4M3, out_scale=torch.ones(2)),
        "out_scale must be one float32, got 2",
    ),
    (
        lambda a, b: torch.ops.quaver.gemm_(
            torch.zeros(4, 4).to(E4M3), a.qdata, a.scale, b.qdata, b.scale, None, False, True
        ),
        "FP8 out needs a scale and an amax",
    ),
    (
        lambda a, b: torch.ops.quaver.gemm_quantize(
            a.qdata, a.scale, b.qdata, b.scale, None, torch.bfloat16, a.scale, True
        ),
        "out_dtype must be e4m3 or e5m2, got BFloat16",
    ),
    (lambda a, b: qv.gemm(a, b, bias=torch.ones(3)), "bias must have 4 values, got 3"),
    (lambda a, b: qv.gemm(a, b, out=torch.ones(4, 5)), r"out must be \[4, 4\]"),
    (lambda a, b: qv.gemm(a, b, accumulate=True), "accumulate needs out="),
    (
        lambda a, b: qv.gemm(a, b, bias=torch.ones(4), out=torch.ones(4, 4), accumulate=True),
        "bias and accumulate exclude each other",
    ),
    (
        lambda a, b: qv.gemm(a, qv.quantize(randn(4, 8), granularity="block", block=4)),
        "b has scales of e4m3 with 1 x 4 block scale; wanted those of the tensor, of rows",
    ),
    (
        lambda a, b: torch.ops.quaver.gemm(
            a.qdata, torch.ones(3), b.qdata, b.scale, None, torch.float32, True
        ),
        r"scale_a must be 1 float32, \[4, 1\] for rows, .*, got \[3\]",
    ),
    (
        lambda a, b: torch.ops.quaver.gemm(
            a.qdata, a.scale.double(), b.qdata, b.scale, None, torch.float32, True
        ),
        "scale_a must be float32, got Double",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused_by_name(call, message):
    with pytest.raises((*REFUSAL, TypeError), match=message):
        call(operand(4, 8), operand(4, 8))


def test_autocast_leaves_the_product_alone():
    a, b = qv.quantize(randn(24, 64)), qv.quantize(randn(40, 64), granularity="row")
    wanted = qv.gemm(a, b, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(qv.gemm(a, b, torch.float32), wanted)
        assert_same(qv.gemm(a, b), wanted.bfloat16())


def test_a_margin_of_multiprocessors_lasts_for_a_block():
    with qv.ops.sm_margin(16):
        assert _C.sm_margin() == 16
        with pytest.raises(KeyError), qv.ops.sm_margin(0):
            assert _C.sm_margin() == 0
            raise KeyError
        assert _C.sm_margin() == 16
    assert _C.sm_margin() == 0
    for wrong in (-1, 1.0, True, 2**31):
        refused = pytest.raises(ValueError, match="count must be an int from 0 on")
        with refused, qv.ops.sm_margin(wrong):
            pass
