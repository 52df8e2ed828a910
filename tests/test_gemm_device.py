"""gemm on each device against f64: every pair of formats, every output, ragged shapes, both kinds
of sums, replays. The same tests walk the CPU, so that without a GPU they are tested themselves."""

import itertools

import pytest
import torch
from helpers import FP8, REFUSAL, assert_same, bits, randn

import quaver as qv
from quaver import reference
from quaver.gemm_table import Product

E4M3, E5M2 = FP8
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)]
# Less than a tile, ragged in each axis, whole tiles; then, too slow for a CPU, more than a wave,
# few tiles with a long K.
SMALL = [(16, 16, 16), (1, 48, 144), (80, 272, 528)]
SHAPES = {
    "cpu": SMALL,
    "cuda": [
        *SMALL, (128, 256, 128), (129, 256, 1040), (2064, 2576, 272), (256, 512, 8192),
        (64, 64, 16400),
    ],
}  # fmt: skip

device = pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], name="device"
)(lambda request: request.param)


def to(t, device):
    return qv.ScaledTensor(t.qdata.to(device), t.scale.to(device), None, t.dtype, t.qlayout)


def operand(rows, k, dtype, granularity="tensor", seed=0):
    # Rows of different magnitudes, and scales that are no powers of two.
    x = randn(rows, k, seed=seed) * torch.logspace(-1, 1, rows)[:, None]
    return qv.quantize(x, dtype, granularity=granularity, power_of_two=False)


def parts(a, b):
    return a.qdata, a.scale, b.qdata, b.scale


def tolerance(a, b, out_dtype, addend, fast, device):
    bound = reference.gemm_tolerance(*parts(a, b), out_dtype, addend)
    if device == "cpu":
        return bound
    return bound + reference.tensor_core_tolerance(*parts(a, b), promoted=not fast)


def check(got, a, b, addend, fast, device):
    """All of it on the device, whose f64 is IEEE's too and faster than a CPU's."""
    a, b = to(a, device), to(b, device)
    wanted = reference.gemm(*parts(a, b))
    if addend is not None:
        addend = addend.to(device)
        wanted = wanted + addend.double()
    excess = (got.double() - wanted).abs() - tolerance(a, b, got.dtype, addend, fast, device)
    assert not (excess > 0).any(), f"off by {excess.max().item()} more than allowed"
    assert got.isfinite().all()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("types", PAIRS)
def test_every_output_with_bias_and_without(types, fast, device):
    for (m, n, k), out_dtype in itertools.product(SHAPES[device], (BF16, F16, F32)):
        a, b = operand(m, k, types[0], seed=1), operand(n, k, types[1], seed=2)
        bias = randn(n, seed=3, dtype=out_dtype)
        on = to(a, device), to(b, device)
        check(qv.gemm(*on, out_dtype, fast_accumulate=fast), a, b, None, fast, device)
        got = qv.gemm(*on, out_dtype, bias.to(device), fast_accumulate=fast)
        check(got, a, b, bias, fast, device)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("types", PAIRS)
def test_accumulation(types, fast, device):
    for (m, n, k), out_dtype in itertools.product(SHAPES[device], (BF16, F16, F32)):
        a, b = operand(m, k, types[0], seed=1), operand(n, k, types[1], seed=2)
        start = randn(m, n, seed=4, dtype=out_dtype)
        for out in (start.clone().to(device), start.t().clone().to(device).t()):
            qv.gemm(to(a, device), to(b, device), out=out, accumulate=True, fast_accumulate=fast)
            check(out, a, b, start, fast, device)


@pytest.mark.parametrize("rows", [("row", "row"), ("row", "tensor"), ("tensor", "row")])
def test_row_scales(rows, device):
    for (m, n, k), out_dtype in itertools.product(SHAPES[device], (BF16, F32)):
        a, b = operand(m, k, E4M3, rows[0], 1), operand(n, k, E4M3, rows[1], 2)
        bias = randn(n, seed=3, dtype=out_dtype)
        got = qv.gemm(to(a, device), to(b, device), out_dtype, bias.to(device))
        check(got, a, b, bias, True, device)


@pytest.mark.parametrize("grain_b", ["tile", "block"])
def test_scales_of_blocks(grain_b, device):
    for (m, n, k), out_dtype in itertools.product(SHAPES[device], (BF16, F16, F32)):
        a, b = operand(m, k, E4M3, "block", 1), operand(n, k, E4M3, grain_b, 2)
        bias = randn(n, seed=3, dtype=out_dtype)
        on = to(a, device), to(b, device)
        check(qv.gemm(*on, out_dtype), a, b, None, False, device)
        check(qv.gemm(*on, out_dtype, bias.to(device)), a, b, bias, False, device)
        start = randn(m, n, seed=4, dtype=out_dtype)
        out = start.clone().to(device)
        qv.gemm(*on, out=out, accumulate=True)
        check(out, a, b, start, False, device)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("grains", [("tile", "block"), ("block", "row"), ("tensor", "tile")])
def test_scales_that_no_kernel_takes(grains, types, device):
    for (m, n, k), out_dtype in itertools.product(SMALL, (BF16, F32)):
        a, b = operand(m, k, types[0], grains[0], 1), operand(n, k, types[1], grains[1], 2)
        check(qv.gemm(to(a, device), to(b, device), out_dtype), a, b, None, False, device)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("fast", [True, False])
def test_fp8_out(dtype, fast, device):
    for (m, n, k), type_a in itertools.product(SHAPES[device], FP8):
        a, b = operand(m, k, type_a, seed=1), operand(n, k, E4M3, seed=2)
        bias = randn(n, seed=3) * 50  # where it is the largest, rows beyond M must not show in amax
        on = to(a, device), to(b, device), dtype, bias.to(device)
        wanted = reference.gemm(*parts(a, b), bias)
        allowed = tolerance(a, b, F32, bias, fast, device)
        for scale in (wanted.abs().max().float() / torch.finfo(dtype).max, torch.tensor(0.125)):
            got = qv.gemm(*on, fast_accumulate=fast, out_scale=scale.to(device))
            ends = [((wanted + end).float() / scale) for end in (-allowed, allowed)]
            low, high = (reference.encode(end, dtype).double() for end in ends)
            codes = got.qdata.cpu().double()
            assert ((low <= codes) & (codes <= high)).all()
            at = wanted.abs().argmax()
            off = (got.amax.cpu().double() - wanted.abs().max()).abs()
            assert off <= allowed.max(), f"amax is off by {off}, the largest value at {at}"


def test_products_of_integers_are_exact(device):
    """Sums below 2^13 fit even into 14 bits, so every bit is known and every element placed."""
    for m, n, k in [(129, 272, 256), (1040, 528, 128)]:
        x, y = (
            torch.randint(-2, 3, (rows, k), generator=torch.Generator().manual_seed(rows)).float()
            for rows in (m, n)
        )
        a, b = (qv.quantize(t, scale=torch.ones(())) for t in (x, y))
        for fast in (True, False):
            got = qv.gemm(to(a, device), to(b, device), F32, fast_accumulate=fast)
            assert_same(got.cpu(), x @ y.t())


def test_what_is_not_finite_shows(device):
    a, b = operand(32, 64, E4M3, seed=1), operand(48, 64, E4M3, seed=2)
    a.scale.fill_(float("nan"))
    assert not qv.gemm(to(a, device), to(b, device)).isfinite().any()
    got = qv.gemm(to(a, device), to(b, device), E4M3, out_scale=torch.ones((), device=device))
    assert not got.amax.isfinite()


def test_the_same_bits_every_time(device):
    for m, n, k in SHAPES[device]:
        a, b = to(operand(m, k, E5M2, seed=1), device), to(operand(n, k, E4M3, seed=2), device)
        first = qv.gemm(a, b, F32, fast_accumulate=False)
        for _ in range(3):
            again = qv.gemm(a, b, F32, fast_accumulate=False)
            assert torch.equal(bits(first), bits(again))


def test_strided_views(device):
    a, b = operand(64, 64, E4M3, seed=1), operand(96, 64, E4M3, seed=2)
    on_a, on_b = to(a, device), to(b, device)
    view = qv.ScaledTensor(on_a.qdata[::2, ::2], on_a.scale)
    dense = qv.ScaledTensor(on_a.qdata[::2, ::2].contiguous(), on_a.scale)
    other = qv.ScaledTensor(on_b.qdata[:, 16:48], on_b.scale)
    assert_same(qv.gemm(view, other).cpu(), qv.gemm(dense, other).cpu())
    # A square operand given as [K, N] is a view whose strides are followed.
    turned = qv.ScaledTensor(on_a.qdata.t().contiguous().t(), on_a.scale)
    assert_same(qv.gemm(turned, on_b).cpu(), qv.gemm(on_a, on_b).cpu())


@pytest.mark.parametrize("types", PAIRS)
def test_operands_anywhere_and_of_any_width(types, device):
    """Sizes and pointers that are no multiples of 16, which TMA refuses."""
    for (m, n, k), out_dtype in itertools.product([(70, 67, 131), (3, 1, 1)], (BF16, F16, F32)):
        a, b = operand(m, k, types[0], seed=1), operand(n, k, types[1], seed=2)
        start = randn(m, n, seed=4, dtype=out_dtype)
        odd = torch.empty(m * k + 1, dtype=types[0], device=device)[1:].view(m, k)
        on_a = qv.ScaledTensor(odd.copy_(a.qdata), a.scale.to(device))
        on_b = to(b, device)
        check(qv.gemm(on_a, on_b, out_dtype), a, b, None, True, device)
        out = start.clone().to(device)
        qv.gemm(on_a, on_b, out=out, accumulate=True)
        check(out, a, b, start, True, device)


@pytest.mark.parametrize("promoted", [False, True])
def test_the_tolerance_holds_for_sums_that_lose_bits_as_tensor_cores_do(promoted):
    """On the CPU: sums of 32 products and the running one, cut to 14 bits of the largest."""
    a, b = operand(24, 512, E4M3, seed=1), operand(16, 512, E5M2, seed=2)
    x, y = (t.qdata.double() * t.scale.double() for t in (a, b))
    products = x[:, None] * y[None]
    total = running = torch.zeros(24, 16, dtype=torch.float64)
    for step in range(16):
        if promoted and step % 4 == 0:
            total, running = total + running, torch.zeros_like(running)
        addends = torch.cat([products[..., 32 * step : 32 * step + 32], running[..., None]], -1)
        _, exponent = torch.frexp(addends.abs().amax(-1, keepdim=True))
        unit = 2.0 ** (exponent - 14).double()
        running = ((addends / unit).trunc() * unit).sum(-1)
    off = (total + running - products.sum(-1)).abs()
    bound = reference.tensor_core_tolerance(*parts(a, b), promoted)
    assert (off <= bound).all()
    assert (off > bound / 50).any(), "the bound says nothing"
    assert (off > reference.gemm_tolerance(*parts(a, b), F32)).any()


@pytest.mark.cuda
def test_every_kernel_is_chosen_and_right():
    names = {E4M3: "e4m3", E5M2: "e5m2", BF16: "bf16", F32: "f32"}
    outs = [(BF16, False), (BF16, True), (F32, True), (E4M3, False)]
    p = torch.cuda.get_device_properties(0)
    sms, arch = p.multi_processor_count, f"sm_{p.major}{p.minor}"
    shapes = [
        (33, 50, 40),
        (16, 16, 16), (64, 64, 16400), (256, 512, 8192), (2064, 2576, 272), (4096, 4096, 256),
        (2048, 4096, 2048), (4096, 4096, 4096),
    ]  # fmt: skip
    chosen, known = set(), set()
    for shape, types, fast, (out, add) in itertools.product(shapes, PAIRS, (False, True), outs):
        if (types[1], out) == (E5M2, E4M3):
            continue  # no kernel
        formats = (names[t] for t in (*types, out))
        found, _ = Product(*shape, *formats, add, fast, arch=arch).candidates(sms)
        known |= {candidate["name"] for candidate in found}
        if found[0]["name"] in chosen:
            continue
        chosen.add(found[0]["name"])
        m, n, k = shape
        a, b = operand(m, k, types[0], seed=1), operand(n, k, types[1], seed=2)
        on = to(a, "cuda"), to(b, "cuda")
        if out == E4M3:  # no rounding except the format's own
            scale = torch.tensor(0.5, device="cuda")
            got = qv.gemm(*on, out, fast_accumulate=fast, out_scale=scale)
            allowed = tolerance(*on, F32, None, fast, "cuda")
            wanted = reference.gemm(*parts(*on))
            low, high = (
                reference.encode(((wanted + end).float() / scale).cpu(), E4M3).double()
                for end in (-allowed, allowed)
            )
            codes = got.qdata.cpu().double()
            assert ((low <= codes) & (codes <= high)).all(), found[0]["name"]
            continue
        target = torch.zeros(m, n, dtype=out, device="cuda")
        qv.gemm(*on, out=target, accumulate=add, fast_accumulate=fast)
        check(target, a, b, None, fast, "cuda")
    assert chosen == known


@pytest.mark.cuda
def test_a_captured_gemm_reads_its_scales_on_the_device():
    a, b = (to(operand(256, 512, E4M3, seed=s), "cuda") for s in (1, 2))
    out = torch.zeros(256, 256, device="cuda")
    out_scale = torch.ones((), device="cuda")

    def step():
        qv.gemm(a, b, out=out, accumulate=True, fast_accumulate=False)
        return qv.gemm(a, b, E4M3, out_scale=out_scale)

    step()  # loads the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = step()
    out.zero_()
    total = torch.zeros_like(out)
    for scale in (1.0, 0.5, 3.0):
        a.scale.fill_(scale)
        out_scale.fill_(scale * 0.25)
        graph.replay()
        total += qv.gemm(a, b, F32, fast_accumulate=False)
        torch.testing.assert_close(out, total, rtol=1e-5, atol=1e-5)
        again = qv.gemm(a, b, E4M3, out_scale=out_scale)
        assert_same(codes.qdata.cpu(), again.qdata.cpu())
        assert codes.amax == again.amax


CUDA_REFUSED = [
    (lambda a, b: qv.gemm(to(qv.quantize(randn(32, 64), E5M2), "cuda"),
                          to(qv.quantize(randn(48, 64), E5M2), "cuda")),
     "e5m2 x e5m2 has no CUDA kernel"),
    (lambda a, b: qv.gemm(a, to(b, "cpu")), "b must be on cuda:0 like the rest, got cpu"),
    (lambda a, b: qv.gemm(a, b, bias=torch.ones(48)), "bias must be on cuda:0"),
    (lambda a, b: qv.gemm(a, b, out=torch.ones(32, 48)), "out must be on cuda:0"),
    (lambda a, b: qv.gemm(a, b, E4M3, out_scale=torch.ones(())), "out_scale must be on cuda:0"),
]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize(("call", "message"), CUDA_REFUSED)
def test_refused_by_name(call, message):
    a, b = (to(qv.quantize(randn(rows, 64)), "cuda") for rows in (32, 48))
    with pytest.raises(REFUSAL, match=message):
        call(a, b)
    # Nothing sticks: the next call works.
    assert qv.gemm(a, b).isfinite().all()
    torch.cuda.synchronize()
