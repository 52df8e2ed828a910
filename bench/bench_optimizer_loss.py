"""The optimizers of `quaver train --optimizer` against AdamW: the held-out loss of one model on the
same batches, each optimizer at the best of its learning rates, and its bytes a parameter.

Three rates are trained with seed 0, and further ones, each a factor of two away, until the best has
worse ones on both sides; then the best with the other seeds.

Each training is kept in bench/results/optimizer_loss_runs.jsonl with its commit and instruction
set, and not made again: the whole takes hours on two cores and may be done in pieces.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor

import common
import torch

from quaver import data, models, optimizers, train
from quaver.distributed import World
from quaver.job import Job, Run

RATES = (0.5, 1.0, 2.0)  # times the default of `quaver train`
BARS = {"subset-norm": 0.0, "snsm": 0.0, "grass": 4.0}  # percent above AdamW
BAR = 1.5  # of the others
JUDGED = 1000  # steps from which on the bars hold: MicroAdam and Grass see little of a short run
RUNS = common.RESULTS / "optimizer_loss_runs.jsonl"


def trained(flags: dict, name: str, lr: float, seed: int) -> dict:
    """The held-out loss and the memory of one training, on one thread."""
    torch.set_num_threads(1)
    recipe = flags["recipe"]
    chosen = flags | {"recipe": (recipe,), "optimizer": (name,)}
    settings = train.Settings(**chosen, lr=lr, seed=seed)
    text = data.load(settings.data, settings.seq)
    config = models.load(settings.model).replace(vocab=text.vocab)
    job = Job(Run(settings, config, text, World(torch.device("cpu"))), recipe, name)
    for step in range(1, settings.steps + 1):
        job.step(step)
    loss, memory = job._validate(), job._memory()
    shown = "not finite" if loss is None else f"{loss:.4f}"
    print(f"  {name} lr {lr:g} seed {seed}: held-out loss {shown}", flush=True)
    return {"loss": loss, "memory": memory}


def _best(tried: dict) -> float:
    """The rate of least loss; one that is not finite is the worst."""
    return min(tried, key=lambda lr: math.inf if tried[lr]["loss"] is None else tried[lr]["loss"])


def _missing(name: str, tried: dict) -> list[float]:
    """The rates to try next: none where the best has one on both sides."""
    if not tried:
        return [factor * 1e-3 * optimizers.rate(name) for factor in RATES]
    best = _best(tried)
    return [lr for lr in (best / 2, best * 2) if not any(math.isclose(lr, t) for t in tried)]


def kept(run: dict) -> dict | None:
    """What RUNS has of a training: its loss and memory, or None."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    found = [line for line in map(json.loads, lines) if line["run"] == run]
    return found[-1] if found else None


def trained_once(flags: dict, name: str, lr: float, seed: int) -> dict:
    """`trained`, unless RUNS has it."""
    run = {**flags, "optimizer": name, "lr": lr, "seed": seed}
    result = kept(run)
    if result is None:
        machine = common.machine()
        of = {key: machine[key] for key in ("commit", "isa")}
        result = {"run": run, **trained(flags, name, lr, seed), **of}
        with RUNS.open("a") as file:  # one write of a short line is whole, whoever else writes
            file.write(json.dumps(result) + "\n")
    return result


def rows_of(flags: dict, names: list[str], seeds: int, workers: int) -> list[dict]:
    """A row for each optimizer, at the best of its rates."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:

        def start(name, lr, seed):
            return pool.submit(trained_once, flags, name, lr, seed)

        tried = {name: {} for name in names}
        while missing := {n: lrs for n in names if (lrs := _missing(n, tried[n]))}:
            started = {n: {lr: start(n, lr, 0) for lr in lrs} for n, lrs in missing.items()}
            for name, tasks in started.items():
                tried[name] |= {lr: task.result() for lr, task in tasks.items()}
        best = {name: _best(tried[name]) for name in names}
        others = {n: [start(n, best[n], seed) for seed in range(1, seeds)] for n in names}
        losses = {n: [task.result()["loss"] for task in others[n]] for n in names}
    return [_row(name, tried[name], best[name], losses[name]) for name in names]


def _row(name: str, tried: dict, lr: float, others: list[float]) -> dict:
    memory = tried[lr]["memory"]
    per = memory["bytes_per_param"]
    return {
        "name": name,
        "rates": {f"{rate:g}": found["loss"] for rate, found in sorted(tried.items())},
        "lr": lr,
        "losses": [tried[lr]["loss"], *others],
        "bytes": per["state"],
        "states": per["exp_avg"] + per["exp_avg_sq"],
        "total": memory["total"],
    }


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| optimizer | losses of seed 0 by rate | best | mean of the seeds | to AdamW "
        "| bytes a parameter | of these states | total MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = statistics.fmean(rows[0]["losses"])
    for row in rows:
        loss = statistics.fmean(row["losses"])
        rates = ", ".join(f"{rate}: {value:.4f}" for rate, value in row["rates"].items())
        percent = "-" if row is rows[0] else f"{(loss / base - 1) * 100:+.2f} %"
        lines.append(
            f"| `{row['name']}` | {rates} | {row['lr']:g} | {loss:.4f} | {percent} "
            f"| {row['bytes']:.2f} | {row['states']:.2f} | {row['total'] / 2**20:.1f} |"
        )
    return "\n".join(lines)


def _judged(rows: list[dict], model: str, steps: int) -> list[dict]:
    base, *others = [statistics.fmean(row["losses"]) for row in rows]
    return [
        common.judge(
            f"{model}, {steps} steps, {row['name']}: held-out loss over AdamW's, percent",
            (loss / base - 1) * 100,
            "at most",
            BARS.get(row["name"], BAR),
        )
        for row, loss in zip(rows[1:], others, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--recipe", default="bf16")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="trainings at once")
    parser.add_argument("--only", default=",".join(optimizers.names()), help="names, with commas")
    args = parser.parse_args()
    print(common.describe(common.machine()))
    flags = {key: getattr(args, key) for key in ("model", "steps", "batch", "seq")}
    flags["recipe"] = args.recipe
    names = ["adamw", *(name for name in args.only.split(",") if name != "adamw")]
    rows = rows_of(flags, names, args.seeds, args.workers)
    print(table(rows), flush=True)
    judged = _judged(rows, args.model, args.steps) if args.steps >= JUDGED else []
    common.finish("optimizer_loss", [*rows, *judged])


if __name__ == "__main__":
    main()
