"""AdamW with moments of 4 bits (arXiv 2309.01507): bytes of states of a model that exists, and the
time of a step on the CPU beside torch's fused f32 AdamW. Losses are bench_optimizer_loss.py's.
"""

import argparse
from functools import partial

import common
import torch
from torch import nn

from quaver import AdamW, models

BYTES = {"adamw-4bit": 1.04, "adamw-4bit-block": 1.07, "adamw-4bit-factor": 0.54}
SPEED = {"adamw-4bit": 0.5, "adamw-4bit-block": 0.5, "adamw-4bit-factor": None}


def state_bytes(name: str, recipe: str) -> dict:
    """Bytes of all states a parameter of a bfloat16 model after one step."""
    model = models.build(models.load(name)).to(torch.bfloat16)
    optimizer = AdamW(model.parameters(), 1e-4, recipe=recipe)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    size = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    count = sum(p.numel() for p in model.parameters())
    what = f"{name}, {recipe}: bytes of states a parameter"
    return common.judge(what, size / count, "at most", BYTES[recipe])


def speed(recipe: str, pairs: int) -> dict:
    """CPU steps over 20 million f32 parameters in 200 matrices."""

    def step_of(make):
        parameters = [nn.Parameter(torch.randn(250, 400)) for _ in range(200)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return make(parameters).step

    base = step_of(partial(torch.optim.AdamW, fused=True))
    ours = step_of(partial(AdamW, lr=1e-3, recipe=recipe))
    return common.compare(
        f"{recipe} step", base, ours, baseline_name="torch AdamW f32", pairs=pairs,
        bar=SPEED[recipe],
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", default="125m", help="the model whose states are counted")
    parser.add_argument("--pairs", type=int, default=common.PAIRS, help="of timed steps")
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = [speed(recipe, args.pairs) for recipe in SPEED]
    rows += [state_bytes(args.bytes, recipe) for recipe in BYTES]
    common.finish("packed", rows)


if __name__ == "__main__":
    main()
