"""Tensor and sequence parallelism: bytes on the wire, and the loss of dp=2, tp=2.

Real processes over gloo. The bytes do not depend on the machine; the time of a step here says
nothing about GPUs and is not measured.
"""

import argparse
import os
import sys
from statistics import fmean

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import quaver as qv
from quaver import data, models, recipe, train
from quaver.distributed import Transport, ddp
from quaver.distributed.tensor_parallel import parallelize

BARS = {"FP8 gathers": 0.67, "FP8 gathers and sums": 0.52}
LOSS_PERCENT = 0.5
MODES = [
    ("FP8 gathers, codes kept", {"regather": False}),
    ("FP8 gathers, gathered again", {"regather": True}),
    ("FP8 gathers and sums, codes kept", {"fp8_sum": True, "regather": False}),
    ("FP8 gathers and sums, gathered again", {"fp8_sum": True, "regather": True}),
]


def spawn(size, function, *args):
    """What rank 0's function(rank, *args) returns."""
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


def losses(rank, settings, shape, runs):
    """The losses of all steps of every run. `shape`: ranks of data and of tensor parallelism, or
    None."""
    return [_losses(settings, shape, options) for options in runs]


def _losses(settings, shape, options):
    settings = train.Settings(**settings)
    text = data.load(settings.data, settings.seq)
    config = models.load(settings.model).replace(vocab=text.vocab)
    job = train.Job(settings, config, text, torch.device("cpu"))
    (name,) = settings.recipe
    torch.manual_seed(settings.seed)
    model = qv.convert(models.build(config), recipe=name)
    mine = slice(None)
    if shape is not None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        parallelize(model, mesh["tp"], **options)
        averaged = Transport(mesh["dp"].get_group())
        ddp(model, group=averaged.group)
        part = settings.batch // averaged.size
        mine = slice(averaged.rank * part, (averaged.rank + 1) * part)
    optimizer = qv.AdamW(train._groups(model), lr=settings.lr, betas=train.BETAS, recipe=name)
    found = []
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, settings)
        optimizer.zero_grad()
        inputs, targets = job._batch(step, 0)
        loss = job._loss(name, model, inputs[mine], targets[mine])
        loss.backward()
        qv.clip_grad_norm_(model.parameters(), train.CLIP)
        optimizer.step()
        if shape is not None:
            loss = averaged.all_gather(loss.detach(), "scale").wait().mean()
        found.append(loss.item())
    return found


def traffic_rows(layers, seq):
    rows = []
    for size in (2, 4):
        modes = [("bf16", {}), *(("fp8lm-o2", options) for _, options in MODES)]
        base, *all_found = spawn(size, sent, modes, layers, seq)
        base = base["activation"]
        for (mode, _), found in zip(MODES, all_found, strict=True):
            ratio = (found["activation"] + found["scale"]) / base
            bar = BARS[mode.partition(",")[0]]
            rows.append({
                "name": f"activation bytes, tp={size}: {mode}",
                "baseline": "bf16, gathered again",
                "bytes": found,
                "baseline_bytes": base,
                "ratio_of_bytes": ratio,
                "bar": bar,
                "met": ratio <= bar,
            })  # fmt: skip
            verdict = "met" if ratio <= bar else "NOT met"
            print(f"{rows[-1]['name']:<66}{ratio:6.3f} x bf16   bar {bar}: {verdict}", flush=True)
    return rows


def loss_rows(settings):
    (one,) = spawn(1, losses, settings, None, [{}])
    runs = spawn(4, losses, settings, (2, 2), [{}, {"fp8_sum": True}])
    rows = []
    for mode, found in zip(("bf16 sums", "FP8 sums"), runs, strict=True):
        last = max(1, round(len(one) * train.LAST))
        alone, spread = fmean(one[-last:]), fmean(found[-last:])
        percent = (spread / alone - 1) * 100
        met = abs(percent) <= LOSS_PERCENT
        rows.append({
            "name": f"loss after {len(one)} steps, dp=2 x tp=2: {mode}",
            "loss": [alone, spread],
            "loss_percent": percent,
            "bar": LOSS_PERCENT,
            "met": met,
        })  # fmt: skip
        verdict = "met" if met else "NOT met"
        print(
            f"{rows[-1]['name']:<66}{spread:.4f}, one process {alone:.4f}: {percent:+.3f} %   "
            f"bar {LOSS_PERCENT} %: {verdict}",
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the model whose bytes count")
    parser.add_argument("--recipe", default="fp8lm-o2", choices=recipe.names())
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = traffic_rows(args.layers, args.seq)
    settings = {
        "model": args.model,
        "recipe": (args.recipe,),
        "steps": args.steps,
        "batch": args.batch,
        "seq": args.seq,
    }
    rows += loss_rows(settings)
    common.save("tensor_parallel", rows)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
