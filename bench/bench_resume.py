"""kill -9 at random moments: does a resumed run have the losses of one that was left alone?

Kills `quaver train` ten times for each recipe, resumes it each time, and compares every step's loss
and gradient norm with an uninterrupted run, bit for bit.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import common

MODEL = {"vocab": 256, "dim": 64, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 128, "context": 64}


def metrics(out, recipe):
    lines = (out / recipe / "metrics.jsonl").read_text().splitlines()
    return [(m["step"], m["loss"], m["grad_norm"]) for m in map(json.loads, lines)]


def measure(recipe, kills, steps, seed):
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "model.json").write_text(json.dumps(MODEL))

        def command(out):
            return [
                *(sys.executable, "-m", "quaver", "train", "--model", folder / "model.json"),
                *("--recipe", recipe, "--steps", str(steps), "--batch", "4", "--seq", "64"),
                *("--device", "cpu", "--save-every", "7", "--out", out, "--resume"),
            ]

        def finish(out):
            subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)
            return metrics(out, recipe)

        whole = finish(folder / "whole")
        cut = folder / "cut"
        # Moments by step as well as by time, so that a fast machine is hit everywhere too.
        moments = sorted(draw.sample(range(1, steps), kills))
        died = []
        for moment in moments:
            process = subprocess.Popen(command(cut), stdout=subprocess.PIPE, text=True)
            path = cut / recipe / "metrics.jsonl"
            while process.poll() is None:
                if path.exists() and path.read_text().count("\n") >= moment:
                    break
            try:
                process.wait(draw.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                process.kill()
            text = process.communicate()[0]
            began = re.search(r"continues after step (\d+)", text)
            died.append((int(began[1]) if began else None, len(path.read_text().splitlines())))
        return died, whole, finish(cut)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="bf16,fp8lm-o2")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = []
    for recipe in args.recipes.split(","):
        died, whole, cut = measure(recipe, args.kills, args.steps, args.seed)
        equal = sum(a == b for a, b in zip(whole, cut, strict=True))
        rows.append({"name": recipe, "kills": died, "steps": len(whole), "identical": equal})
        print(f"{recipe:<12} {len(died)} kills   {equal} of {len(whole)} steps bit-identical")
        print(f"{'':<12} (resumed from, killed after) {died}")
    common.save("resume", rows)
    if any(row["identical"] != row["steps"] for row in rows):
        sys.exit("resume: losses differ from those of an uninterrupted run")


if __name__ == "__main__":
    main()
