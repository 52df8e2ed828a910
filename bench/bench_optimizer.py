"""AdamW with FP8-LM's states against torch's fused AdamW in f32: 20 M parameters in 200 tensors."""

import common
import torch
from torch import nn

import quaver as qv

TENSORS, SHAPE = 200, (400, 250)


def quaver_step(recipe):
    """The whole of `qv.AdamW.step`, as a training loop calls it."""
    params = []
    for _ in range(TENSORS):
        w = torch.randn(SHAPE)
        low = recipe.startswith("fp8lm")
        p = nn.Parameter(qv.quantize(w, torch.float16) if low else w)
        p.grad = qv.quantize(torch.randn(SHAPE)) if low else torch.randn(SHAPE)
        params.append(p)
    return qv.AdamW(params, recipe=recipe).step


def torch_step():
    params = [nn.Parameter(torch.randn(SHAPE)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn(SHAPE)
    return torch.optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step


def bench(pairs):
    baseline = torch_step()
    count = TENSORS * SHAPE[0] * SHAPE[1]
    # Read and written: master, m and v; the gradient is read.
    for recipe, traffic in (("fp8lm-o2", 1 + 2 * 5), ("fp8lm-o1", 1 + 2 * 10), ("f32", 4 + 2 * 12)):
        yield common.compare(
            f"AdamW {recipe}, {count // 10**6} M in {TENSORS} tensors",
            baseline,
            quaver_step(recipe),
            baseline_name="torch AdamW(fused=True) f32",
            pairs=pairs,
            bytes=traffic * count,
            bar=1.0 if recipe == "fp8lm-o2" else None,
        )


if __name__ == "__main__":
    common.main("optimizer", bench)
