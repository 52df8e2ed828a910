"""quantize and cast_transpose against torch's casts, which scale nothing and look for no amax."""

import common
import torch

import quaver as qv

N = 4096
E4M3 = torch.float8_e4m3fn


def bench(pairs):
    x = torch.randn(N, N)
    scale = torch.tensor(0.01)
    power = torch.tensor(2.0**-6)
    traffic = 5 * x.numel()  # four bytes read, one written

    def cast():
        return x.to(E4M3)

    def cast_and_transpose():
        q = x.to(E4M3)
        return q, q.t().contiguous()

    def row(name, call, baseline, baseline_name, bar, bytes):
        return common.compare(
            name, baseline, call, baseline_name=baseline_name, pairs=pairs, bytes=bytes, bar=bar
        )

    to = "x.to(float8_e4m3fn)"
    shape = f"{N}^2 f32"
    yield row(f"quantize {shape}, given 2^k scale", lambda: qv.quantize(x, scale=power), cast, to,
              2.0, traffic)  # fmt: skip
    yield row(f"quantize {shape}, given scale", lambda: qv.quantize(x, scale=scale), cast, to, 2.0,
              traffic)  # fmt: skip
    yield row(f"quantize {shape}, just in time", lambda: qv.quantize(x), cast, to, 1.2,
              2 * traffic - x.numel())  # fmt: skip
    yield row(f"cast_transpose {shape}, just in time", lambda: qv.cast_transpose(x),
              cast_and_transpose, "to + .t().contiguous()", 2.5, 10 * x.numel())  # fmt: skip


if __name__ == "__main__":
    common.main("quantize", bench)
