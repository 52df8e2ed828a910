"""The table of test_cuda.py: for each op, calls whose results must be the same bits on the CPU and
on CUDA. A new op gets a function here, which yields (what it is about, the op's arguments).

Arguments are on the CPU; test_cuda.py moves copies. Tensors of the arguments are compared after
the call too, so an in-place op needs nothing else.
"""

import itertools

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CODES = (*FP8, torch.float16)
SHAPES = ((1,), (7,), (4097,), (16, 64), (63, 65), (1000, 33), (128, 4096), (3, 5, 130))
MATRICES = ((1, 1), (16, 16), (63, 65), (128, 128), (129, 257), (1000, 33), (512, 1024))
NOT_FINITE = (float("inf"), -float("inf"), float("nan"))
ops = torch.ops.quaver

CASES = {}
# Compared with a tolerance, in test_gemm.py.
NOT_BITWISE = ("gemm", "gemm_")


def cases(op):
    """Registers the calls of one op."""

    def register(function):
        CASES[op] = function
        return function

    return register


def values(shape, dtype, seed=0):
    """Normal values over many binades, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
    x[torch.rand(shape, generator=generator) < 0.01] = 0
    return x.to(dtype)


def misaligned(x, device="cpu"):
    """The same values, contiguous, one element behind a 16-byte boundary."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def every_rounding():
    """All f32 whose 12 low mantissa bits are zero, and their neighbours: every case of rounding to
    f16, e4m3 and e5m2, every subnormal, NaNs of every kind."""
    bits = torch.arange(-(2**19), 2**19, dtype=torch.int64) << 12
    bits = torch.cat([bits, bits + 1, bits - 1]).clamp(-(2**31), 2**31 - 1)
    return bits.to(torch.int32).view(torch.float32)


def histories(cast):
    """States of delayed scaling: empty, warming up, full, and wrapped, made by `cast(x, state)`."""
    state = torch.zeros(17)
    for step in range(41):
        if step in (0, 5, 15, 16, 17, 31, 40):
            yield step, state.clone()
        cast(values((8, 16), torch.bfloat16, step) * 2.0 ** (step % 5), state)


def _quantize(x, to, scale=None, history=None, granularity="tensor", power_of_two=True,
              stochastic=False):  # fmt: skip
    return x, to, scale, history, granularity, 32, power_of_two, stochastic, 7


@cases("quantize")
def quantize():
    for granularity, power_of_two, stochastic in itertools.product(
        ("tensor", "row", "block"), (True, False), (False, True)
    ):
        for shape, dtype, to in itertools.product(SHAPES, FLOATS, CODES):
            yield (
                f"{shape} {dtype} to {to}, {granularity}, {power_of_two=}, {stochastic=}",
                _quantize(values(shape, dtype), to, None, None, granularity, power_of_two,
                          stochastic),
            )  # fmt: skip
    for to in CODES:
        yield f"every rounding to {to}", _quantize(every_rounding(), to, torch.ones(()))
        for dtype, bad in itertools.product(FLOATS, NOT_FINITE):
            x = values((9, 70), dtype)
            x[4, 3] = bad
            yield f"{bad} in {dtype} to {to}", _quantize(x, to)
    cast = lambda x, state: ops.quantize(*_quantize(x, FP8[0], None, state))  # noqa: E731
    for step, state in histories(cast):
        for bad in (None, float("inf")):
            x = values((130, 48), torch.bfloat16, step)
            if bad is not None:
                x[3, 3] = bad
            yield f"delayed, {step} casts before, {bad}", _quantize(x, FP8[0], None, state)
    x = values((64, 96), torch.float32)
    yield "a transposed view", _quantize(x.t(), FP8[0], granularity="row")
    yield "a misaligned view", _quantize(misaligned(x), FP8[0])
    yield "nothing", _quantize(values((0, 8), torch.float32), FP8[0], granularity="row")


@cases("dequantize")
def dequantize():
    for granularity in ("tensor", "row", "block"):
        for shape, code, out in itertools.product(SHAPES, CODES, FLOATS):
            x = values(shape, torch.float32)
            q, scale, _ = ops.quantize(*_quantize(x, code, granularity=granularity))
            yield f"{code} to {out} {shape}, {granularity}", (q, scale, out, granularity, 32)
    codes = torch.arange(256, dtype=torch.uint8)
    for code, out in itertools.product(FP8, FLOATS):
        for scale in (1.0, -0.37, 2.0**-120):
            yield (
                f"every code of {code} to {out}, scale {scale}",
                (codes.view(code), torch.tensor(scale), out, "tensor", 0),
            )
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for out in FLOATS:
        yield f"every f16 to {out}", (half, torch.tensor(0.37), out, "tensor", 0)


@cases("cast_transpose")
def cast_transpose():
    for shape, dtype, to in itertools.product(MATRICES, FLOATS, FP8):
        x = values(shape, dtype)
        yield f"{shape} {dtype} to {to}", (x, to, None, None, True)
        yield f"{shape} {dtype} to {to}, scale given", (x, to, torch.tensor(0.25), None, True)
    for step, state in histories(lambda x, state: ops.cast_transpose(x, FP8[1], None, state, True)):
        x = values((130, 48), torch.bfloat16, step)
        yield f"delayed, {step} casts before", (x, FP8[1], None, state, True)
    x = values((160, 144), torch.bfloat16)
    yield "a transposed view", (x.t(), FP8[0], None, None, False)
    yield "a misaligned view", (misaligned(x), FP8[0], None, None, True)


@cases("grad_norm")
def grad_norm():
    sizes = (1, 33, 16384, 16385, 100_000, 3_000_000)
    types = (torch.float32, torch.bfloat16, *CODES)
    none = torch.empty(0)
    for bad in (None, float("nan")):
        grads = [values((n,), types[i % 5], i) for i, n in enumerate(sizes)]
        scales = [torch.tensor(0.5 - i) if i % 2 else none for i in range(len(sizes))]
        amaxes = [torch.tensor(1.0) if i % 2 else none for i in range(len(sizes))]
        if bad is not None:
            amaxes[1] = torch.tensor(bad)
        yield f"every type, amax {bad}", (grads, scales, amaxes)
    many = [misaligned(values((i % 40 + 1,), torch.bfloat16, i)) for i in range(700)]
    yield "700 misaligned", (many, [none] * 700, [none] * 700)


@cases("accumulate_")
def accumulate():
    for target in (*FP8, torch.bfloat16):
        for n, other in itertools.product((1, 65, 100_003), (*FP8, torch.bfloat16, torch.float32)):
            for amax in (2.0, float("inf")):
                yield (
                    f"{other} to {target}, {n}, amax {amax}",
                    (values((n,), target, 1), torch.tensor(0.5), torch.tensor(amax),
                     values((n,), other, 2), torch.tensor(0.25), None),
                )  # fmt: skip


def adam_arguments(shapes, low=True, copies=True, move=lambda t: t):
    """Arguments of adam_ for weights in the states of fp8lm-o2, or all in f32."""
    none = torch.empty(0)
    n = len(shapes)
    weight, first, second = (torch.float16, FP8[0], torch.float16) if low else (torch.float32,) * 3
    copies = copies and low

    def one(value, there=low):
        return [torch.tensor(value) if there else none for _ in shapes]

    def zeros(dtype, there=True, transposed=False):
        return [
            move(torch.zeros(s[::-1] if transposed else s, dtype=dtype)) if there else none
            for s in shapes
        ]

    return [
        [move(values(s, weight, i)) for i, s in enumerate(shapes)], one(0.5), one(4096.0),
        zeros(first), one(1.0), one(0.0),
        zeros(second), one(1.0), one(0.0),
        [move(values(s, torch.bfloat16, 100 + i)) for i, s in enumerate(shapes)], [none] * n,
        torch.full((n,), 8192.0),
        zeros(FP8[0], copies), zeros(FP8[0], copies, transposed=True), one(1.0, copies),
        [torch.zeros((), dtype=torch.int64) for _ in range(n)],
        torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]] * n, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
    ]  # fmt: skip


@cases("adam_")
def adam():
    shapes = ((1, 1), (63, 65), (1000, 33), (512, 768), (16, 16), (0, 5))
    for low, copies in ((True, True), (True, False), (False, False)):
        for steps in (0, 3):
            args = adam_arguments(shapes, low, copies)
            for _ in range(steps):
                ops.adam_(*args)  # states that are no longer zero
            yield f"{low=} {copies=} after {steps} steps", args
    bad = adam_arguments(shapes)
    bad[11][2] = float("inf")
    yield "a step that is skipped", bad
    yield "misaligned", adam_arguments(((96, 160),), move=misaligned)
    yield "many", adam_arguments(tuple((i % 4 + 1, i % 9 + 1) for i in range(300)))
