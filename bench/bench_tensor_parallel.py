"""Tensor and sequence parallelism: bytes on the wire, and the loss of dp=2, tp=2.

Real processes over gloo. The bytes do not depend on the machine; the time of a step here says
nothing about GPUs and is not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import quaver as qv
from quaver import models
from quaver.distributed import Transport, parallelize

BARS = {"FP8 gathers": 0.67, "FP8 gathers and sums": 0.52}
LOSS_PERCENT = 0.5
MODES = [
    ("FP8 gathers, codes kept", {"regather": False}),
    ("FP8 gathers, gathered again", {"regather": True}),
    ("FP8 gathers and sums, codes kept", {"fp8_sum": True, "regather": False}),
    ("FP8 gathers and sums, gathered again", {"fp8_sum": True, "regather": True}),
]


def spawn(size, function, *args):
    """The result of function(rank, *args) on rank 0."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29783"}
    with mp.get_context("spawn").Manager() as manager:
        out = manager.dict()
        mp.spawn(_work, (size, out, function, args), size)
        return out[0]


def _work(rank, size, out, function, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    result = function(rank, *args)
    if rank == 0:
        out[0] = result
    dist.barrier()
    dist.destroy_process_group()


def sent(rank, modes, layers, seq):
    """Bytes of a step by kind in every mode. The model is narrow: ratios depend on its depth."""
    config = models.Config(dim=64, heads=8, kv_heads=8, ffn=128, layers=layers, context=seq)
    tokens = torch.zeros(2, seq, dtype=torch.int64)
    found = []
    for name, options in modes:
        transport = Transport()
        model = parallelize(qv.convert(models.build(config), recipe=name), transport, **options)
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens).float().square().mean().backward()
        found.append(transport.traffic)
    return found


def final_losses(command, arguments):
    """{recipe: loss} of a run of `quaver train`."""
    with tempfile.TemporaryDirectory() as out:
        command = [*command, "-m", "quaver", "train", *arguments, "--out", out, "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(out) / "summary.json").read_text())
    return {name: result["final_loss"] for name, result in summary["recipes"].items()}


def traffic_rows(layers, seq):
    rows = []
    for size in (2, 4):
        modes = [("bf16", {}), *(("fp8lm-o2", options) for _, options in MODES)]
        base, *all_found = spawn(size, sent, modes, layers, seq)
        base = base["activation"]
        for (mode, _), found in zip(MODES, all_found, strict=True):
            ratio = (found["activation"] + found["scale"]) / base
            name = f"tp={size}, {mode}: activation bytes over bf16's, gathered again"
            bar = BARS[mode.partition(",")[0]]
            rows.append(common.judge(name, ratio, "at most", bar, bytes=found, bf16_bytes=base))
    return rows


def loss_rows(arguments):
    """Sums travel in bf16 under fp8lm-o2, in FP8 under fp8lm-o3."""
    arguments = ["--recipe", "fp8lm-o2,fp8lm-o3", "--device", "cpu", *arguments]
    one = final_losses([sys.executable], arguments)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    four = final_losses(torchrun, [*arguments, "--parallel", "dp=2,tp=2"])
    rows = []
    for name, alone in one.items():
        percent = (four[name] / alone - 1) * 100
        what = f"{name} dp=2,tp=2: loss over one process's, percent"
        losses = [alone, four[name]]
        rows.append(common.judge(what, percent, "within", LOSS_PERCENT, loss=losses))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the model whose bytes count")
    parser.add_argument("--model", default="tiny", help="whose loss counts, as all that follow")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = traffic_rows(args.layers, args.seq)
    rows += loss_rows([f"--{key}={vars(args)[key]}" for key in ("model", "steps", "batch", "seq")])
    common.finish("tensor_parallel", rows)


if __name__ == "__main__":
    main()
