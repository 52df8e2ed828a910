"""COAT's optimizer alone, on an unconverted bf16 model, against torch's AdamW in f32: the loss.

The same `tiny` model and batches; ours has bf16 parameters and gradients, and moments and masters
of each kind. A run of a few hundred steps a variant: minutes.
"""

import argparse
import dataclasses
import time
from statistics import fmean

import common
import torch
from torch.nn import functional as F

import quaver as qv
from quaver import data, models, recipe, train
from quaver.schedule import learning_rate, parameter_groups
from quaver.settings import BETAS, CLIP

BAR = 0.5  # percent of the f32 run's loss
COAT = recipe.get("coat")
VARIANTS = {
    "f32": None,
    **{f"coat, {m}": dataclasses.replace(COAT, bf16_master=m) for m in ("stochastic", "remainder")},
}


def run(chosen, settings, config, text):
    torch.manual_seed(settings.seed)
    model = models.build(config)
    options = {"lr": settings.lr, "betas": BETAS}
    groups = parameter_groups
    if chosen is None:
        optimizer = torch.optim.AdamW(groups(model), fused=True, **options)
    else:
        model = model.to(torch.bfloat16)
        optimizer = qv.AdamW(groups(model), recipe=chosen, **options)
    losses, began = [], time.perf_counter()
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        inputs, targets = text.batch(settings.seed, step, settings.batch, settings.seq, 0)
        optimizer.zero_grad()
        # The baseline multiplies in bf16 too: only what is stored differs.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        qv.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    last = fmean(losses[-max(1, settings.steps // 10) :])
    return last, time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows = []
    for seed in range(args.seeds):
        settings = train.Settings(data=("stdlib",), model="tiny", steps=args.steps,
                                  batch=args.batch, seq=args.seq, seed=seed)  # fmt: skip
        text = data.load(settings.data, settings.seq)
        config = models.load("tiny").replace(
            vocab=text.vocab, layers=args.layers, dim=args.dim, heads=args.dim // 64, kv_heads=1,
            ffn=args.dim * 8 // 3,
        )  # fmt: skip
        for name, chosen in VARIANTS.items():
            loss, seconds = run(chosen, settings, config, text)
            rows.append({"name": name, "seed": seed, "loss": loss, "seconds": seconds})
            print(f"seed {seed}: {name:<18} {loss:.4f}  ({seconds:.0f} s)", flush=True)
    base = fmean(r["loss"] for r in rows if r["name"] == "f32")
    for name in list(VARIANTS)[1:]:
        percent = (fmean(r["loss"] for r in rows if r["name"] == name) / base - 1) * 100
        what = f"optimizer of a plain bf16 model, {name}: loss over AdamW's in f32, percent"
        rows.append(common.judge(what, percent, "within", BAR))
    common.finish("coat_optimizer", rows)


if __name__ == "__main__":
    main()
