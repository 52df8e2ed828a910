"""FSDP2 with FP8 weights, gradients and states: does it train as one process, and what is sent?

`quaver train` in one process and with `--parallel fsdp=N` under torchrun, on the same global
batches; then both recipes sharded, for the bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

MODEL = {
    "vocab": 256, "dim": 128, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 352, "context": 64,
}  # fmt: skip
RECIPE = "fp8lm-o3"
LOSS_BAR, WEIGHT_BAR, GRADIENT_BAR, MEMORY_BAR = 0.5, 0.52, 0.52, 1.0


def run(folder, name, recipe, steps, ranks):
    """The result of one run, as summary.json has it."""
    out = folder / name
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launch if ranks > 1 else []), "-m", "quaver", "train"]
    command += ["--model", folder / "model.json", "--recipe", recipe, "--steps", str(steps)]
    command += ["--batch", "12", "--seq", "64", "--device", "cpu", "--out", out]
    if ranks > 1:
        command += ["--parallel", f"fsdp={ranks}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "summary.json").read_text())["recipes"][recipe]


def bf16_bytes(config, ranks):
    """What bf16 FSDP sends of the linear layers in blocks, a rank and step: (weights, gradients).
    Blocks are gathered for forward and again for backward."""
    head = config["dim"] // config["heads"]
    linear = [
        (config["dim"] + 2 * head * config["kv_heads"], config["dim"]),
        (config["dim"], config["dim"]),
        (2 * config["ffn"], config["dim"]),
        (config["dim"], config["ffn"]),
    ]
    shards = config["layers"] * sum(-(-n // ranks) * k for n, k in linear)
    return 2 * 2 * (ranks - 1) * shards, 2 * (ranks - 1) * shards


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "model.json").write_text(json.dumps(MODEL))
        one = run(folder, "one", RECIPE, args.steps, 1)
        many = run(folder, "many", RECIPE, args.steps, args.ranks)
        plain = run(folder, "plain", "bf16", 2, args.ranks)
    per_step = {kind: sent / args.steps for kind, sent in many["communication"].items()}
    # What is not FP8 (embedding, head, norms) is f32 in ours and bf16 in the baseline.
    weights, gradients = bf16_bytes(MODEL, args.ranks)
    others = {kind: plain["communication"][kind] / 2 - whole
              for kind, whole in (("weight", weights), ("gradient", gradients))}  # fmt: skip
    fp8 = {"weight": per_step["weight"] - 2 * others["weight"],
           "gradient": per_step["gradient"] - others["gradient"]}  # fmt: skip
    formula = 9 / args.ranks  # f16 master, e4m3 and f16 moments, f32 gradient
    figures = [
        ("loss over one process's, percent",
         (many["final_loss"] / one["final_loss"] - 1) * 100, "within", LOSS_BAR),
        ("FP8 weight bytes over bf16's", fp8["weight"] / weights, "at most", WEIGHT_BAR),
        ("FP8 gradient bytes over bf16's", fp8["gradient"] / gradients, "at most", GRADIENT_BAR),
        ("bytes a parameter and rank over the formula's, percent",
         (many["memory"]["bytes_per_param"]["all"] / formula - 1) * 100, "within", MEMORY_BAR),
    ]  # fmt: skip
    state = many["memory"]["bytes_per_param"]["all"]
    print(f"{args.steps} steps, fsdp={args.ranks}: loss {many['final_loss']:.4f}, one process "
          f"{one['final_loss']:.4f}; {state:.3f} bytes a parameter and rank, {formula:.3f} by the "
          f"formula; bytes sent a step {per_step}")  # fmt: skip
    every = 2 * per_step["weight"] / plain["communication"]["weight"]
    print(f"all weight bytes, embedding and head included, over bf16 FSDP's: {every:.3f}")
    plan = f"{RECIPE} fsdp={args.ranks}"
    common.finish("fsdp", [common.judge(f"{plan}: {name}", *rest) for name, *rest in figures])


if __name__ == "__main__":
    main()
