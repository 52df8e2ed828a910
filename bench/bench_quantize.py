"""quantize, dequantize and cast_transpose against torch's casts, which scale nothing and look for
no amax, and on a GPU against a copy that moves the same bytes."""

from functools import partial

import common
import gpu
import torch
from common import Case
from targets import COPY

import quaver as qv

N = 4096
SHAPES = ((4096, 4096), (8192, 4096), (8192, 11008))  # on a GPU: activations of Llama 7B, bf16
E4M3 = torch.float8_e4m3fn
HISTORY = 17  # values of the delayed scaling state


def to_fp8(x):
    return x.to(E4M3)


def to_fp8_twice(x):
    q = x.to(E4M3)
    return q, q.t().contiguous()


def cpu_cases():
    x = torch.randn(N, N)
    shape, to, traffic = f"{N}^2 f32", "x.to(float8_e4m3fn)", 5 * N * N

    def row(name, call, bar, bytes, baseline=to_fp8, title=to):
        return Case(name, title, lambda: (lambda: baseline(x), call), bytes=bytes, bar=bar)

    scale, power = torch.tensor(0.01), torch.tensor(2.0**-6)
    return [
        row(f"quantize {shape}, given 2^k scale", lambda: qv.quantize(x, scale=power), 2.0,
            traffic),
        row(f"quantize {shape}, given scale", lambda: qv.quantize(x, scale=scale), 2.0, traffic),
        row(f"quantize {shape}, just in time", lambda: qv.quantize(x), 1.2, 9 * N * N),
        row(f"cast_transpose {shape}, just in time", lambda: qv.cast_transpose(x), 2.5, 10 * N * N,
            to_fp8_twice, "to + .t().contiguous()"),
    ]  # fmt: skip


def inputs(shape):
    """Rotating inputs, each with a history in which delayed scaling has its scale."""
    sets = []
    for _ in range(gpu.set_count(2 * shape[0] * shape[1])):
        x, history = gpu.randn(*shape), torch.zeros(HISTORY, device=gpu.DEVICE)
        for _ in range(HISTORY - 1):
            qv.quantize(x, history=history)
        sets.append((x, history))
    return sets


def cuda_row(name, shape, call, per_element, target=None, baseline=None, title=COPY):
    """`per_element` bytes move for each element; without a baseline it is a copy of as many."""
    bytes = per_element * shape[0] * shape[1]

    def build():
        sets = inputs(shape)
        other = gpu.copy(bytes) if baseline is None else gpu.rotate(baseline, sets)
        return other, gpu.rotate(call, sets)

    return Case(f"{name} {shape[0]} x {shape[1]}", title, build, bytes=bytes, target=target)


def dequantize_row(shape):
    bytes = 3 * shape[0] * shape[1]

    def build():
        sets = [(qv.quantize(x),) for x, _ in inputs(shape)]
        return gpu.copy(bytes), gpu.rotate(lambda t: t.dequantize(torch.bfloat16), sets)

    return Case(f"dequantize {shape[0]} x {shape[1]}", COPY, build, bytes=bytes)


def delayed(op, x, history):
    return op(x, history=history)


def now(op, x, _):
    return op(x)


def cuda_cases():
    quantize, cast_transpose = qv.quantize, qv.cast_transpose
    cases = []
    for shape in SHAPES:
        cases += [
            cuda_row("quantize, delayed", shape, partial(delayed, quantize), 3, "cast"),
            cuda_row("quantize, just in time", shape, partial(now, quantize), 5),
            cuda_row("cast_transpose, delayed", shape, partial(delayed, cast_transpose), 4,
                     "cast-transpose"),
            cuda_row("cast_transpose, just in time", shape, partial(now, cast_transpose), 6),
            dequantize_row(shape),
        ]  # fmt: skip
    shape = SHAPES[1]
    cases += [
        cuda_row("quantize, delayed", shape, partial(delayed, quantize), 3,
                 baseline=lambda x, _: to_fp8(x), title="x.to(float8_e4m3fn)"),
        cuda_row("cast_transpose, delayed", shape, partial(delayed, cast_transpose), 4,
                 baseline=lambda x, _: to_fp8_twice(x), title="to + .t().contiguous()"),
    ]  # fmt: skip
    return cases


def cases(device):
    return cuda_cases() if device == "cuda" else cpu_cases()


if __name__ == "__main__":
    common.main("quantize", cases=cases)
