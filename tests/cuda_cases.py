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
# Ops that compute no bits of their own, or not the same on both, and where they are tested.
ELSEWHERE = {
    "gemm": "test_gemm_device.py",
    "gemm_": "test_gemm_device.py",
    "gemm_quantize": "test_gemm_device.py",
    "grouped_gemm": "test_grouped.py",
    "grouped_gemm_weight": "test_grouped.py",
    "linear": "test_linear_ops.py",
    "linear_backward": "test_linear_ops.py",
    "comm_id_": "test_comm.py",
    "comm_create": "test_comm.py",
    "comm_all_to_all_": "test_comm.py",
    "comm_all_gather_": "test_comm.py",
    "comm_all_reduce_": "test_comm.py",
    "comm_broadcast_": "test_comm.py",
    "comm_sums_fp8": "test_comm.py",
    "comm_check": "test_comm.py",
    "comm_abort": "test_comm.py",
    "comm_close": "test_comm.py",
}


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
        for factor in (1e4, 1e-4):  # a forecast that does not fit
            far = values((130, 48), torch.bfloat16, step) * factor
            yield f"delayed, {step} casts before, x {factor}", _quantize(far, FP8[0], None, state)
    for shape, dtype, to in itertools.product(MATRICES, FLOATS, CODES):
        yield (
            f"tiles, {shape} {dtype} to {to}",
            _quantize(values(shape, dtype), to, granularity="tile"),
        )
    x = values((64, 96), torch.float32)
    yield "a transposed view", _quantize(x.t(), FP8[0], granularity="row")
    yield "a misaligned view", _quantize(misaligned(x), FP8[0])
    yield "nothing", _quantize(values((0, 8), torch.float32), FP8[0], granularity="row")


@cases("dequantize")
def dequantize():
    for shape, code, out in itertools.product(MATRICES, CODES, FLOATS):
        q, scale, _ = ops.quantize(
            *_quantize(values(shape, torch.float32), code, granularity="tile")
        )
        yield f"{code} to {out} {shape}, tile", (q, scale, out, "tile", 128)
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


# Ragged, with empty groups and rows of none.
ENDS = ((37, 37, 38, 300), (0, 128, 256, 256), (1, 2, 3, 4), (0, 0, 0, 0))


@cases("cast_groups")
def cast_groups():
    grains = (("tensor", False), ("row", False), ("block", False), ("block", True))
    for ends, dtype, to, (grain, tiles_t) in itertools.product(ENDS, FLOATS, FP8, grains):
        for cols, bad in ((144, None), (33, NOT_FINITE[0])):
            x = values((300, cols), dtype)
            if bad is not None:
                x[40, 3] = bad
            args = x, torch.tensor(ends), to, grain, True, tiles_t, tiles_t
            yield f"{ends} {cols} {dtype} to {to}, {grain} {tiles_t} {bad}", args
    no_group, no_row = (torch.zeros(count, dtype=torch.long) for count in (0, 3))
    for grain, columns in itertools.product(("tensor", "row", "block"), (True, False)):
        x, rows = values((20, 40), torch.float32), torch.empty(0, 40)
        yield f"no row, {grain} {columns:d}", (rows, no_row, FP8[0], grain, columns)
        yield f"no group, {grain} {columns:d}", (x, no_group, FP8[0], grain, columns)


@cases("cast_stack")
def cast_stack():
    grains, kinds = ("tensor", "row", "block", "tile"), [(True, True), (True, False), (False, True)]
    for shape, dtype, grain in itertools.product(MATRICES, FLOATS, grains):
        for rows, columns in kinds:
            x = values((3, *shape), dtype)
            args = x, FP8[0], grain, None, rows, columns, rows and columns
            yield f"{shape} {dtype}, {grain}, {rows:d}{columns:d}", args
    for grain, bad in itertools.product(grains, NOT_FINITE):
        x = values((3, 160, 144), torch.float32)
        x[1, 4, 3] = bad
        yield f"{bad}, {grain}", (x, FP8[1], grain)
    x = values((3, 130, 33), torch.bfloat16)
    yield "given", (x, FP8[0], "tensor", torch.tensor([0.5, 3.0, 0.37]))
    yield "no matrix", (torch.empty(0, 16, 32), FP8[0], "tile")


@cases("cast_layouts")
def cast_layouts():
    grains, kinds = ("row", "block", "tile"), [(True, True), (True, False), (False, True)]
    for shape, dtype, to, grain in itertools.product(MATRICES, FLOATS, FP8, grains):
        x = values(shape, dtype)
        for rows, columns in kinds:
            name = f"{shape} {dtype} to {to}, {grain}, {rows:d}{columns:d}"
            yield name, (x, to, grain, rows, columns, False)
        yield f"{shape} {dtype} to {to}, {grain}, powers of two", (x, to, grain, True, True, True)
    for grain, bad in itertools.product(grains, NOT_FINITE):
        x = values((160, 144), torch.float32)
        x[4, 3] = bad
        yield f"{bad}, {grain}", (x, FP8[0], grain, True, True, False)
    for shape, bad in itertools.product(MATRICES, (None, *NOT_FINITE)):
        x = values(shape, torch.bfloat16)
        if bad is not None and x.numel():
            x[-1, -1] = bad
        yield f"{shape}, tiles beside blocks, {bad}", (x, FP8[0], "block", True, True, True, True)
    for grain in grains:
        x = values((160, 144), torch.float32)
        yield f"a transposed view, {grain}", (x.t(), FP8[0], grain, True, True, False)
        yield f"a misaligned view, {grain}", (misaligned(x), FP8[0], grain, True, True, False)


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
        [move(values(s, weight, i)) for i, s in enumerate(shapes)] + zeros(first) + zeros(second),
        one(0.5) + one(1.0) + one(1.0), one(4096.0) + one(0.0) + one(0.0),
        [move(values(s, torch.bfloat16, 100 + i)) for i, s in enumerate(shapes)], [none] * n,
        torch.full((n,), 8192.0),
        [torch.zeros((), dtype=torch.int64) for _ in range(n)],
        torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]] * n, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
        zeros(FP8[0], copies) + zeros(FP8[0], copies, transposed=True) + one(1.0, copies),
        [], [], [], list(range(n)) if low else [], [3 * i for i in range(n)],
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
    bad[5][2] = float("inf")
    yield "a step that is skipped", bad
    yield "misaligned", adam_arguments(((96, 160),), move=misaligned)
    yield "many", adam_arguments(tuple((i % 4 + 1, i % 9 + 1) for i in range(300)))

    for bad in (False, True):
        args = adam_arguments_in_groups(((10, 20), (63, 65), (1000, 33), (1, 1), (0, 5)))
        for _ in range(3):
            ops.adam_(*args)
        if bad:
            args[5][1] = float("nan")
        yield f"moments in groups, bf16 weights, {bad=}", args

    for bad in (False, True):
        args = adam_arguments_of_subsets(((10, 20), (63, 65), (65, 63), (1000, 33), (1, 1)))
        for _ in range(3):
            ops.adam_(*args)
        if bad:
            args[5][1] = float("nan")
        yield f"second moments of subsets, {bad=}", args


def adam_arguments_of_subsets(shapes):
    """Arguments of adam_ for weights with a second moment of subsets: of rows, or of columns in
    bfloat16 beside a bfloat16 first moment."""
    n, none = len(shapes), torch.empty(0)
    nones, narrow = [none] * n, [(torch.float32, torch.bfloat16)[i % 2] for i in range(n)]
    widths = [-s[1] if i % 2 else s[1] for i, s in enumerate(shapes)]
    grads = [values(s, torch.float32, 100 + i) for i, s in enumerate(shapes)]
    sums = ops.subset_sums(grads, nones, nones, widths)[1]
    counts = [s[i % 2] for i, s in enumerate(shapes)]
    return [
        [values(s, dtype, i) for i, (s, dtype) in enumerate(zip(shapes, narrow, strict=True))]
        + [torch.zeros(s, dtype=dtype) for s, dtype in zip(shapes, narrow, strict=True)]
        + [torch.zeros(count, dtype=dtype) for count, dtype in zip(counts, narrow, strict=True)],
        nones * 3, nones * 3, grads, nones, torch.full((n,), 8192.0),
        [torch.zeros((), dtype=torch.int64) for _ in shapes],
        torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]] * n, dtype=torch.float64),
        torch.zeros((), dtype=torch.int64), [], [], list(sums.split(counts)), [],
        [7 if i % 2 else -1 for i in range(n)], [], widths,
    ]  # fmt: skip


@cases("subset_sums")
def subset_sums():
    none = torch.empty(0)
    for dtype, shape in itertools.product((*FLOATS, *FP8), ((7, 300), (1000, 33), (40, 1100))):
        grads = [values(shape, dtype, i) for i in range(5)]
        widths = [0, shape[1], -shape[1], 7, 10**6]
        scales = [none, torch.tensor(0.5), none, torch.tensor(-2.0), none]
        yield f"{shape} {dtype}", (grads, scales, [none] * 5, widths)
    grads = [values((64, 65), torch.float32), torch.tensor([1.0, float("inf")])]
    yield "not finite", (grads, [none] * 2, [none, torch.tensor(float("nan"))], [65, 0])
    yield "misaligned", ([misaligned(values((96, 160), torch.bfloat16))], [none], [none], [-160])
    many = [values((i % 4 + 1, i % 9 + 1), torch.float32, i) for i in range(300)]
    yield "many", (many, [none] * 300, [none] * 300, [i % 9 + 1 for i in range(300)])


def adam_arguments_in_groups(shapes):
    """Arguments of adam_ for bf16 weights, every second one with a remainder and the others rounded
    stochastically, and moments in groups, expanded or not."""
    none = torch.empty(0)
    nones = [none] * len(shapes)
    states = [
        [ops.encode_state(torch.zeros(s), FP8[0], i % 2 == 1) for i, s in enumerate(shapes)]
        for _ in range(2)
    ]
    scaling = [1 + i % 2 for i in range(len(shapes))]
    remainders = [
        torch.zeros(s, dtype=(torch.int16, torch.int8)[i // 2 % 2]) if i % 2 else none
        for i, s in enumerate(shapes)
    ]
    return [
        [values(s, torch.bfloat16, i) for i, s in enumerate(shapes)]
        + [q for some in states for q, _ in some],
        nones + [scale for some in states for _, scale in some], nones * 3,
        [values(s, torch.float32, 100 + i) for i, s in enumerate(shapes)], nones,
        torch.full((len(shapes),), 8192.0),
        [torch.zeros((), dtype=torch.int64) for _ in shapes],
        torch.tensor([[1e-3, 0.9, 0.95, 1e-8, 0.1]] * len(shapes), dtype=torch.float64),
        torch.zeros((), dtype=torch.int64), [], remainders, [], [0] * len(shapes) + 2 * scaling,
        [-1 if i % 2 else 7 + i for i in range(len(shapes))],
    ]  # fmt: skip


def adam_4bit_arguments(shapes, second, dtype=torch.float32, move=lambda t: t):
    """Arguments of adam_4bit_, every second bf16 weight with a remainder and the other 16-bit
    weights rounded stochastically."""
    none, exact = torch.empty(0), dtype == torch.bfloat16
    sizes = [torch.Size(s).numel() for s in shapes]
    codes = [torch.zeros((n + 1) // 2, dtype=torch.uint8) for n in sizes]
    groups = [-(-n // 128) for n in sizes]
    scales = [
        torch.zeros(n) if second == 0 else torch.zeros(sum(s)) if second == 1
        else torch.rand(m // s[-1] + m // s[-2]) + 0.1 if m else torch.zeros(0)
        for s, n, m in zip(shapes, groups, sizes, strict=True)
    ]  # fmt: skip
    return [
        [move(values(s, dtype, i)) for i, s in enumerate(shapes)],
        [move(c) for c in codes], [torch.zeros(n) for n in groups],
        [move(c.clone()) if second < 2 else none.byte() for c in codes], scales,
        [move(values(s, torch.bfloat16, 100 + i)) for i, s in enumerate(shapes)],
        [none for _ in shapes], torch.full((len(shapes),), 8192.0),
        [torch.zeros((), dtype=torch.int64) for _ in shapes],
        torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.1]] * len(shapes), dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
        [torch.zeros(s, dtype=(torch.int16, torch.int8)[i // 2 % 2]) if exact and i % 2 else none
         for i, s in enumerate(shapes)],
        [second] * len(shapes),
        [-1 if dtype == torch.float32 or (exact and i % 2) else i for i in range(len(shapes))],
    ]  # fmt: skip


@cases("adam_4bit_")
def adam_4bit():
    shapes = ((1, 1), (63, 65), (1000, 33), (512, 768), (16, 8, 3, 3), (0, 5))
    for dtype, second, steps in itertools.product(FLOATS, (0, 1, 2), (0, 4)):
        args = adam_4bit_arguments(shapes, second, dtype)
        for _ in range(steps):
            ops.adam_4bit_(*args)
        yield f"{dtype}, second moment {second}, after {steps} steps", args
    bad = adam_4bit_arguments(shapes, 1)
    bad[7][2] = float("inf")
    yield "a step that is skipped", bad
    yield "misaligned", adam_4bit_arguments(((96, 160),), 1, move=misaligned)
    many = tuple((i % 4 + 1, i % 9 + 1) for i in range(300))
    yield "many", adam_4bit_arguments(many, 1)


def micro_adam_arguments(shapes, dtype=torch.float32, error_block=64, alpha=0.0, move=lambda t: t):
    """Arguments of micro_adam_ that keep one element of 50 for 3 steps, every second bf16 weight
    with a remainder and the other 16-bit weights rounded stochastically."""
    none, exact = torch.empty(0), dtype == torch.bfloat16
    sizes = [torch.Size(s).numel() for s in shapes]
    rows = [n // 4096 * 82 + (n % 4096 + 49) // 50 for n in sizes]

    def zeros(lengths, dtype, *more):
        return [move(torch.zeros(*more, n, dtype=dtype)) for n in lengths]

    return [
        [move(values(s, dtype, i)) for i, s in enumerate(shapes)],
        zeros(rows, torch.int16, 3), zeros(rows, torch.bfloat16, 3),
        zeros([(n + 1) // 2 for n in sizes], torch.uint8),
        [torch.zeros(-(-n // error_block), 2, dtype=torch.bfloat16) for n in sizes],
        [move(values(s, torch.bfloat16, 100 + i)) for i, s in enumerate(shapes)],
        [none for _ in shapes], torch.full((len(shapes),), 8192.0),
        [torch.zeros((), dtype=torch.int64) for _ in shapes],
        torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.1, alpha]] * len(shapes), dtype=torch.float64),
        torch.zeros((), dtype=torch.int64),
        [torch.zeros(s, dtype=(torch.int16, torch.int8)[i // 2 % 2]) if exact and i % 2 else none
         for i, s in enumerate(shapes)],
        [82 if n >= 4096 else 0 for n in sizes], [error_block] * len(shapes),
        [-1 if dtype == torch.float32 or (exact and i % 2) else i for i in range(len(shapes))],
    ]  # fmt: skip


@cases("micro_adam_")
def micro_adam():
    shapes = ((1, 1), (63, 65), (1000, 33), (512, 768), (16, 256), (0, 5))
    for dtype, (block, alpha) in itertools.product(
        FLOATS, ((64, 0.0), (4096, 0.25), (4112, 0.0), (100_000, 0.5))
    ):
        for steps in (0, 4):
            args = micro_adam_arguments(shapes, dtype, block, alpha)
            for _ in range(steps):
                ops.micro_adam_(*args)
            yield f"{dtype}, error_block {block}, {alpha=}, after {steps} steps", args
    bad = micro_adam_arguments(shapes)
    bad[7][2] = float("inf")
    yield "a step that is skipped", bad
    yield "misaligned", micro_adam_arguments(((96, 160),), move=misaligned)
    yield "many", micro_adam_arguments(tuple((i % 4 + 1, i % 9 + 1) for i in range(300)))


@cases("encode_state")
def encode_state():
    for shape, dtype, to in itertools.product(SHAPES, FLOATS, FP8):
        for expand in (False, True):
            x = values(shape, dtype)
            yield f"{shape} {dtype} to {to}, {expand=}", (x, to, expand)
    for bad in NOT_FINITE:
        x = values((9, 70), torch.float32)
        x[4, 3] = bad
        yield f"{bad}", (x, FP8[0], True)


@cases("decode_state")
def decode_state():
    for shape, code, expand in itertools.product(SHAPES, FP8, (False, True)):
        x = values(shape, torch.float32)
        yield f"{code} {shape}, {expand=}", (*ops.encode_state(x, code, expand), expand)


NF4_SHAPES = (*SHAPES, (0, 5), (64,), (3, 4096), (33, 1003))


@cases("nf4_encode")
def nf4_encode():
    for shape, dtype, block in itertools.product(NF4_SHAPES, FLOATS, (64, 512, 4096)):
        yield f"{shape} {dtype}, block {block}", (values(shape, dtype), block)
    for bad in NOT_FINITE:
        x = values((9, 70), torch.float32)
        x[4, 3] = bad
        yield f"{bad}", (x, 64)
    yield "misaligned", (misaligned(values((96, 160), torch.bfloat16)), 64)


@cases("nf4_decode")
def nf4_decode():
    for shape, dtype, block in itertools.product(NF4_SHAPES, FLOATS, (64, 512, 4096)):
        x = values(shape, torch.float32)
        yield f"{shape} {dtype}, block {block}", (
            *ops.nf4_encode(x, block), x.numel(), dtype, block)  # fmt: skip
    codes, absmax = ops.nf4_encode(values((96, 160), torch.float32), 64)
    yield "misaligned", (misaligned(codes), absmax, 96 * 160, torch.bfloat16, 64)


@cases("rotate")
def rotate():
    for dim, dtype in itertools.product((2, 30, 64, 128, 200), (torch.float32, torch.bfloat16)):
        cos, sin = (values((9, dim), torch.float32, seed) for seed in (1, 2))
        parts = [values((2, 9, heads, dim), dtype) for heads in (4, 2, 1)]
        strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
        for inverse in (False, True):
            yield f"{dim} {dtype}, {inverse=}", (parts, cos, sin, 6, inverse)
            yield f"{dim} {dtype}, {inverse=}, strided", (strided, cos, sin, 3, inverse)
    one = misaligned(values((2, 9, 3, 64), torch.bfloat16))
    angles = values((9, 64), torch.float32)
    yield "misaligned", ([one], angles, angles, 2)
    yield "no rows", ([one[:, :0]], angles[:0], angles[:0], 2)


ACTIVATION_SHAPES = ((0, 5), (5, 0), (1, 1), (3, 33), (17, 511), (70, 513), (129, 64), (40, 4100))


def channels(cols, seed, dtype=torch.float32):
    return (1 + 0.3 * values((cols,), torch.float32, seed).clamp(-2, 2)).to(dtype)


def normalize_calls():
    """(what, arguments of normalize): every type and shape, both kinds, bad values, histories."""
    for i, (shape, centered) in enumerate(itertools.product(ACTIVATION_SHAPES, (False, True))):
        for k, source in enumerate(FLOATS):
            param = (*FLOATS, None)[(i + k) % 4]
            weight = None if param is None else channels(shape[1], 1, param)
            bias = None if param is None else channels(shape[1], 2, param)
            block = (16, 32, 7, 128)[(i + k) % 4]
            yield (
                f"{shape} {source}, parameters {param}, {centered=}, block {block}",
                (values(shape, source, i), weight, bias, 1e-5, centered, FP8[k % 2], None, None,
                 i % 3 > 0, block),
            )  # fmt: skip
    for bad in NOT_FINITE:
        x = values((9, 70), torch.bfloat16)
        x[4, 3] = bad
        yield f"{bad}", (x, None, None, 1e-5, True, FP8[0], None, None, True, 32)
    cast = lambda x, state: ops.quantize(*_quantize(x, FP8[0], None, state))  # noqa: E731
    for step, state in histories(cast):
        x = values((130, 48), torch.bfloat16, step)
        yield f"delayed, {step} casts before", (
            x, channels(48, 1), None, 1e-6, False, FP8[0], None, state, True, 32)  # fmt: skip
    x = values((160, 144), torch.bfloat16)
    given = (torch.tensor(0.25), None, True, 32)
    yield "scale given", (x, None, None, 1e-6, False, FP8[0], *given)
    yield "a misaligned view", (misaligned(x), None, None, 1e-6, False, FP8[0], *given)


@cases("normalize")
def normalize():
    yield from normalize_calls()


@cases("normalize_backward")
def normalize_backward():
    for i, (what, arguments) in enumerate(normalize_calls()):
        x, weight, bias, block = arguments[0], arguments[1], arguments[2], arguments[9]
        _, _, _, _, codes, scales, mean, rstd = ops.normalize(*arguments)
        dy = values(x.shape, FLOATS[i % 3], 50 + i)
        yield what, (dy, codes, scales, mean, rstd, weight, block, bias is not None, x.dtype)


def activate_calls():
    """(what, arguments of activate)."""
    kinds = ("silu", "gelu", "gelu_tanh")
    for i, (shape, kind) in enumerate(itertools.product(ACTIVATION_SHAPES, kinds)):
        for gated, smooth in ((False, False), (True, False), (True, True)):
            source, block = FLOATS[i % 3], (16, 32, 7, 128)[i % 4]
            yield (
                f"{shape} {source} {kind}, {gated=}, {smooth=}, block {block}",
                (values(shape, source, i), values(shape, source, 90 + i) if gated else None, kind,
                 channels(shape[1], 3) if smooth else None, FP8[i % 2], None, None, True, block),
            )  # fmt: skip
    for bad in NOT_FINITE:
        x, up = values((9, 70), torch.bfloat16), values((9, 70), torch.bfloat16, 1)
        up[4, 3] = bad
        yield f"{bad}", (x, up, "silu", None, FP8[0], None, None, True, 32)
    x = values((160, 144), torch.bfloat16)
    yield "a misaligned view", (misaligned(x), misaligned(x), "silu", None, FP8[0],
                                torch.tensor(0.25), None, False, 32)  # fmt: skip


@cases("activate")
def activate():
    yield from activate_calls()


@cases("activate_backward")
def activate_backward():
    for i, (what, arguments) in enumerate(activate_calls()):
        x, up, kind, channel_scale, block = *arguments[:4], arguments[8]
        _, _, _, _, xq, xscale, uq, uscale, _ = ops.activate(*arguments)
        if up is None:
            uq = uscale = None
        dy = values(x.shape, FLOATS[i % 3], 50 + i)
        states = [None, None] if i % 2 else [torch.zeros(17), torch.zeros(17) if up is not None
                                             else None]  # fmt: skip
        yield what, (dy, xq, xscale, uq, uscale, kind, channel_scale, block, FP8[1], *states,
                     i % 3 > 0)  # fmt: skip
        if up is not None and x.shape[1] % 16 == 0:
            yield f"{what}, joint", (dy, xq, xscale, uq, uscale, kind, channel_scale, block, FP8[1],
                                     states[0], None, i % 3 > 0, False, True)  # fmt: skip


@cases("normalize_layouts")
def normalize_layouts():
    for i, (what, arguments) in enumerate(normalize_calls()):
        x, weight, bias, eps, centered, dtype, *_, block = arguments[:10]
        yield what, (x, weight, bias, eps, centered, dtype, i % 2 > 0, i % 3 > 0, block)


@cases("activate_layouts")
def activate_layouts():
    for i, (what, arguments) in enumerate(activate_calls()):
        yield what, (*arguments[:5], i % 2 > 0, i % 3 > 0, arguments[8])


@cases("activate_backward_layouts")
def activate_backward_layouts():
    for i, (what, arguments) in enumerate(activate_backward()):
        yield what, (*arguments[:8], FP8[i % 2], i % 3 > 0)


SIZES = (5, 0, 16, 700, 1, 4096 * 20 + 3)
PLACES = sum(-(-n // 16) * 16 for n in SIZES) + 64  # of a bucket, and some behind it


def shared(ranks, dtype):
    """Scales of buckets and of sums, None for types that need none."""
    if dtype not in FP8:
        return None, None
    amaxes = values((ranks, len(SIZES)), torch.float32).abs()
    return ops.share_scales(amaxes, None, dtype)


@cases("share_scales")
def share_scales():
    for ranks, dtype in itertools.product((1, 3, 8), FP8):
        amaxes = values((ranks, 300), torch.float32).abs()
        amaxes[0, :3] = torch.tensor(NOT_FINITE).abs()
        for mu in (None, torch.full((300,), 0.35)):
            yield f"{ranks} ranks, {dtype}, mu {mu is not None}", (amaxes, mu, dtype)


def bucket(dtype, scales):
    tensors = [values((n,), torch.float32, i) for i, n in enumerate(SIZES)]
    return tensors, [torch.empty(0)] * len(SIZES), scales, dtype, PLACES


@cases("pack")
def pack():
    for dtype in (*FP8, torch.bfloat16, torch.float32):
        yield f"{dtype}", bucket(dtype, shared(3, dtype)[0])


@cases("reduce_shards")
def reduce_shards():
    for dtype, ranks in itertools.product((*FP8, torch.bfloat16, torch.float32), (1, 3, 8)):
        scales, sums = shared(ranks, dtype)
        one = ops.pack(*bucket(dtype, scales))
        shards = torch.stack([one.roll(16 * r) for r in range(ranks)])
        for first, last in ((0, 736), (736, PLACES)):
            part = shards[:, first:last].contiguous()
            for out, given in {dtype: sums, torch.float32: None}.items():
                yield (f"{dtype} to {out}, {ranks} ranks, from {first}",
                       (part, scales, given, list(SIZES), first, out))  # fmt: skip
