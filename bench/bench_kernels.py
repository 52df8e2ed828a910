"""The memory-bound ops besides casts and the optimizer, each against a copy that moves the same
bytes: sums of shards, norms and activations with their casts, gradients."""

from functools import partial

import common
import gpu
import torch
from common import Case
from targets import COPY

import quaver as qv

E4M3 = torch.float8_e4m3fn
TENSORS = 16  # of a bucket
BLOCK = 32  # values per scale of what norms and activations save
SAVED = 1 + 1 / BLOCK  # bytes of such a value
SIZES = {  # elements of a shard; rows; width of the model and of its MLP
    "cuda": (1 << 24, 8192, 4096, 11008),
    "cpu": (1 << 20, 256, 1024, 2816),
}


class Bench:
    """The device and the sizes of all cases."""

    def __init__(self, device):
        self.device = gpu.DEVICE if device == "cuda" else "cpu"
        self.rotates = device == "cuda"
        self.shard, self.rows, self.width, self.inner = SIZES[device]

    def randn(self, *shape, dtype=torch.bfloat16):
        return torch.randn(shape, dtype=dtype, device=self.device)

    def sets(self, make, bytes):
        return [make() for _ in range(gpu.set_count(bytes) if self.rotates else 1)]

    def copy(self, bytes):
        if self.rotates:
            return gpu.copy(bytes)
        source = torch.randn(bytes // 8)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def case(self, name, elements, per_element, make, call, target=None):
        """A row of `call(*set)` with sets of `make()`."""
        bytes = int(per_element * elements)

        def build():
            return self.copy(bytes), gpu.rotate(call, self.sets(make, bytes))

        return Case(name, COPY, build, bytes=bytes, target=target)


def shards(bench, ranks):
    n = bench.shard
    scales = torch.full((TENSORS,), 2.0**-6, device=bench.device)
    grads = [bench.randn(n // TENSORS) for _ in range(TENSORS)]
    one = qv.ops.pack(grads, E4M3, n, scales)
    return (torch.stack([one.roll(16 * r) for r in range(ranks)]),)


def reduce(bench, ranks, codes):
    scales = torch.full((TENSORS,), 2.0**-6, device=codes.device)
    return qv.ops.reduce_shards(
        codes, [bench.shard // TENSORS] * TENSORS, 0, scales, scales * ranks
    )


def normalize_backward_set(bench):
    x, weight = bench.randn(bench.rows, bench.width), bench.randn(bench.width)
    n = qv.ops.normalize(x, weight, block=BLOCK)
    return bench.randn(bench.rows, bench.width), n.saved, n.mean, n.rstd, weight


def activate_backward_set(bench):
    x, up, dy = (bench.randn(bench.rows, bench.inner) for _ in range(3))
    a = qv.ops.activate(x, up, block=BLOCK)
    history, up_history = (torch.zeros(17, device=bench.device) for _ in range(2))
    return dy, a.x, a.up, history, up_history


def warm(bench, *shape):
    """A history in which delayed scaling has its scale."""
    history = torch.zeros(17, device=bench.device)
    for _ in range(16):
        qv.quantize(bench.randn(*shape), history=history)
    return history


def gradient(bench):
    return (qv.quantize(bench.randn(bench.shard, dtype=torch.float32)),)


def accumulate(target, other):
    torch.ops.quaver.accumulate_(
        target.qdata, target.scale, target.amax, other.qdata, other.scale, other.amax
    )


def cases(device):
    b = Bench(device)
    n, model, mlp = b.shard, b.rows * b.width, b.rows * b.inner
    rows, size, heads = [], f"{n >> 20} Mi", 3 * b.width // 128
    for ranks in (2, 8):
        rows.append(b.case(f"reduce_shards, {ranks} shards of {size} e4m3", n, ranks + 1,
                           partial(shards, b, ranks), partial(reduce, b, ranks),
                           "reduce-encode" if b.rotates else None))  # fmt: skip
    rows += [
        b.case(f"normalize RMS {b.rows} x {b.width} bf16, delayed", model, 4 + SAVED,
               lambda: (b.randn(b.rows, b.width), b.randn(b.width), warm(b, 64, 64)),
               lambda x, w, history: qv.ops.normalize(x, w, history=history, block=BLOCK)),
        b.case(f"normalize_backward RMS {b.rows} x {b.width} bf16", model, 4 + SAVED,
               lambda: normalize_backward_set(b), qv.ops.normalize_backward),
        b.case(f"activate SwiGLU {b.rows} x {b.inner} bf16, delayed", mlp, 6 + 2 * SAVED,
               lambda: (b.randn(b.rows, b.inner), b.randn(b.rows, b.inner), warm(b, 64, 64)),
               lambda x, up, history: qv.ops.activate(x, up, history=history, block=BLOCK)),
        b.case(f"activate_backward SwiGLU {b.rows} x {b.inner} bf16, delayed", mlp,
               6 + 2 * SAVED, lambda: activate_backward_set(b),
               lambda dy, x, up, *states: qv.ops.activate_backward(
                   dy, x, up, x_history=states[0], up_history=states[1])),
        b.case(f"rotate {b.rows} x {heads} heads of 128, bf16", b.rows * heads * 128, 4 + 8 / heads,
               lambda: (b.randn(1, b.rows, heads, 128),
                        *(b.randn(b.rows, 128, dtype=torch.float32) for _ in range(2))),
               lambda x, cos, sin: qv.ops.rotate([x], cos, sin, 2 * heads // 3)),
        b.case(f"grad_norm {size} e4m3", n, 1, lambda: gradient(b),
               lambda g: qv.ops.grad_norm([g])),
        # Once for the amax of the sum, and once to write it.
        b.case(f"accumulate_ {size} e4m3", n, 5, lambda: gradient(b) + gradient(b), accumulate),
    ]  # fmt: skip
    return rows


if __name__ == "__main__":
    common.main("kernels", cases=cases)
