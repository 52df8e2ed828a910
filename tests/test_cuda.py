"""Every CUDA op gives the bits of the CPU op on the same inputs. Needs a GPU."""

import itertools

import pytest
import torch

import quaver as qv

pytestmark = pytest.mark.cuda

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16)
FP8 = CODES[:2]
SHAPES = [(1,), (7,), (4097,), (16, 64), (63, 65), (1000, 33), (128, 4096), (3, 5, 130)]
ops = torch.ops.quaver


def values(shape, dtype, seed=0):
    """Normal values over many binades, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
    x[torch.rand(shape, generator=generator) < 0.01] = 0
    return x.to(dtype)


def same(a, b):
    """Bitwise, except that any NaN equals any NaN: CPUs and GPUs differ in NaN payloads."""
    a, b = a.cpu(), b.cpu()
    assert a.dtype == b.dtype and a.shape == b.shape
    unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(unsigned) == b.contiguous().view(unsigned)
    if a.is_floating_point():
        equal |= a.float().isnan() & b.float().isnan()
    assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ"


def both(op, *args):
    """The op's results on the CPU, checked against the GPU's; in-place arguments too."""

    def move(value, device):
        if isinstance(value, torch.Tensor):
            return value.clone().to(device)
        return [move(v, device) for v in value] if isinstance(value, list) else value

    def flatten(items):
        for item in items:
            if isinstance(item, torch.Tensor):
                yield item
            elif isinstance(item, (list, tuple)):
                yield from flatten(item)

    results = []
    for device in ("cpu", "cuda"):
        moved = [move(a, device) for a in args]
        out = op(*moved)
        out = list(out) if isinstance(out, (list, tuple)) else [out]
        results.append(list(flatten([*out, *moved])))
    for a, b in zip(*results, strict=True):
        assert b.is_cuda
        same(a, b)
    return results[0]


def test_the_machine_converts_every_float_as_the_header_does():
    # All f32 with 12 low mantissa bits zero, and their neighbours: every rounding case of f16,
    # e4m3 and e5m2, every subnormal, every NaN exponent.
    bits = torch.arange(-(2**19), 2**19, dtype=torch.int64) << 12
    bits = torch.cat([bits, bits + 1, bits - 1]).clamp(-(2**31), 2**31 - 1).to(torch.int32)
    x = bits.view(torch.float32)
    one = torch.ones(())
    for dtype in CODES:
        q, _, _ = both(lambda x, s, d=dtype: ops.quantize(
            x, d, s, None, "tensor", 0, True, False, 0), x, one)[:3]  # fmt: skip
        for out in FLOATS:
            both(lambda q, s, o=out: ops.dequantize(q, s, o, "tensor", 0), q, one)


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("stochastic", [False, True])
def test_quantize_and_dequantize(granularity, power_of_two, stochastic):
    for shape, dtype, to in itertools.product(SHAPES, FLOATS, CODES):
        x = values(shape, dtype)
        q, scale, _ = both(
            lambda x, to=to: ops.quantize(
                x, to, None, None, granularity, 32, power_of_two, stochastic, 7
            ),
            x,
        )[:3]
        both(lambda q, s, d=dtype: ops.dequantize(q, s, d, granularity, 32), q, scale)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite(bad):
    for dtype, to in itertools.product(FLOATS, CODES):
        x = values((9, 70), dtype)
        x[4, 3] = bad
        both(lambda x, to=to: ops.quantize(
            x, to, None, None, "tensor", 0, True, False, 0), x)  # fmt: skip


@pytest.mark.parametrize("op", ["quantize", "cast_transpose"])
def test_delayed_scaling(op):
    history = torch.zeros(17)
    for step in range(40):
        x = values((130, 48), torch.bfloat16, step) * 2.0 ** (step % 5)
        if step == 30:
            x[3, 3] = float("inf")
        if op == "quantize":
            out = both(lambda x, h: ops.quantize(
                x, FP8[0], None, h, "tensor", 0, True, False, 0), x, history)  # fmt: skip
        else:
            out = both(lambda x, h: ops.cast_transpose(x, FP8[0], None, h, True), x, history)
        history = out[-1]


@pytest.mark.parametrize("to", FP8)
def test_cast_transpose(to):
    shapes = [(1, 1), (16, 16), (63, 65), (128, 128), (129, 257), (1000, 33), (512, 1024)]
    for shape, dtype in itertools.product(shapes, FLOATS):
        x = values(shape, dtype)
        q, qt, *_ = both(lambda x: ops.cast_transpose(x, to, None, None, True), x)
        same(q.view(torch.uint8).t(), qt.view(torch.uint8))
        both(lambda x, s: ops.cast_transpose(x, to, s, None, True), x, torch.tensor(0.25))


def test_grad_norm():
    sizes = [1, 33, 16384, 16385, 100_000, 3_000_000]
    types = [torch.float32, torch.bfloat16, *CODES]
    grads = [values((n,), types[i % 5], i) for i, n in enumerate(sizes)]
    none = torch.empty(0)
    scales = [torch.tensor(0.5 - i) if i % 2 else none for i in range(len(grads))]
    amaxes = [torch.tensor(1.0) if i % 2 else none for i in range(len(grads))]
    norm, _ = both(ops.grad_norm, grads, scales, amaxes)[:2]
    assert norm.isfinite()
    amaxes[1] = torch.tensor(float("nan"))
    assert both(ops.grad_norm, grads, scales, amaxes)[0].isnan()


@pytest.mark.parametrize("target", [*FP8, torch.bfloat16])
def test_accumulate(target):
    for n, other in itertools.product((1, 65, 100_003), (*FP8, torch.bfloat16, torch.float32)):
        args = (values((n,), target, 1), torch.tensor(0.5), torch.tensor(2.0))
        both(ops.accumulate_, *args, values((n,), other, 2), torch.tensor(0.25), None)


def adam_arguments(shapes, low=True):
    none = torch.empty(0)
    n = len(shapes)
    weight, first, second = (torch.float16, FP8[0], torch.float16) if low else (torch.float32,) * 3
    one = lambda value: [torch.tensor(value) if low else none for _ in range(n)]  # noqa: E731
    return [
        [values(s, weight, i) for i, s in enumerate(shapes)], one(0.5), one(4096.0),
        [torch.zeros(s, dtype=first) for s in shapes], one(1.0), one(0.0),
        [torch.zeros(s, dtype=second) for s in shapes], one(1.0), one(0.0),
        [values(s, torch.bfloat16, 100 + i) for i, s in enumerate(shapes)], [none] * n,
        torch.full((n,), 8192.0),
        [torch.zeros(s, dtype=FP8[0]) if low else none for s in shapes],
        [torch.zeros(s[::-1], dtype=FP8[0]) if low else none for s in shapes], one(1.0),
        [torch.zeros((), dtype=torch.int64) for _ in range(n)],
        torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]] * n, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
    ]  # fmt: skip


@pytest.mark.parametrize("low", [True, False])
def test_adam(low):
    args = adam_arguments([(1, 1), (63, 65), (1000, 33), (512, 768), (16, 16)], low)
    for _ in range(3):
        ops.adam_(*args)  # states that are no longer zero
    both(ops.adam_, *args)
    args[11][2] = float("inf")
    both(ops.adam_, *args)


def test_a_captured_adam_reads_its_step_and_hyperparameters_on_the_device():
    def cuda(value):
        return [v.cuda() for v in value] if isinstance(value, list) else value.cuda()

    cpu = adam_arguments([(96, 160), (64, 64)])
    gpu = [cuda(a) for a in adam_arguments([(96, 160), (64, 64)])]
    warm = [cuda(a) for a in adam_arguments([(96, 160), (64, 64)])]
    ops.adam_(*warm)  # loads the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adam_(*gpu)
    for step in range(3):
        for hyper in (cpu[16], gpu[16]):
            hyper[:, 0] = 1e-3 * (step + 1)
        ops.adam_(*cpu)
        graph.replay()
    for a, b in zip(cpu, gpu, strict=True):
        for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
            same(x, y)


def test_ops_run_in_the_current_stream():
    x = values((4096, 4096), torch.bfloat16)
    wanted = ops.quantize(x, FP8[0], None, None, "tensor", 0, True, False, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = torch.zeros_like(x, device="cuda")
        for _ in range(50):  # work that a kernel in another stream would overtake
            y += 1
        y.copy_(x, non_blocking=True)
        got = ops.quantize(y, FP8[0], None, None, "tensor", 0, True, False, 0)
    stream.synchronize()
    for a, b in zip(wanted, got, strict=True):
        same(a, b)


def test_strided_inputs():
    x = values((64, 96), torch.float32)
    both(lambda x: ops.quantize(x.t(), FP8[0], None, None, "row", 0, True, False, 0), x)
    both(lambda x: ops.quantize(
        x.flatten()[3:], FP8[0], None, None, "tensor", 0, True, False, 0), x)  # fmt: skip


def test_mixed_devices_are_refused_by_name():
    x = torch.ones(4, 4, device="cuda")
    with pytest.raises(RuntimeError, match=r"quantize: scale must be on cuda:0 .* got cpu"):
        ops.quantize(x, FP8[0], torch.ones(()), None, "tensor", 0, True, False, 0)
    with pytest.raises(RuntimeError, match=r"cast_transpose: history must be on cuda:0"):
        ops.cast_transpose(x, FP8[0], None, torch.zeros(17), True)
    with pytest.raises(RuntimeError, match=r"grad_norm: grads must be on cuda:0 .* got cpu"):
        ops.grad_norm([x, x.cpu()], [x.new_empty(0)] * 2, [x.new_empty(0)] * 2)


def test_linear_and_adamw_train_on_the_gpu():
    # Needs gemm for CUDA; the optimizer and casts around it are compared bit by bit above.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("quaver::gemm", "CUDA"):
        pytest.skip("this build has no gemm for CUDA")
    torch.manual_seed(0)
    model = qv.convert(torch.nn.Linear(64, 64).cuda(), recipe="fp8lm-o2")
    optimizer = qv.AdamW(model.parameters(), lr=1e-2, recipe="fp8lm-o2")
    x = torch.randn(128, 64, device="cuda")
    losses = []
    for _ in range(20):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [*FP8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_shards(dtype, ranks):
    sizes = [5, 0, 16, 700, 1, 4096 * 20 + 3]
    length = sum(map(qv.ops.bucket_length, sizes)) + 64
    low = dtype in FP8
    mu = torch.full((len(sizes),), 0.35)
    scales = sums = None
    if low:
        amaxes = values((ranks, len(sizes)), torch.float32).abs()
        both(ops.share_scales, amaxes, mu, dtype)
        scales, sums = both(ops.share_scales, amaxes, None, dtype)[:2]
    tensors = [values((n,), torch.float32, i) for i, n in enumerate(sizes)]
    none = [torch.empty(0)] * len(sizes)
    bucket = both(ops.pack, tensors, none, scales, dtype, length)[0]
    shards = torch.stack([bucket.roll(16 * r) for r in range(ranks)])
    for first, last in ((0, 736), (736, length)):
        part = shards[:, first:last].contiguous()
        both(ops.reduce_shards, part, scales, sums, sizes, first, dtype)
        both(ops.reduce_shards, part, scales, None, sizes, first, torch.float32)
