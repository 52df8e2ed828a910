"""AdamW with FP8-LM's states against torch's fused AdamW in f32, other 8-bit optimizers where they
are installed, and on a GPU against a copy of the bytes that a step moves."""

import dataclasses
from functools import partial

import common
import gpu
import torch
from common import Case
from targets import COPY
from torch import nn

import quaver as qv

FEW_HUGE = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  # a layer of Llama 7B
MANY_SMALL = ((400, 250),) * 200
# Bytes of a parameter: master, first and second moment read and written, the gradient read.
TRAFFIC = {"fp8lm-o2": 1 + 2 * (2 + 1 + 2), "fp8lm-o1": 1 + 2 * (2 + 4 + 4), "f32": 4 + 2 * 12}
MOMENTS = 2 * (2 + 8 / 128)  # COAT's, read and written
# COAT's steps of an unconverted model: dtype of weights and gradients, master, bytes.
COATS = {
    "f32 weights": (torch.float32, "nearest", 4 + 2 * 4 + MOMENTS),
    "bf16 + remainder": (torch.bfloat16, "remainder", 2 + 2 * 4 + MOMENTS),
    "bf16 stochastic": (torch.bfloat16, "stochastic", 2 + 2 * 2 + MOMENTS),
}
TORCH = "torch AdamW(fused=True) f32"
HYPER = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def count(shapes):
    return sum(rows * cols for rows, cols in shapes)


def plain(shapes, device, dtype=torch.float32):
    params = [nn.Parameter(torch.randn(s, device=device, dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def torch_step(shapes, device):
    """torch's own, in f32."""
    return torch.optim.AdamW(plain(shapes, device), fused=True, **HYPER).step


def quaver_step(recipe, shapes, device):
    """The whole of `qv.AdamW.step`, as a training loop calls it, gradients in FP8."""
    params = plain(shapes, device)
    if recipe.startswith("fp8lm"):
        low = []
        for p in params:
            low.append(nn.Parameter(qv.quantize(p.detach(), torch.float16)))
            low[-1].grad = qv.quantize(p.grad)
        params = low
    return qv.AdamW(params, recipe=recipe, **HYPER).step


def coat_step(kind, shapes, device):
    """A step of COAT's optimizer alone."""
    dtype, master, _ = COATS[kind]
    recipe = dataclasses.replace(qv.recipe.get("coat"), bf16_master=master)
    return qv.AdamW(plain(shapes, device, dtype), recipe=recipe, **HYPER).step


def layers_step(grad_dtype):
    """The step of converted layers, which writes their FP8 weights in both layouts too."""
    layers = [
        qv.convert(nn.Linear(cols, rows, bias=False, device=gpu.DEVICE), recipe="fp8lm-o2")
        for rows, cols in FEW_HUGE
    ]
    params = [layer.weight for layer in layers]
    for p in params:
        p.grad = qv.quantize(gpu.randn(*p.shape, dtype=torch.float32))
        if grad_dtype == "bf16":
            grad, amax = p.grad.dequantize(torch.bfloat16), p.grad.amax
            p.grad = qv.ScaledTensor(grad, torch.ones_like(amax), amax, torch.float32)
    return qv.AdamW(params, recipe="fp8lm-o2", **HYPER).step


def adam_alone(grad_dtype):
    """The op of that step without what Python does around it."""
    captured, op = [], torch.ops.quaver.adam_
    step = layers_step(grad_dtype)
    torch.ops.quaver.adam_ = lambda *args: (captured.append(args), op(*args))
    try:
        step()
    finally:
        torch.ops.quaver.adam_ = op
    return lambda: op(*captured[0])


def bitsandbytes_step():
    try:
        import bitsandbytes
    except ImportError:
        raise common.NotHereError("bitsandbytes is not installed") from None
    return bitsandbytes.optim.AdamW8bit(plain(FEW_HUGE, gpu.DEVICE), **HYPER).step


def torchao_step(name):
    try:
        from torchao import optim
    except ImportError:
        raise common.NotHereError("torchao is not installed") from None
    return getattr(optim, name)(plain(FEW_HUGE, gpu.DEVICE), **HYPER).step


def cpu_cases():
    n = count(MANY_SMALL)
    baseline = torch_step(MANY_SMALL, "cpu")
    return [
        Case(
            f"AdamW {recipe}, {n // 10**6} M in {len(MANY_SMALL)} tensors",
            TORCH,
            lambda recipe=recipe: (baseline, quaver_step(recipe, MANY_SMALL, "cpu")),
            bytes=traffic * n,
            bar=1.0 if recipe == "fp8lm-o2" else None,
        )
        for recipe, traffic in TRAFFIC.items()
    ] + [
        Case(
            f"AdamW coat, {kind}, {n // 10**6} M in {len(MANY_SMALL)} tensors",
            TORCH,
            lambda kind=kind: (baseline, coat_step(kind, MANY_SMALL, "cpu")),
            bytes=traffic * n,
            bar=0.5,
        )
        for kind, (_, _, traffic) in COATS.items()
    ]


def cuda_cases():
    # Every step moves gigabytes, many times what the caches hold: nothing needs to rotate.
    n = count(FEW_HUGE)
    size = f"{n // 10**6} M in {len(FEW_HUGE)} matrices"

    def case(name, baseline, build, traffic=None, target=None):
        bytes = None if traffic is None else round(traffic * n)
        return Case(name, baseline, build, bytes=bytes, target=target)

    def against_torch(step):
        return lambda: (torch_step(FEW_HUGE, gpu.DEVICE), step())

    def against_copy(traffic, step):
        return lambda: (gpu.copy(round(traffic * n)), step())

    bf16 = partial(adam_alone, "bf16")
    cases = [
        case(f"adam_ 14 B, {size}", COPY, against_copy(14, bf16), 14, "adam-copy"),
        case(f"adam_ 13 B (e4m3 gradients), {size}", COPY,
             against_copy(13, partial(adam_alone, "e4m3")), 13),
        case(f"AdamW fp8lm-o2 with FP8 weights, {size}", TORCH,
             against_torch(partial(layers_step, "e4m3")), 13, "adam-torch"),
    ]  # fmt: skip
    for recipe in ("fp8lm-o1", "f32"):
        step = partial(quaver_step, recipe, FEW_HUGE, gpu.DEVICE)
        cases.append(case(f"AdamW {recipe}, {size}", TORCH, against_torch(step), TRAFFIC[recipe]))
    for kind, (_, _, traffic) in COATS.items():
        step = partial(coat_step, kind, FEW_HUGE, gpu.DEVICE)
        cases.append(
            case(f"AdamW coat, {kind}, {size}", COPY, against_copy(traffic, step), traffic)
        )
    small = f"{count(MANY_SMALL) // 10**6} M in {len(MANY_SMALL)} tensors"
    cases.append(
        Case(
            f"AdamW fp8lm-o2, {small}",
            TORCH,
            lambda: (
                torch_step(MANY_SMALL, gpu.DEVICE),
                quaver_step("fp8lm-o2", MANY_SMALL, gpu.DEVICE),
            ),
        )
    )
    peers = {
        "bitsandbytes AdamW8bit": bitsandbytes_step,
        "torchao AdamW8bit": partial(torchao_step, "AdamW8bit"),
        "torchao AdamWFp8": partial(torchao_step, "AdamWFp8"),
    }
    for name, peer in peers.items():
        ours = partial(layers_step, "e4m3")
        cases.append(
            case(f"AdamW fp8lm-o2 with FP8 weights, {size}", name,
                 lambda peer=peer, ours=ours: (peer(), ours()))
        )  # fmt: skip
    return cases


def cases(device):
    return cuda_cases() if device == "cuda" else cpu_cases()


if __name__ == "__main__":
    common.main("optimizer", cases=cases)
