"""gemm against torch's bf16 product and, where it runs, torch._scaled_mm on the same codes. On a
GPU: the products of Llama 7B's and 8B's layers, forward, dgrad and wgrad."""

from functools import partial

import common
import gpu
import torch
from common import Case

import quaver as qv

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
F32, BF16 = torch.float32, torch.bfloat16
# Out and in features of a layer's weights; attention's projections are the first.
WEIGHTS = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336))
TOKENS = (4096, 8192, 16384)  # the second is what most rows are measured at


def operands(n):
    a, b = (qv.quantize(torch.randn(n, n)) for _ in range(2))
    return a, b, a.dequantize(torch.bfloat16), b.dequantize(torch.bfloat16)


def bench(pairs):
    for n in (1024, 2048):
        a, b, wide_a, wide_b = operands(n)
        yield common.compare(
            f"gemm {n}^3, bf16 out",
            lambda wide_a=wide_a, wide_b=wide_b: wide_a @ wide_b.t(),
            lambda a=a, b=b: qv.gemm(a, b),
            baseline_name="torch bf16 matmul",
            pairs=pairs,
            flops=2 * n**3,
            bar=0.8,
        )
    yield against_scaled_mm(1024)


def against_scaled_mm(n):
    """One call only: it takes a minute on a CPU, and the ratio is in the thousands."""
    a, b, _, _ = operands(n)
    qv.gemm(a, b)
    ours = common.seconds(lambda: qv.gemm(a, b), 20)
    theirs = common.seconds(
        lambda: torch._scaled_mm(a.qdata, b.qdata.t(), a.scale, b.scale, out_dtype=torch.bfloat16),
        1,
    )
    ratio, bar = theirs / ours, 4.0
    row = {
        "name": f"gemm {n}^3, bf16 out",
        "baseline": "torch._scaled_mm, once",
        "ratio": ratio,
        "iqr": [ratio, ratio],
        "pairs": 1,
        "calls": 1,
        "baseline_s": theirs,
        "candidate_s": ours,
        "tflop_per_s": 2 * n**3 / ours / 1e12,
        "bar": bar,
        "met": ratio >= bar,
    }
    print(common.line(row), flush=True)
    return row


def scaled_mm(a, b, out_dtype=BF16, fast=True):
    """torch's product of the same codes, cuBLASLt's: tensor scales, or one for each row."""
    scale_b = b.scale.t() if b.qlayout.grain == "row" else b.scale
    return torch._scaled_mm(
        a.qdata, b.qdata.t(), a.scale, scale_b, out_dtype=out_dtype, use_fast_accum=fast
    )


def row(name, m, n, k, baseline, candidate, title, target=None, types=(E4M3, E4M3), **options):
    """Both functions take a, b and out [m, n], which is f32 where they add to it."""
    granularity, out = options.get("granularity", "tensor"), options.get("out")
    size = m * k + n * k + (0 if out is None else m * n * out.itemsize)

    def build():
        sets = []
        for _ in range(gpu.set_count(size)):
            a, b = (
                qv.quantize(gpu.randn(rows, k), dtype, granularity=granularity)
                for rows, dtype in zip((m, n), types, strict=True)
            )
            total = None if out is None else torch.zeros(m, n, dtype=out, device=gpu.DEVICE)
            sets.append((a, b, total))
        return gpu.rotate(baseline, sets), gpu.rotate(candidate, sets)

    return Case(f"{name} {m} x {n} x {k}", title, build, flops=2 * m * n * k, target=target)


def forward_rows():
    theirs, ours = (lambda a, b, _: scaled_mm(a, b)), (lambda a, b, _: qv.gemm(a, b))
    rows = [
        row("forward, fast", m, n, k, theirs, ours, "torch._scaled_mm, tensorwise", "gemm-fast")
        for n, k in WEIGHTS
        for m in TOKENS
    ]
    rows += [
        row("dgrad, fast", TOKENS[1], k, n, theirs, ours, "torch._scaled_mm, tensorwise",
            "gemm-fast", (E5M2, E4M3))
        for n, k in WEIGHTS
    ]  # fmt: skip
    rows += [
        row("forward, fast, row scales", TOKENS[1], n, k, theirs, ours, "torch._scaled_mm, rowwise",
            granularity="row")
        for n, k in WEIGHTS[:3]
    ]  # fmt: skip
    return rows


def dgrad_rows():
    types = (E5M2, E4M3)
    promoted = partial(qv.gemm, fast_accumulate=False)
    rows = []
    for n, k in WEIGHTS:
        rows.append(
            row("dgrad, promoted", TOKENS[1], k, n, lambda a, b, _: qv.gemm(a, b),
                lambda a, b, _: promoted(a, b), "gemm, fast", "gemm-promoted", types)
        )  # fmt: skip
    rows.append(
        row("dgrad, promoted", TOKENS[1], *WEIGHTS[0], lambda a, b, _: scaled_mm(a, b, fast=False),
            lambda a, b, _: promoted(a, b), "torch._scaled_mm, promoted", types=types)
    )  # fmt: skip
    return rows


def wgrad_rows():
    """Tokens are what is summed over. torch has no product that adds to f32, hence the sum."""

    def theirs(a, b, out):
        return out.add_(scaled_mm(a, b, F32, fast=False))

    def ours(a, b, out):
        return qv.gemm(a, b, out=out, accumulate=True, fast_accumulate=False)

    return [
        row("wgrad, f32 accumulated", n, k, tokens, theirs, ours, "torch._scaled_mm + add_",
            "gemm-wgrad" if tokens == TOKENS[0] else None, (E5M2, E4M3), out=F32)
        for tokens in (TOKENS[0], TOKENS[-1])
        for n, k in WEIGHTS[:3]
    ]  # fmt: skip


def fp8_rows():
    # Any scale that puts the products into e4m3's range will do: an amax of some 5 does.
    def ours(a, b, _):
        return qv.gemm(a, b, E4M3, out_scale=a.amax)

    def composed(a, b, _):
        return qv.quantize(scaled_mm(a, b), scale=a.amax)

    rows = [
        row("forward, FP8 out and amax", TOKENS[1], n, k, lambda a, b, _: qv.gemm(a, b), ours,
            "gemm, bf16 out", "gemm-fp8-out")
        for n, k in WEIGHTS[:3]
    ]  # fmt: skip
    n, k = WEIGHTS[1]
    title = "torch._scaled_mm + quantize"
    return [*rows, row("forward, FP8 out and amax", TOKENS[1], n, k, composed, ours, title)]


def cases(device):
    if device == "cpu":
        return []  # `bench` has them
    return [*forward_rows(), *dgrad_rows(), *wgrad_rows(), *fp8_rows()]


if __name__ == "__main__":
    common.main("gemm", bench, cases=cases)
