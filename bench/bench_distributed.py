"""Several ranks against one: the same loss, half of the bytes, a part of the memory.

Runs `quaver train` under torchrun for each plan and as one process, on the same global batches, and
prints losses, the bytes that a rank sends for weight gradients against a bf16 all-reduce, and bytes
per parameter and rank against the formula of docs/distributed.md. Times are not compared: the ranks
share this machine's cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

import quaver as qv
from quaver import models

LOSS_BAR = 0.5  # percent, of the final loss of one process
BYTES_BAR = 0.52  # of a bf16 all-reduce's
MEMORY_BAR = 1.0  # percent off the formula
PLANS = (("fp8lm-o2", "dp=4"), ("fp8lm-o3", "zero=4"))


def train(args, recipe, plan, out):
    size = 1 if plan is None else int(plan.partition("=")[2])
    launch = [sys.executable]
    if size > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command = [
        *launch, "-m", "quaver", "train", "--model", args.model, "--recipe", recipe,
        "--steps", str(args.steps), "--batch", str(args.batch), "--seq", str(args.seq),
        "--device", "cpu", "--out", out, *(["--parallel", plan] if plan else []),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = (Path(out) / recipe / "metrics.jsonl").read_text().splitlines()
    result = json.loads((Path(out) / "summary.json").read_text())["recipes"][recipe]
    return size, result, json.loads(lines[0])


def gradient_bytes(args, size, plan, sent):
    """Of converted weights, amaxes, histories and padding included, over those of bf16 all-reduce;
    ZeRO spends the second half of that on weights."""
    model = qv.convert(models.build(models.load(args.model)))
    low = sum(p.numel() for p in model.parameters() if isinstance(p, qv.ScaledTensor))
    other = sum(p.numel() for p in model.parameters() if not isinstance(p, qv.ScaledTensor))
    once = (size - 1) / size  # of an exchange; twice that for an all-reduce
    spent = sent["gradient"] + sent["scale"] - once * 4 * other * (2 if "dp" in plan else 1)
    return spent / (2 * once * 2 * low)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = []
    for recipe, plan in PLANS:
        with tempfile.TemporaryDirectory() as folder:
            _, one, _ = train(args, recipe, None, f"{folder}/one")
            size, many, first = train(args, recipe, plan, f"{folder}/many")
        loss = (many["final_loss"] / one["final_loss"] - 1) * 100
        sent = first["communication"]
        ratio = gradient_bytes(args, size, plan, sent)
        per = many["memory"]["bytes_per_param"]["all"]
        # Stored: 6 bytes of state and two copies for the products, or a replica and its transpose.
        wanted = 8 if plan.startswith("dp") else 1 + 1 + 6 / size
        off = (per / wanted - 1) * 100
        name, losses = f"{recipe} {plan}", [one["final_loss"], many["final_loss"]]
        print(f"{name}: a rank keeps {per:.3f} bytes a parameter, and sent in a step: {sent}")
        rows += [
            common.judge(f"{name}: loss over one process's, percent", loss, "within", LOSS_BAR,
                         loss=losses),
            common.judge(f"{name}: weight gradients' bytes over a bf16 all-reduce's", ratio,
                         "at most", BYTES_BAR, communication=sent),
            common.judge(f"{name}: bytes a parameter and rank over the formula's, percent", off,
                         "within", MEMORY_BAR, bytes_per_param=per, formula=wanted),
        ]  # fmt: skip
    common.finish("distributed", rows)


if __name__ == "__main__":
    main()
