"""AdamW with FP8 states against torch's fused AdamW in f32: 20 M parameters in 200 tensors."""

import dataclasses

import common
import torch
from torch import nn

import quaver as qv

TENSORS, SHAPE = 200, (400, 250)


def quaver_step(recipe, converted, dtype=torch.float32):
    """The whole of `qv.AdamW.step`, as a training loop calls it."""
    params = []
    for _ in range(TENSORS):
        w, grad = torch.randn(SHAPE), torch.randn(SHAPE)
        p = nn.Parameter(qv.quantize(w, torch.float16) if converted else w.to(dtype))
        p.grad = qv.quantize(grad) if converted else grad.to(dtype)
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
    coat = qv.recipe.get("coat")
    exact = dataclasses.replace(coat, bf16_master="remainder")
    random = dataclasses.replace(coat, bf16_master="stochastic")
    bf16 = torch.bfloat16
    # Read and written: master, m and v; the gradient is read.
    moments = 2 * (2 + 8 / 128)
    for name, step, traffic, bar in (
        ("fp8lm-o2", quaver_step("fp8lm-o2", True), 1 + 2 * 5, 1.0),
        ("fp8lm-o1", quaver_step("fp8lm-o1", True), 1 + 2 * 10, None),
        ("f32", quaver_step("f32", False), 4 + 2 * 12, None),
        ("coat", quaver_step("coat", True), 1 + 2 * 2 + moments, 0.5),
        ("coat, f32 weights", quaver_step("coat", False), 4 + 2 * 4 + moments, 0.5),
        ("coat, bf16 + remainder", quaver_step(exact, False, bf16), 2 + 2 * 4 + moments, 0.5),
        ("coat, bf16 stochastic", quaver_step(random, False, bf16), 2 + 2 * 2 + moments, None),
    ):
        yield common.compare(
            f"AdamW {name}, {count // 10**6} M in {TENSORS} tensors",
            baseline,
            step,
            baseline_name="torch AdamW(fused=True) f32",
            pairs=pairs,
            bytes=traffic * count,
            bar=bar,
        )


if __name__ == "__main__":
    common.main("optimizer", bench)
