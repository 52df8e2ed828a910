"""The speed of a training step of `tiny` on the CPU, by recipe against bf16's: on a quiet machine,
and beside two processes that compute all the time.

Quiet speed is the ratio of steps that take turns in one process. Beside others each recipe keeps a
share of its quiet speed, which should be no lower than the share that bf16 keeps. Recipes with
scales of rows and of blocks take turns with the one with scales of tensors.
"""

import argparse
import contextlib
import multiprocessing
from statistics import median

import common
import torch

from quaver import data, models, train
from quaver.distributed import World
from quaver.job import Job, Run

RECIPES = ("bf16", "fp8lm-o2", "coat")
GRAINS = ("tensorwise", "rowwise", "blockwise")
BUSY = 2  # processes beside the training
BATCH, SEQ = 4, 128


class Training:
    """Steps of one recipe, as many as are asked for."""

    def __init__(self, recipe, most):
        settings = train.Settings(
            data=("stdlib",), model="tiny", recipe=(recipe,), steps=most, batch=BATCH, seq=SEQ
        )
        text = data.load(settings.data, settings.seq)
        config = models.load(settings.model).replace(vocab=text.vocab)
        self.job = Job(Run(settings, config, text, World(torch.device("cpu"))), recipe)
        self.done = 0

    def step(self):
        self.done += 1
        self.job.step(self.done)


def spin():
    while True:
        pass


@contextlib.contextmanager
def busy(count):
    """Processes beside this one that never wait."""
    processes = [
        multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def seconds(trainings, rounds):
    """{recipe: the median seconds of a step}, the recipes by turns."""
    times = {recipe: [] for recipe in trainings}
    for _ in range(rounds):
        for recipe, training in trainings.items():
            times[recipe].append(common.seconds(training.step, 1))
    return {recipe: median(found) for recipe, found in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps of each recipe")
    args = parser.parse_args()
    print(common.describe(common.machine()))
    grains = {recipe: Training(recipe, args.rounds + 3) for recipe in GRAINS}
    seconds(grains, 3)
    by_grain = seconds(grains, args.rounds)
    trainings = {recipe: Training(recipe, 2 * args.rounds + 3) for recipe in RECIPES}
    seconds(trainings, 3)
    quiet = seconds(trainings, args.rounds)
    with busy(BUSY):
        beside = seconds(trainings, args.rounds)
    rows = [
        common.judge(f"tiny, {recipe}: tokens/s over {GRAINS[0]}'s",
                     by_grain[GRAINS[0]] / by_grain[recipe], "at least", 0.9)
        for recipe in GRAINS[1:]
    ]  # fmt: skip
    kept = {recipe: quiet[recipe] / beside[recipe] for recipe in RECIPES}
    for recipe in RECIPES:
        speeds = [BATCH * SEQ / times[recipe] for times in (quiet, beside)]
        print(f"{recipe}: {speeds[0]:,.0f} tokens/s, beside {BUSY} others {speeds[1]:,.0f}")
    for recipe in RECIPES[1:]:
        name = f"tiny, {recipe}: "
        rows.append(common.judge(name + "tokens/s over bf16's", quiet["bf16"] / quiet[recipe],
                                 "at least", 1.0))  # fmt: skip
        rows.append(
            common.judge(name + f"share of its speed kept beside {BUSY} processes, over bf16's",
                         kept[recipe] / kept["bf16"], "at least", 1.0)
        )  # fmt: skip
    common.finish("tokens", rows)


if __name__ == "__main__":
    main()
