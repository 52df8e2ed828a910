"""gemm against torch's bf16 product and, where it runs, torch._scaled_mm on the same codes."""

import common
import torch

import quaver as qv


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


if __name__ == "__main__":
    common.main("gemm", bench, cases=lambda device: [])  # no CUDA rows yet
