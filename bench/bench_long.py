"""The held-out loss of long trainings: the same model on the same batches under each recipe, for at
least 10,000 steps, with two seeds.

    python bench/bench_long.py                            all that is missing, then the judgement
    python bench/bench_long.py --only bf16:0,coat:0       some of it

A training is `quaver train`'s: it saves on the way, in --out, and goes on from there when the bench
is started again, with the same bits. A finished one is kept in bench/results/long_runs.jsonl with
its commit and instruction set, and not made again. Without all of them nothing is judged.
"""

import argparse
import json
import statistics
from pathlib import Path

import common

from quaver import train
from quaver.plot import new_figure

RECIPES = ("bf16", "fp8lm-o2", "coat", "blockwise")
BARS = {"fp8lm-o2": 0.5, "coat": 0.5, "blockwise": 0.3}  # percent above bf16
SEEDS = (0, 1)
RUNS = common.RESULTS / "long_runs.jsonl"
FIGURE = common.RESULTS / "long.png"


def finished(flags: dict) -> dict[tuple[str, int], list]:
    """{(recipe, seed): [[step, held-out loss], ...]} of the trainings in RUNS with these flags."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    found = [line for line in map(json.loads, lines) if line["flags"] == flags]
    return {(line["recipe"], line["seed"]): line["curve"] for line in found}


def trained(flags: dict, recipe: str, seed: int, out: Path) -> list:
    """The curve of a training, which goes on where it stopped."""
    folder = out / f"{recipe}-{seed}"
    every = flags["eval_every"]
    train.run(train.Settings(
        **flags, recipe=(recipe,), seed=seed, save_every=every, device="cpu", out=str(folder),
        resume=(folder / "config.json").exists(),
    ))  # fmt: skip
    lines = map(json.loads, (folder / recipe / "metrics.jsonl").read_text().splitlines())
    curve = [[line["step"], line["val_loss"]] for line in lines if "val_loss" in line]
    machine = common.machine()
    of = {key: machine[key] for key in ("commit", "isa")}
    with RUNS.open("a") as file:  # one write of a short line is whole, whoever else writes
        file.write(
            json.dumps({"flags": flags, "recipe": recipe, "seed": seed, "curve": curve, **of})
        )
        file.write("\n")
    return curve


def draw(curves: dict) -> None:
    """Draws every curve, and below it its distance to bf16's of the same seed."""
    figure = new_figure(6)
    losses, distances = figure.subplots(2, sharex=True)
    for (recipe, seed), curve in curves.items():
        steps, values = zip(*curve, strict=True)
        style = {"color": f"C{RECIPES.index(recipe)}", "linestyle": "-" if seed == 0 else "--"}
        losses.plot(steps, values, label=f"{recipe}, seed {seed}", **style)
        base = [loss for _, loss in curves["bf16", seed]]
        percent = [100 * (a / b - 1) for a, b in zip(values, base, strict=True)]
        distances.plot(steps, percent, **style)
    losses.set_ylabel("held-out loss")
    losses.legend()
    distances.set_ylabel("to bf16, percent")
    distances.set_xlabel("step")
    figure.savefig(FIGURE)


def judged(curves: dict, steps: int) -> list[dict]:
    """A row for each recipe: its last held-out loss over bf16's, the mean of the seeds; `noise` is
    the distance between bf16's seeds."""
    last = {key: curve[-1][1] for key, curve in curves.items()}
    noise = 100 * abs(last["bf16", SEEDS[1]] / last["bf16", SEEDS[0]] - 1)
    print(f"bf16's seeds differ by {noise:.2f} %")
    rows = []
    for recipe, bar in BARS.items():
        percent = [100 * (last[recipe, seed] / last["bf16", seed] - 1) for seed in SEEDS]
        what = f"{steps} steps, {recipe}: held-out loss over bf16's, percent"
        more = {"seeds": percent, "noise": noise, "curves": {
            f"{name}-{seed}": curve for (name, seed), curve in curves.items() if name == recipe
        }}  # fmt: skip
        rows.append(common.judge(what, statistics.fmean(percent), "at most", bar, **more))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="4.9 million parameters")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/long"), help="folder of the runs")
    wanted = [f"{recipe}:{seed}" for seed in SEEDS for recipe in RECIPES]
    parser.add_argument("--only", default=",".join(wanted), help="RECIPE:SEED, with commas")
    args = parser.parse_args()
    print(common.describe(common.machine()))
    flags = {key: getattr(args, key) for key in ("model", "steps", "batch", "seq", "eval_every")}
    for name in args.only.split(","):
        recipe, _, seed = name.partition(":")
        if name not in wanted:
            parser.error(f"--only wants some of {', '.join(wanted)}, got {name}")
        if (recipe, int(seed)) not in finished(flags):
            trained(flags, recipe, int(seed), args.out)
    curves = finished(flags)
    missing = [
        name for name in wanted if tuple(name.split(":")) not in {(r, str(s)) for r, s in curves}
    ]
    if missing:
        print(f"not judged yet: {', '.join(missing)} are missing")
        return
    draw(curves)
    common.finish("long", judged(curves, args.steps))


if __name__ == "__main__":
    main()
