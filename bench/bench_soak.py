"""Does memory grow in a long run? Trains a small model by each recipe and optimizer, and compares
the process's resident memory after a tenth of the steps, when every cache is filled, with the end.
"""

import argparse
import gc
import multiprocessing
import os
from pathlib import Path

import common
import torch

from quaver import data, models, optimizers, recipe, train
from quaver.distributed import World
from quaver.job import Job, Run

MODEL = {"vocab": 256, "dim": 64, "layers": 2, "heads": 2, "kv_heads": 2, "ffn": 128, "context": 64}
GROWTH = ("at most", 1.0)  # MiB: a leak of 600 bytes a step


def resident() -> float:
    """MiB of the process that are in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(name: str, optimizer: str | None, steps: int) -> dict:
    chosen = {"optimizer": (optimizer,)} if optimizer else {}
    settings = train.Settings(steps=steps, batch=2, seq=32, recipe=(name,), device="cpu", **chosen)
    text = data.load(settings.data, settings.seq)
    config = models.Config(**MODEL).replace(vocab=text.vocab)
    job = Job(Run(settings, config, text, World(torch.device("cpu"))), name, optimizer)
    early = steps // 10
    for step in range(1, steps + 1):
        job.step(step)
        if step == early:
            before = resident()
    what = f"{name}{'+' + optimizer if optimizer else ''}, steps {early} to {steps}: MiB more"
    return common.judge(what, resident() - before, *GROWTH)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    pairs = [(name, None) for name in recipe.names()]
    pairs += [("bf16", optimizer) for optimizer in optimizers.names() if optimizer != "adamw"]
    # A process each: what one training frees would hide what the next one leaks.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(growth, (*pair, args.steps)) for pair in pairs]
    common.finish("soak", rows)


if __name__ == "__main__":
    main()
