"""quantize, dequantize and cast_transpose, bit for bit against the oracles."""

import math
import re
from pathlib import Path

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, bits, everywhere, randn
from torch import nn

import quaver as qv
from quaver import reference
from quaver.layout import Layout

E4M3, E5M2 = FP8
ONE = torch.ones(())
INF, NAN = float("inf"), float("nan")


def check(x, dtype=E4M3, scale=None, granularity="tensor", block=128, power_of_two=True):
    t = qv.quantize(
        x, dtype, scale=scale, granularity=granularity, block=block, power_of_two=power_of_two
    )
    q, s, amax = reference.quantize(x, dtype, scale, granularity, block, power_of_two)
    assert_same(t.scale, s, "scale")
    assert_same(t.amax, amax, "amax")
    assert_same(t.qdata, q, "codes")
    assert t.dtype == x.dtype
    for out in (torch.float32, torch.bfloat16, torch.float16):
        wanted = reference.dequantize(q, s, out, granularity, block)
        assert_same(t.dequantize(out), wanted, f"decoded {out}")
    return t


@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (4, 0), (33, 129), (128, 256), (300, 130)])
def test_tiles(shape):
    for dtype in (E4M3, E5M2, torch.float16):
        for power_of_two in (True, False):
            x = randn(*shape) * 3
            t = check(x, dtype, granularity="tile", power_of_two=power_of_two)
            again = check(x.bfloat16(), dtype, t.scale * 2, "tile")
            assert again.scale.shape == tuple(-(-n // 128) for n in shape)


def test_tiles_are_of_matrices():
    for shape in ((), (5,), (2, 3, 4)):
        with pytest.raises(REFUSAL, match='granularity "tile" must be a matrix'):
            qv.quantize(torch.ones(shape), granularity="tile")
    for shape in ((), (5,)):
        with pytest.raises(ValueError, match="is for matrices"):
            qv.ScaledTensor(torch.ones(shape).to(E4M3), torch.ones(1, 1),
                            layout=Layout("e4m3", "tile"))  # fmt: skip


SHAPES = [(), (1,), (0,), (7,), (3, 5), (0, 4), (4, 0), (33, 129), (2, 3, 65), (1, 1, 1, 17)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_any_shape(shape, granularity):
    for dtype in (E4M3, E5M2, torch.float16):
        for block in (1, 8, 128):
            check(randn(*shape) * 3, dtype, granularity=granularity, block=block)


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_any_strides(granularity):
    base = randn(12, 34, 56)
    for x in (
        base.permute(2, 0, 1),
        base[::2, :, 3::5],
        base[:, 1].t(),
        base[0, 0].expand(9, 56),
        base[:, :1].expand(12, 34, 56),
        base.flip(0)[1:],
        base.to(torch.bfloat16)[..., ::3],
        base.as_strided((5, 6), (1, 2)),
    ):
        check(x, granularity=granularity, block=16)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_scale_choice(source, power_of_two):
    for amax in (1e-3, 1.0, 10.0, 447.9, 448.0, 448.5, 57344.0, 60000.0):
        for dtype in (E4M3, E5M2, torch.float16):
            t = check(randn(64).to(source).clamp(-1, 1) * amax, dtype, power_of_two=power_of_two)
            assert not power_of_two or math.frexp(t.scale.item())[0] == 0.5


def test_ms_amp_scale_vectors():
    """fp8lm.md: encode side, amax 0 -> 1, 10 -> 32, 10000 -> 1/32."""
    for amax, encode_side in ((0.0, 1.0), (10.0, 32.0), (10000.0, 1 / 32)):
        t = qv.quantize(torch.tensor([amax, -amax / 3]))
        assert t.scale.item() == 1 / encode_side
        assert t.amax.item() == amax


def test_every_power_of_two_boundary():
    """Around 448 * 2^k the scale changes binade exactly behind 448 * 2^k."""
    for k in range(-117, 119):
        top = torch.tensor(torch.finfo(E4M3).max * 2.0**k)
        at, above = (qv.quantize(x[None]).scale.item() for x in (top, top.nextafter(ONE * INF)))
        assert (at, above) == (2.0**k, 2.0 ** (k + 1))


def test_tiny_and_huge_amax():
    for amax in (1e-45, 1e-40, 1.2e-38, 2.0**-118, 2.0**-117, 1e37, 2e38):
        for power_of_two in (True, False):
            x = torch.tensor([amax, -amax / 2, amax / 300, 0.0])
            for dtype in (E4M3, E5M2, torch.float16):
                t = check(x, dtype, power_of_two=power_of_two)
                assert t.scale >= 2.0**-126
                assert t.dequantize().isfinite().all()


@pytest.mark.parametrize("scale", [0.3, 1.0, 7.7e-5, 2.0**-126, 1e-40, 2.0**-149, 2.0**127, 3e38])
def test_given_scale(scale):
    given = torch.tensor(scale)
    x = torch.cat([randn(300) * scale, randn(300), randn(300) * 1e-38])
    for dtype in (E4M3, E5M2, torch.float16):
        t = check(x.clamp(-3e38, 3e38), dtype, scale=given)
        assert_same(t.scale, given)
        assert t.scale is not given and t.scale.data_ptr() != given.data_ptr()


def test_given_scales_of_rows_and_blocks():
    x = randn(6, 50)
    check(x, scale=randn(6, 1).abs(), granularity="row")
    check(x, scale=randn(6, 4).abs(), granularity="block", block=16)
    check(x, scale=randn(4, 6).abs().t(), granularity="block", block=16)
    wanted = qv.quantize(x, scale=torch.arange(1.0, 7)[:, None], granularity="row")
    flat = qv.quantize(x, scale=torch.arange(1.0, 7), granularity="row")
    assert_same(flat.qdata, wanted.qdata)


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_non_finite_values_show_in_the_amax_of_their_group(bad, granularity):
    x = randn(5, 64)
    x[2, 40] = bad
    t = check(x, granularity=granularity, block=32)
    wanted = {"tensor": (1,), "row": (5,), "block": (10,)}[granularity]
    finite = t.amax.isfinite().reshape(wanted)
    assert (~finite).sum() == 1
    assert t.scale.isfinite().all()
    decoded = t.dequantize()[2, 40]
    assert (
        decoded.isnan() if math.isnan(bad) else decoded == math.copysign(t.scale.max(), bad) * 448
    )


def test_zeros_stay_zeros_with_their_sign():
    for granularity in ("tensor", "row", "block"):
        t = check(torch.tensor([[0.0, -0.0], [-0.0, 0.0]]), granularity=granularity)
        assert (t.scale == 1).all() and (t.amax == 0).all()
        assert_same(t.dequantize(), torch.tensor([[0.0, -0.0], [-0.0, 0.0]]))


def history(values, count=None):
    state = torch.zeros(17)
    state[0] = len(values) if count is None else count
    state[1 : 1 + len(values)] = torch.tensor(values)
    return state


@pytest.mark.parametrize("op", ["quantize", "cast_transpose"])
def test_delayed_scaling_over_forty_casts(op):
    for bad_at in (None, 20, 5):
        for bad in (INF, NAN):
            state, oracle = torch.zeros(17), reference.DelayedScale(E5M2)
            for step in range(40):
                x = randn(16, 48, seed=step) * 1.7 ** (step % 11)
                if step == bad_at:
                    x[3, 3] = bad
                if op == "quantize":
                    t = qv.quantize(x, E5M2, history=state)
                else:
                    t, tt = qv.cast_transpose(x, E5M2, history=state)
                    assert_same(tt.qdata, t.qdata.t().contiguous())
                for got, wanted in zip((t.qdata, t.scale, t.amax), oracle.cast(x), strict=True):
                    assert_same(got, wanted, f"step {step}")


@pytest.mark.parametrize(("amax", "scale"), [
    (1.0, 2**-8),  # the forecast
    (1.75, 2**-8),  # what it can hold
    (2.0, 2**-7),  # what would saturate: just in time
    (1.75 / 16, 2**-8),
    (1.0 / 16, 2**-12),  # far below it: just in time
    (0.0, 2**-8),
])  # fmt: skip
def test_a_forecast_holds_from_its_largest_value_to_a_sixteenth(amax, scale):
    state = history([1.0] * 16)
    t = qv.quantize(torch.tensor([amax, -amax / 2]), history=state)
    assert t.scale.item() == scale and t.amax.item() == amax
    assert_same(t.dequantize(), torch.tensor([amax, -amax / 2]))
    assert state[1].item() == amax and state[0].item() == 17


DELAYED = {
    "quantize": lambda x, state: [qv.quantize(x, history=state)],
    "cast_transpose": lambda x, state: list(qv.cast_transpose(x, history=state)),
}


def relative_error(t, x):
    return ((t.dequantize() - x).norm() / x.norm()).item()


@pytest.mark.parametrize("op", DELAYED)
@pytest.mark.parametrize("empty", [torch.zeros(16, 32), torch.zeros(0, 32)], ids=["zero", "empty"])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_history_of_zeros_forecasts_nothing(op, empty, size):
    state, oracle = torch.zeros(17), reference.DelayedScale(E4M3)
    for x in [empty] * 16 + [randn(16, 32, seed=i) * size for i in range(20)]:
        wanted = oracle.cast(x)
        for got in DELAYED[op](x, state):
            assert_same(got.scale, wanted[1])
            if x.any():  # e4m3's own error: 2^-4 at most
                source = x if got.qdata.shape == x.shape else x.t()
                assert relative_error(got, source) < 2**-4


@pytest.mark.parametrize("op", DELAYED)
@pytest.mark.parametrize("warm", [0, 3, 16, 40])
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_an_outlier_blinds_neither_its_own_cast_nor_the_next(op, warm, factor):
    state, oracle = torch.zeros(17), reference.DelayedScale(E4M3)
    factors = [1.0] * warm + [factor] + [1.0] * 40
    for step, f in enumerate(factors):
        x = randn(64, 32, seed=step) * f
        wanted = oracle.cast(x)
        got = DELAYED[op](x, state)[0]
        for a, b in zip((got.qdata, got.scale, got.amax), wanted, strict=True):
            assert_same(a, b, f"step {step}")
        assert relative_error(got, x) < 2**-4, f"step {step}"
        if 0 < warm < step:  # within 16 x of the history, from the first cast on
            assert state[1:].max() < 16 * 6


def test_values_that_grow_for_good_are_followed():
    state, forecasts = torch.zeros(17), []
    for step in range(40):
        x = randn(64, 32, seed=step) * (1.0 if step < 20 else 1e6)
        t = qv.quantize(x, history=state)
        assert relative_error(t, x) < 2**-4
        forecasts.append(state[1:].max().item())
    jump = 5  # 16^5 > 1e6
    assert forecasts[20] < 16 * 6 and forecasts[20 + jump] > 1e6


@pytest.mark.parametrize("op", DELAYED)
@pytest.mark.parametrize("isa", qv._C.available_isas())
def test_a_broken_history_is_an_empty_one(op, isa):
    """A checkpoint may bring any 17 floats: nothing beside them is written."""
    x = randn(16, 32)
    best = qv._C.cpu_isa()
    qv._C.set_cpu_isa(isa)
    try:
        for count in (-1.0, -15.0, -1e30, NAN, INF, -INF, 32.0, 1e9, 3e38):
            memory = torch.full((17 + 128,), 7.0)
            state = memory[64 : 64 + 17]
            state[0], state[1:] = count, torch.tensor([NAN, INF, -INF, -3.0] * 4)
            got = DELAYED[op](x, state)[0]
            assert_same(got.scale, qv.quantize(x).scale, f"count {count}")
            assert (memory[:64] == 7).all() and (memory[64 + 17 :] == 7).all()
            assert state[0] == 1 and state[1] == x.abs().max()
    finally:
        qv._C.set_cpu_isa(best)


@pytest.mark.parametrize("scale", [NAN, INF, -INF, -1.0, 0.0])
def test_scales_that_decode_nothing_are_refused(scale):
    x, scale = randn(16, 32), torch.tensor(scale)
    for call in (
        lambda: qv.quantize(x, scale=scale),
        lambda: qv.cast_transpose(x, scale=scale),
        lambda: qv.ops.normalize(x, scale=scale),
        lambda: qv.ops.activate(x, scale=scale),
        lambda: qv.gemm(qv.quantize(x), qv.quantize(x), out_dtype=E4M3, out_scale=scale),
    ):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            call()
    row = torch.ones(16, 1)
    row[3] = scale
    with pytest.raises(ValueError, match="quantize: scale must be positive and finite"):
        qv.quantize(x, scale=row, granularity="row")


CAST_SHAPES = [(1, 1), (0, 5), (5, 0), (1, 100), (100, 1), (7, 9), (63, 65), (64, 64), (70, 520)]


@pytest.mark.parametrize("shape", CAST_SHAPES)
@pytest.mark.parametrize("dtype", FP8)
def test_cast_transpose(shape, dtype):
    x = randn(*shape) * 5
    wide = randn(shape[1], shape[0] * 2)
    for source in (x, x.bfloat16(), x.half(), wide.t()[::2], x[:1].expand(shape)):
        for scale in (None, ONE * 0.3, ONE * 0.25):
            for power_of_two in (True, False):
                q, qt = qv.cast_transpose(source, dtype, scale, power_of_two=power_of_two)
                wanted = reference.cast_transpose(source, dtype, scale, power_of_two)
                got = (q.qdata, qt.qdata, q.scale, q.amax)
                for name, a, b in zip(("q", "qt", "scale", "amax"), got, wanted, strict=True):
                    assert_same(a, b, name)
                assert_same(qt.dequantize(), q.dequantize().t().contiguous())


def test_inputs_are_left_alone():
    x, scale = randn(20, 30), torch.tensor(0.5)
    before = x.clone()
    qv.quantize(x, scale=scale)
    qv.quantize(x, granularity="row")
    qv.cast_transpose(x, scale=scale)
    assert_same(x, before)
    assert scale.item() == 0.5


REFUSED = [
    (lambda x: qv.quantize(x.double()), "quantize: x must be .* got Double"),
    (lambda x: qv.quantize(x.int()), "quantize: x must be .* got Int"),
    (lambda x: qv.quantize(x.to(E4M3)), "quantize: x must be f32, f16 or bf16, got e4m3"),
    (lambda x: qv.quantize(x, torch.bfloat16), "quantize: dtype must be .* got bf16"),
    (lambda x: qv.quantize(x, torch.int8), "quantize: dtype must be .* got Char"),
    (lambda x: qv.quantize(x, granularity="column"), 'granularity must be .* got "column"'),
    (lambda x: qv.quantize(x, granularity="block", block=0), "block must be positive, got 0"),
    (lambda x: qv.quantize(x, rounding="up"), "rounding must be .* got 'up'"),
    (lambda x: qv.quantize(x, scale=torch.ones(2)), "scale must be 1 float32, got 2"),
    (lambda x: qv.quantize(x, scale=ONE.double()), "scale must be 1 float32, got 1 of Double"),
    (lambda x: qv.quantize(x, history=torch.zeros(16)), "history must be 17 .* got 16"),
    (lambda x: qv.quantize(x, history=torch.zeros(34)[::2]), "history must be 17 contiguous"),
    (lambda x: qv.quantize(x, scale=ONE, history=torch.zeros(17)), "without a scale"),
    (
        lambda x: qv.quantize(x, granularity="row", history=torch.zeros(17)),
        "a history goes with tensor granularity",
    ),
    (lambda x: qv.cast_transpose(x[0]), "x must be a matrix, got 1 dimensions"),
    (lambda x: qv.cast_transpose(x, torch.float16), "dtype must be e4m3 or e5m2, got f16"),
    (
        lambda x: qv.cast_transpose(x, scale=ONE, history=torch.zeros(17)),
        "a history and a given scale exclude each other",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused_by_name(call, message):
    with pytest.raises(REFUSAL, match=message):
        call(torch.ones(4, 8))


@pytest.mark.parametrize(
    ("scale", "granularity", "dtype", "message"),
    [
        (torch.ones(2), "tensor", torch.float32, "wanted 1 scales, got 2"),
        (torch.ones(3), "row", torch.float32, "wanted 4 scales, got 3"),
        (torch.ones((), dtype=torch.float64), "tensor", torch.float32, "scale must be float32"),
        (torch.ones(4).bfloat16(), "row", torch.float32, "scale must be float32"),
        (ONE, "tensor", torch.float64, "dtype must be .* got Double"),
        (ONE, "tensor", E4M3, "dtype must be f32, f16 or bf16, got e4m3"),
    ],
)
def test_dequantize_refuses_by_name(scale, granularity, dtype, message):
    q = torch.ones(4, 8).to(E4M3)
    with pytest.raises(REFUSAL, match=message):
        torch.ops.quaver.dequantize(q, scale, dtype, granularity, 8)


def test_parameters_and_graphs_do_not_matter():
    x = nn.Parameter(randn(4, 4))
    assert_same(qv.quantize(x).qdata, qv.quantize(x.detach()).qdata)
    assert not qv.quantize(x).requires_grad


def test_the_codes_of_rows_do_not_depend_on_their_neighbours():
    x = randn(300, 257) * torch.logspace(-10, 10, 300)[:, None]
    t = everywhere(lambda: [bits(qv.quantize(x, granularity="row").qdata)])[0]
    for i in (0, 17, 299):
        assert_same(t[i], bits(qv.quantize(x[i]).qdata))


@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    """A broadcast bf16 input is made dense: 4 GiB, and 2 GiB of codes."""
    memory = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    available = int((re.search(r"MemAvailable: +(\d+) kB", memory) or [0, 0])[1])
    if available < 10 * 2**20:
        pytest.skip("needs 10 GiB of memory")
    n = 2**31 + 100
    x = torch.ones(1, dtype=torch.bfloat16).expand(n)
    t = qv.quantize(x)
    assert t.amax.item() == 1.0
    assert bits(t.qdata[-3:]).tolist() == bits(qv.quantize(torch.ones(3)).qdata).tolist()
    assert (t.qdata.view(torch.uint8)[2**31 - 50 :] == bits(t.qdata[:1])).all()
