"""The main job: fp8lm-o2 against bf16, same model, same batches, three seeds.

Quality, memory and saved activations from whole runs of `quaver train`; speed from training steps
of both recipes by turns in one process, since a machine drifts over the minutes of a run.
"""

import argparse
import tempfile
from statistics import fmean

import common

from quaver import data, machine, models, train
from quaver.distributed import World
from quaver.job import Job, Run

BARS = {
    "val_loss_percent": ("within", 1.0),
    "worst_seed_percent": ("within", 1.5),
    "bytes_per_param": ("at most", 6.05),
    "activation_ratio": ("at most", 0.55),
    "speed_ratio": ("at least", 0.6),
}
COAT_BYTES = ("at most", 6.07)  # a plain bf16 gradient, and moments with the scales of their blocks
WHAT = {
    "val_loss_percent": "held-out loss, percent, mean of the seeds",
    "worst_seed_percent": "held-out loss, percent, the seed furthest off",
    "bytes_per_param": "bytes a parameter: master, gradient, moments",
    "activation_ratio": "bytes that linear layers save, ratio",
    "speed_ratio": "tokens/s on the CPU, ratio",
}


def quality(settings, seed):
    with tempfile.TemporaryDirectory() as out:
        summary = train.run(train.Settings(**settings, seed=seed, out=out))
    base, ours = (summary["recipes"][name] for name in settings["recipe"])
    memory, base_memory = ours["memory"], base["memory"]
    return {
        "seed": seed,
        "loss": [base["final_loss"], ours["final_loss"]],
        "val_loss": [base["val_loss"], ours["val_loss"]],
        "loss_percent": (ours["final_loss"] / base["final_loss"] - 1) * 100,
        "val_loss_percent": (ours["val_loss"] / base["val_loss"] - 1) * 100,
        "bytes_per_param": memory["bytes_per_param"]["state"],
        "bytes_per_param_baseline": base_memory["bytes_per_param"]["state"],
        "activation_ratio": memory["activation_linear"] / base_memory["activation_linear"],
        "activation_ratio_all": memory["activation"] / base_memory["activation"],
    }


def speed(settings, pairs):
    settings = train.Settings(**settings)
    text = data.load(settings.data, settings.seq)
    config = models.load(settings.model).replace(vocab=text.vocab)
    run = Run(settings, config, text, World(machine.choose_device(settings.device)))
    jobs = [Job(run, name) for name in settings.recipe]
    steps = [lambda job=job: job.step(1) for job in jobs]
    for step in steps * 3:
        step()
    base, ours = settings.recipe
    return common.compare(f"{ours} step", *steps, baseline_name=f"{base} step", pairs=pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--recipes", default="bf16,fp8lm-o2", help="baseline,candidate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=common.PAIRS)
    args = parser.parse_args()
    settings = {
        "model": args.model,
        "recipe": tuple(args.recipes.split(",")),
        "steps": args.steps,
        "batch": args.batch,
        "seq": args.seq,
    }
    print(common.describe(common.machine()))
    row = speed(settings, args.pairs)
    rows = [quality(settings, seed) for seed in range(args.seeds)]
    for one in rows:
        a, b = one["val_loss"]
        print(
            f"seed {one['seed']}: held-out loss {a:.4f} and {b:.4f}, "
            f"{one['val_loss_percent']:+.2f} %"
        )
    found = {
        "val_loss_percent": fmean(one["val_loss_percent"] for one in rows),
        "worst_seed_percent": max((one["val_loss_percent"] for one in rows), key=abs),
        "bytes_per_param": max(one["bytes_per_param"] for one in rows),
        "activation_ratio": max(one["activation_ratio"] for one in rows),
        "speed_ratio": row["ratio"],
    }
    base, ours = settings["recipe"]
    bars = BARS | ({"bytes_per_param": COAT_BYTES} if ours == "coat" else {})
    judged = [
        common.judge(f"{args.model}, {args.steps} steps, {ours} against {base}: {what}",
                     found[key], *bars[key])
        for key, what in WHAT.items()
    ]  # fmt: skip
    usual = args.recipes == parser.get_default("recipes")
    common.finish("train" if usual else f"train-{ours}", [row, *rows, *judged])


if __name__ == "__main__":
    main()
