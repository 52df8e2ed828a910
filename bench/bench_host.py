"""Host time of a linear layer, forward and backward, beside nn.Linear's.

Operands are 16 x 16 and on the CPU, so small that what remains is Python, autograd and the
dispatcher. A GPU idles where this takes longer than the kernels.
"""

import common
import torch
from common import Case
from torch import nn

import quaver as qv

RECIPES = ("tensorwise", "fp8lm-o2", "coat")
SIZE = 16
BAR = 0.5  # of nn.Linear's speed: at most twice its time


def step(layer, x, dy):
    """Forward and backward, as a training loop runs them; no gradient is added to an older one."""

    def run():
        x.grad = layer.weight.grad = None
        layer(x).backward(dy)

    return run


def build(recipe):
    torch.manual_seed(0)
    plain, ours = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))
    (ours,) = qv.convert(nn.Sequential(ours), recipe=recipe)
    x, dy = torch.randn(SIZE, SIZE, requires_grad=True), torch.randn(SIZE, SIZE)
    candidate = step(ours, x, dy)
    for _ in range(20):  # a delayed scale is just in time for 16 casts
        candidate()
    return step(plain, x, dy), candidate


def cases(device):
    return [
        Case(f"linear {recipe}, forward and backward, {SIZE} x {SIZE}", "nn.Linear",
             lambda recipe=recipe: build(recipe), bar=BAR)
        for recipe in RECIPES
    ]  # fmt: skip


if __name__ == "__main__":
    common.main("host", cases=cases)
