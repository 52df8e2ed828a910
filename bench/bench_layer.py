"""One Llama layer forward, backward and optimizer step, bf16 against fp8lm-o2, and its linear
layers alone. Llama 7B's layer on a GPU; a small one on the CPU, to walk the same code."""

from functools import partial

import common
import gpu
import torch
from common import Case
from torch import nn

import quaver as qv
from quaver import models
from quaver.models import layers, llama

RECIPE = "fp8lm-o2"
BF16 = torch.bfloat16
LENGTH = {"cuda": 4096, "cpu": 64}  # tokens of a sequence
BATCHES = {"cuda": (1, 2, 4), "cpu": (1,)}
TARGETED = 8192  # tokens
MODEL = {"cuda": "7b", "cpu": "tiny"}


class Bench:
    """The device and the sizes of all cases."""

    def __init__(self, device):
        self.device, self.length = device, LENGTH[device]
        self.config = models.load(MODEL[device])
        self.at = gpu.DEVICE if device == "cuda" else "cpu"

    def randn(self, *shape):
        return torch.randn(shape, dtype=BF16, device=self.at)

    def block(self, dtype=torch.float32):
        with torch.device(self.at):
            return llama.Block(self.config).to(dtype)

    def rotate(self, function, make):
        """`function` on inputs that are not in the cache where that matters."""
        first = make()
        bytes = sum(t.numel() * t.element_size() for t in first)
        more = gpu.set_count(bytes) - 1 if self.device == "cuda" else 0
        return gpu.rotate(function, [first, *(make() for _ in range(more))])


def optimizer_of(recipe, block):
    if recipe is None:
        return torch.optim.AdamW(block.parameters(), lr=1e-5, fused=True)
    return qv.AdamW(block.parameters(), lr=1e-5, recipe=recipe)


def training_step(bench, batch, block, optimizer, autocast=True):
    """Forward, backward and step of one block, as a training loop runs it."""
    with torch.device(bench.at):
        position = layers.rotary(bench.config.head_dim, bench.length, bench.config.rope_theta)

    def step(x, dy):
        x.grad = None
        with torch.autocast(bench.at, BF16, enabled=autocast):
            y = block(x, position)
        y.backward(dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def make():
        shape = (batch, bench.length, bench.config.dim)
        return bench.randn(*shape).requires_grad_(), bench.randn(*shape)

    return bench.rotate(step, make)


def bf16_weights(bench, batch, compiled=False):
    """Nothing but bf16, states included: the fastest baseline."""
    block = bench.block(BF16)
    run = torch.compile(block) if compiled else block
    return training_step(bench, batch, run, optimizer_of(None, block), autocast=False)


def bf16_autocast(bench, batch):
    """f32 weights and states under autocast, as `quaver train --recipe bf16`."""
    block = bench.block()
    return training_step(bench, batch, block, optimizer_of(None, block))


def fp8(bench, batch, compiled=False):
    block = qv.convert(bench.block(), recipe=RECIPE)
    run = torch.compile(block) if compiled else block
    return training_step(bench, batch, run, optimizer_of(RECIPE, block))


def torchao(bench, batch):
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise common.NotHereError("torchao is not installed") from None
    block = convert_to_float8_training(bench.block(BF16))
    return training_step(bench, batch, block, optimizer_of(None, block), autocast=False)


def linears(bench, tokens, recipe=None):
    """Forward and backward of the four linear layers, each with inputs of its own."""
    block = bench.block(BF16 if recipe is None else torch.float32)
    modules = [m for m in block.modules() if isinstance(m, nn.Linear)]
    if recipe is not None:
        qv.convert(block, recipe=recipe)

    def step(*inputs):
        for module, x, dy in zip(modules, inputs[::2], inputs[1::2], strict=True):
            x.grad = module.weight.grad = None
            with torch.autocast(bench.at, BF16):
                module(x).backward(dy)

    def make():
        return tuple(
            t
            for m in modules
            for t in (
                bench.randn(tokens, m.in_features).requires_grad_(),
                bench.randn(tokens, m.out_features),
            )
        )

    return bench.rotate(step, make)


def pair(baseline, candidate, *args):
    return lambda: (baseline(*args), candidate(*args))


def cases(device):
    bench = Bench(device)
    with torch.device("meta"):
        shapes = [m.weight.shape for m in llama.Block(bench.config).modules()
                  if isinstance(m, nn.Linear)]  # fmt: skip
    flops_per_token = 6 * sum(rows * cols for rows, cols in shapes)
    size = f"dim {bench.config.dim}"

    def case(what, baseline, build, tokens, target=None, flops=None):
        target = target if device == "cuda" and tokens == TARGETED else None
        return Case(f"{what}, {size}, {tokens} tokens", baseline, build, flops=flops, target=target)

    rows = []
    for batch in BATCHES[device]:
        tokens = batch * bench.length
        rows += [
            case(f"linear layers {RECIPE}", "nn.Linear in bf16",
                 pair(linears, partial(linears, recipe=RECIPE), bench, tokens), tokens,
                 "linears", flops_per_token * tokens),
            case(f"layer {RECIPE}", "bf16 weights and states, torch AdamW(fused=True)",
                 pair(bf16_weights, fp8, bench, batch), tokens, "layer"),
            case(f"layer {RECIPE}", "bf16 by autocast, f32 torch AdamW(fused=True)",
                 pair(bf16_autocast, fp8, bench, batch), tokens, "layer"),
        ]  # fmt: skip
    if device == "cuda":
        batch = TARGETED // bench.length
        compiled = partial(bf16_weights, compiled=True)
        rows += [
            case(f"layer {RECIPE}, not compiled", "torchao float8, not compiled",
                 lambda: (torchao(bench, batch), fp8(bench, batch)), TARGETED),
            case(f"layer {RECIPE}, compiled", "bf16 weights and states, compiled",
                 pair(compiled, partial(fp8, compiled=True), bench, batch), TARGETED),
        ]  # fmt: skip
    return rows


if __name__ == "__main__":
    common.main("layer", cases=cases)
