"""The CPU's memory-bound ops against a copy that moves the same bytes, on each instruction set, and
its products against torch's.

A copy is what the memory allows; nothing that reads and writes as much is faster. A value that an
op must read twice (for its amax, then to cast it) counts twice. `--isa avx2` measures the narrower
instructions on a machine that has wider ones.

Where others use the memory too, a copy's speed may double from one minute to the next, and halve
the ratio of an op that is bound by its instructions: each row has the copy's GB/s beside its own.
"""

import argparse
import json
import math

import common
import torch
from bench_optimizer import coat_step, count, quaver_step
from common import Case

import quaver as qv
from quaver import _C

COPY = "a copy of the same bytes"
SIDE = 4480  # a square of 20 M values
# Rows and columns of a norm and an MLP of Llama 7B, of 20 M values.
NORM, MLP = (4864, 4096), (1792, 11008)
BLOCK = 32  # values for each scale of what norms and activations save
SAVED = 1 + 1 / BLOCK  # bytes of such a value
TENSORS = ((400, 250),) * 200  # 20 M parameters
E4M3, F32, BF16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
ISAS = ("avx512", "avx2")  # in the order of a bar's two values


def copy(bytes):
    """A copy that moves `bytes` in all: half of them read, half written."""
    source = torch.randint(256, (bytes // 2,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def row(name, elements, per_element, bars, make):
    """A row of the function that `make()` gives, which moves `per_element` bytes an element."""
    bytes = round(per_element * elements)
    bar = bars[ISAS.index(_C.build_info()["cpu_isa"])]
    return Case(name, COPY, lambda: (copy(bytes), make()), bytes=bytes, bar=bar)


def casts():
    n = SIDE * SIDE

    def of(dtype, call):
        def make():
            x, scale = torch.randn(SIDE, SIDE).to(dtype), torch.tensor(0.01)
            return lambda: call(x, scale)

        return make

    for dtype, size in ((F32, 4), (BF16, 2)):
        name = str(dtype).removeprefix("torch.")
        yield row(f"quantize {name}, scale given", n, size + 1, (0.85, 0.80),
                  of(dtype, lambda x, scale: qv.quantize(x, scale=scale)))  # fmt: skip
        yield row(f"quantize {name}, just in time", n, 2 * size + 1, (0.75, 0.70),
                  of(dtype, lambda x, scale: qv.quantize(x)))  # fmt: skip
        yield row(f"cast_transpose {name}, just in time", n, 2 * size + 2, (0.70, 0.60),
                  of(dtype, lambda x, scale: qv.cast_transpose(x)))  # fmt: skip


def warm():
    """A history in which delayed scaling has its scale."""
    history = torch.zeros(17)
    for _ in range(16):
        qv.quantize(torch.randn(256, 256), history=history)
    return history


def norm_inputs(centered):
    width = NORM[1]
    x, weight = torch.randn(NORM, dtype=BF16), torch.randn(width, dtype=BF16)
    bias = torch.randn(width, dtype=BF16) if centered else None
    return x, weight, bias, {"centered": centered, "block": BLOCK}


def norms():
    n = math.prod(NORM)

    def forward(centered):
        x, weight, bias, options = norm_inputs(centered)
        history = warm()
        return lambda: qv.ops.normalize(x, weight, bias, history=history, **options)

    def backward(centered):
        x, weight, bias, options = norm_inputs(centered)
        out, dy = qv.ops.normalize(x, weight, bias, **options), torch.randn_like(x)
        return lambda: qv.ops.normalize_backward(dy, out.saved, out.mean, out.rstd, weight)

    for name, centered in (("RMSNorm", False), ("LayerNorm", True)):
        # The input is read; codes in both layouts and the saved input are written.
        yield row(f"normalize {name} bf16, delayed", n, 4 + SAVED, (0.55, 0.40),
                  lambda centered=centered: forward(centered))  # fmt: skip
        yield row(f"normalize_backward {name} bf16", n, 4 + SAVED, (0.50, 0.35),
                  lambda centered=centered: backward(centered))  # fmt: skip


def activations():
    n = math.prod(MLP)

    def inputs(gated):
        return [torch.randn(MLP, dtype=BF16) for _ in range(2 if gated else 1)]

    def forward(kind, gated):
        x, history = inputs(gated), warm()
        return lambda: qv.ops.activate(*x, kind=kind, history=history, block=BLOCK)

    def backward(kind, gated):
        saved = qv.ops.activate(*inputs(gated), kind=kind, block=BLOCK)
        dy = torch.randn(MLP, dtype=BF16)
        histories = {"x_history": warm()} | ({"up_history": warm()} if gated else {})
        return lambda: qv.ops.activate_backward(dy, saved.x, saved.up, kind=kind, **histories)

    for name, kind, gated in (("SwiGLU", "silu", True), ("GELU", "gelu_tanh", False)):
        inputs_read = 2 if gated else 1
        yield row(f"activate {name} bf16, delayed", n, inputs_read * (2 + SAVED) + 2, (0.55, 0.40),
                  lambda kind=kind, gated=gated: forward(kind, gated))  # fmt: skip
        yield row(f"activate_backward {name} bf16, delayed", n, 2 + inputs_read * (2 + SAVED),
                  (0.50, 0.35), lambda kind=kind, gated=gated: backward(kind, gated))  # fmt: skip


def optimizers():
    n = count(TENSORS)
    moments = 2 * (2 + 8 / 128)

    def packed():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in TENSORS]
        for p in params:
            p.grad = torch.randn_like(p)
        return qv.AdamW(params, recipe="adamw-4bit", lr=3e-4).step

    yield row("AdamW.step fp8lm-o2", n, 1 + 2 * (2 + 1 + 2), (0.80, 0.60),
              lambda: quaver_step("fp8lm-o2", TENSORS, "cpu"))  # fmt: skip
    yield row("AdamW.step coat, bf16 stochastic", n, 2 + 2 * 2 + moments, (0.55, 0.35),
              lambda: coat_step("bf16 stochastic", TENSORS, "cpu"))  # fmt: skip
    # Rank-1 scales are known after a pass over the moments, which reads all of it once more.
    yield row("AdamW.step adamw-4bit", n, 4 + 2 * 4 + 2 + (4 + 1), (0.50, 0.30), packed)


def gradients():
    n = 20_000_000
    shapes = 16 * (n // 16,)

    def accumulate():
        a, b = (qv.quantize(torch.randn(n)) for _ in range(2))
        parts = a.qdata, a.scale, a.amax, b.qdata, b.scale, b.amax
        return lambda: torch.ops.quaver.accumulate_(*parts)

    def norm():
        grads = [qv.quantize(torch.randn(size)) for size in shapes]
        return lambda: qv.ops.grad_norm(grads)

    scales = torch.full((len(shapes),), 2.0**-6)

    def pack():
        grads = [torch.randn(size, dtype=BF16) for size in shapes]
        return lambda: qv.ops.pack(grads, E4M3, n, scales)

    def reduce(ranks):
        codes = torch.stack(
            [qv.ops.pack([torch.randn(s) for s in shapes], E4M3, n, scales) for _ in range(ranks)]
        )
        sizes = list(shapes)
        return lambda: qv.ops.reduce_shards(codes, sizes, 0, scales, scales * ranks)

    bars = 0.60, 0.50
    # Both are read for the amax of the sum, then read again, and the sum is written.
    yield row("accumulate_ e4m3", n, 5, bars, accumulate)
    yield row("grad_norm e4m3", n, 1, bars, norm)
    yield row("pack bf16 to e4m3", n, 3, bars, pack)
    for ranks in (2, 8):
        yield row(f"reduce_shards, {ranks} shards of e4m3", n, ranks + 1, bars,
                  lambda ranks=ranks: reduce(ranks))  # fmt: skip


def products():
    """Against torch's product of the same values, in the format that the instructions multiply."""
    dtype, name = {"avx512": (BF16, "bf16"), "avx2": (F32, "f32")}[_C.build_info()["cpu_isa"]]
    sizes = ((1024, 1024, 1024), (2048, 2048, 2048), (2048, 768, 3072))
    for m, n, k in (*sizes, (512, 256, 256), (512, 128, 512)):  # the last two as `tiny` has them

        def build(m=m, n=n, k=k):
            a, b = qv.quantize(torch.randn(m, k)), qv.quantize(torch.randn(n, k))
            wide_a, wide_b = a.dequantize(dtype), b.dequantize(dtype)
            return lambda: wide_a @ wide_b.t(), lambda: qv.gemm(a, b, dtype)

        yield Case(f"gemm {m} x {n} over {k}, {name} out", f"torch's {name} product", build,
                   flops=2 * m * n * k, bar=1.0 if (m, n, k) in sizes else None)  # fmt: skip


KINDS = (casts, norms, activations, optimizers, gradients, products)


def beside_copy(row):
    """The row with the GB/s of its copy."""
    if "gb_per_s" not in row:  # a product, or a row that failed
        return row
    return row | {"copy_gb_per_s": row["gb_per_s"] * row["candidate_s"] / row["baseline_s"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    isas = [isa for isa in ISAS if isa in _C.available_isas()]
    parser.add_argument("--isa", choices=isas, help="default: all that this machine has")
    parser.add_argument("--only", default="", help="rows whose names begin so")
    parser.add_argument("--pairs", type=int, default=common.PAIRS)
    parser.add_argument("--list", action="store_true", help="show the rows and measure nothing")
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = []
    for isa in [args.isa] if args.isa else isas:
        _C.set_cpu_isa(isa)
        print(isa)
        cases = [case for kind in KINDS for case in kind() if case.name.startswith(args.only)]
        if args.list:
            print(*(json.dumps(case.heading()) for case in cases), sep="\n")
            continue
        measured = [beside_copy(row) for row in common.run_cases(cases, args.pairs)]
        speeds = [row["copy_gb_per_s"] for row in measured if "copy_gb_per_s" in row]
        if speeds:
            print(f"{isa}: the copies ran at {min(speeds):.0f} to {max(speeds):.0f} GB/s")
        rows += [{**found, "name": f"{found['name']} ({isa})"} for found in measured]
    if args.list or args.only:
        return
    common.finish("cpu", rows)


if __name__ == "__main__":
    main()
