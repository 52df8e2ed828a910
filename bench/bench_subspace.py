"""Subset-Norm and Subspace-Momentum (arXiv 2411.07120) against f32 AdamW: the held-out loss of one
model on the same batches, each optimizer at its best learning rate, bytes of states, and the time
of a step on the CPU.
"""

import argparse
import statistics
from dataclasses import replace
from functools import partial

import common
import torch
from torch import nn

from quaver import AdamW, data, machine, memory_report, models, recipe, train
from quaver.distributed import World
from quaver.job import Job, Run
from quaver.settings import BETAS, WEIGHT_DECAY

BAR = ("at most", 0.0)  # percent above AdamW
SPEED = 1.2  # times as fast
BYTES = {"subset-norm": ("at most", 2.11), "snsm": ("at most", 0.95)}


class Compared(Job):
    """A run in float32 whose embeddings and vectors have Adam's moments, and its linear layers'
    weights those of a recipe."""

    def __init__(self, run: Run, moments: recipe.Recipe):
        self.moments = moments
        super().__init__(run, "f32")

    def _build_optimizer(self):
        linear = {m.weight for m in self.model.modules() if isinstance(m, nn.Linear)}
        matrices = [p for p in self.model.parameters() if p in linear]
        embeddings = [p for p in self.model.parameters() if p.dim() > 1 and p not in linear]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": embeddings, "weight_decay": WEIGHT_DECAY, "compress": False},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=self.settings.lr, betas=BETAS, recipe=self.moments)

    def quality(self) -> dict:
        for step in range(1, self.settings.steps + 1):
            line = self.step(step)
            if step % 50 == 0:
                print(f"    step {step} loss {line['loss']:.4f}", flush=True)
        count = sum(p.numel() for p in self.model.parameters())
        states = [t for s in self.optimizer.state.values() for t in s.values()]
        size = sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
        return {"val_loss": self._validate(), "state_bytes_per_param": size / count}


def rivals(dim: int) -> dict[str, tuple[recipe.Recipe, tuple[float, ...]]]:
    """Recipes by name, each with its learning rates. The published ratio to Adam's is ten."""
    snsm = replace(recipe.get("snsm"), exp_avg=recipe.Subspace(rank=dim // 4))
    return {
        "f32": (recipe.get("f32"), (5e-4, 1e-3, 2e-3)),
        "subset-norm": (recipe.get("subset-norm"), (5e-3, 1e-2, 2e-2)),
        "snsm": (snsm, (5e-3, 1e-2, 2e-2)),
    }


def best_of(name, settings, text, config, seeds) -> dict:
    moments, rates = rivals(config.dim)[name]
    rows = []
    for lr in rates:
        found = []
        for seed in range(seeds):
            chosen = train.Settings(**settings, lr=lr, seed=seed)
            run = Run(chosen, config, text, World(machine.choose_device("cpu")))
            found.append(Compared(run, moments).quality())
        loss = statistics.fmean(one["val_loss"] for one in found)
        rows.append({"name": name, "lr": lr, **found[0], "val_loss": loss})
        size = found[0]["state_bytes_per_param"]
        print(f"{name} lr {lr:g}: held-out loss {loss:.4f}, {size:.3f} state bytes", flush=True)
    return min(rows, key=lambda row: row["val_loss"])


def state_bytes(name: str) -> list[dict]:
    """The bytes that moments in bfloat16 take of a weight of a linear layer, with their bases, at
    rank d / 4, after one step of a bfloat16 model that exists."""
    config, low = models.load(name), torch.bfloat16
    second = recipe.SubsetNorm(dtype=low)
    subspace = recipe.Subspace(rank=config.dim // 4, projector="srht", dtype=low)
    judged = []
    for kind, first in (("subset-norm", "bf16"), ("snsm", subspace)):
        torch.manual_seed(0)
        model = models.build(config).to(low)
        moments = recipe.Recipe(kind, exp_avg=first, exp_avg_sq=second, bf16_master="stochastic")
        optimizer = AdamW(model.parameters(), recipe=moments)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        found = memory_report(model, optimizer)["bytes_per_param"]
        what = f"{name}, {kind}: bytes of the moments of a weight"
        size = found["exp_avg"] + found["exp_avg_sq"]
        judged.append(common.judge(what, size, *BYTES[kind]))
    return judged


def speed(pairs: int) -> list[dict]:
    """CPU steps over 20 million float32 parameters in 200 matrices."""

    def step_of(make):
        parameters = [nn.Parameter(torch.randn(250, 400)) for _ in range(200)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return make(parameters).step

    rows = []
    for name, bar in (("subset-norm", SPEED), ("snsm", None)):
        base = step_of(partial(torch.optim.AdamW, fused=True))
        ours = step_of(partial(AdamW, recipe=name))
        rows.append(
            common.compare(
                f"{name} step", base, ours, baseline_name="torch AdamW f32", pairs=pairs, bar=bar
            )
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="f32,subset-norm,snsm", help="names, with commas")
    parser.add_argument("--bytes", default="125m", help="the model whose states are counted")
    parser.add_argument("--pairs", type=int, default=common.PAIRS, help="of timed steps")
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("model", "steps", "batch", "seq")}
    print(common.describe(common.machine()))
    chosen = train.Settings(**settings)
    text = data.load(chosen.data, chosen.seq)
    config = models.load(args.model).replace(vocab=text.vocab)
    rows = [best_of(name, settings, text, config, args.seeds) for name in args.only.split(",")]
    judged = [*speed(args.pairs), *state_bytes(args.bytes)]
    for row in rows:
        if row["name"] == "f32" or rows[0]["name"] != "f32":
            continue
        percent = (row["val_loss"] / rows[0]["val_loss"] - 1) * 100
        what = f"{args.model}, {args.steps} steps, {row['name']} against f32 AdamW: held-out loss"
        judged.append(common.judge(f"{what}, percent", percent, *BAR))
    common.finish("subspace", [*rows, *judged])


if __name__ == "__main__":
    main()
