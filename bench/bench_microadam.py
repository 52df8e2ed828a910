"""MicroAdam (arXiv 2405.15593) against f32 AdamW: the held-out loss of one model on the same
batches, each at its best learning rate, bytes of states of a model that exists, and the time of a
step on the CPU.
"""

import argparse
import statistics
from functools import partial

import common
import torch
from torch import nn

from quaver import AdamW, MicroAdam, data, machine, models, train
from quaver.distributed import World
from quaver.job import Job, Run
from quaver.settings import BETAS, WEIGHT_DECAY

LOSS = ("at most", 1.5)  # percent above AdamW
SPEED = 0.3  # times as fast
BYTES = {64: ("at most", 0.97), 100_000: ("at most", 0.91)}


def adamw(groups, lr):
    return AdamW(groups, lr=lr, betas=BETAS, recipe="f32")


RIVALS = {
    "AdamW": (adamw, (5e-4, 1e-3, 2e-3)),
    "MicroAdam": (MicroAdam, (2e-4, 5e-4, 1e-3)),
}


class Compared(Job):
    """A run in float32, stepped by `make(groups, lr)`."""

    def __init__(self, run: Run, make):
        self.make = make
        super().__init__(run, "f32")

    def _build_optimizer(self):
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return self.make(groups, self.settings.lr)

    def quality(self) -> float:
        for step in range(1, self.settings.steps + 1):
            self.step(step)
        return self._validate()


def best_of(name, settings, text, config, seeds) -> dict:
    make, rates = RIVALS[name]
    rows = []
    for lr in rates:
        losses = []
        for seed in range(seeds):
            chosen = train.Settings(**settings, lr=lr, seed=seed)
            run = Run(chosen, config, text, World(machine.choose_device("cpu")))
            losses.append(Compared(run, make).quality())
        rows.append({"name": name, "lr": lr, "val_loss": statistics.fmean(losses)})
        print(f"{name} lr {lr:g}: held-out loss {rows[-1]['val_loss']:.4f}", flush=True)
    return min(rows, key=lambda row: row["val_loss"])


def state_bytes(name: str) -> list[dict]:
    """Bytes of all states a parameter of a bfloat16 model after one step."""
    judged = []
    for error_block, bar in BYTES.items():
        model = models.build(models.load(name)).to(torch.bfloat16)
        optimizer = MicroAdam(model.parameters(), 1e-4, error_block=error_block)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        size = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        count = sum(p.numel() for p in model.parameters())
        what = f"{name}, error_block {error_block}: bytes of states a parameter"
        judged.append(common.judge(what, size / count, *bar))
    return judged


def speed(pairs: int) -> list[dict]:
    """CPU steps over 20 million parameters in 200 matrices."""

    def step_of(make, dtype=torch.float32):
        parameters = [nn.Parameter(torch.randn(250, 400).to(dtype)) for _ in range(200)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return make(parameters).step

    rows = []
    for name, dtype, options in (
        ("f32", torch.float32, {}),
        ("f32, error_block 100000", torch.float32, {"error_block": 100_000}),
        ("bf16", torch.bfloat16, {}),
    ):
        base = step_of(partial(torch.optim.AdamW, fused=True))
        ours = step_of(partial(MicroAdam, lr=1e-3, weight_decay=0.1, **options), dtype)
        rows.append(
            common.compare(
                f"MicroAdam step, {name}", base, ours, baseline_name="torch AdamW f32",
                pairs=pairs, bar=SPEED,
            )
        )  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default=",".join(RIVALS), help="names, with commas; none: ''")
    parser.add_argument("--bytes", default="125m", help="the model whose states are counted")
    parser.add_argument("--pairs", type=int, default=common.PAIRS, help="of timed steps")
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("model", "steps", "batch", "seq")}
    print(common.describe(common.machine()))
    judged = [*speed(args.pairs), *state_bytes(args.bytes)]
    chosen = train.Settings(**settings)
    text = data.load(chosen.data, chosen.seq)
    config = models.load(args.model).replace(vocab=text.vocab)
    names = [name for name in args.only.split(",") if name]
    rows = [best_of(name, settings, text, config, args.seeds) for name in names]
    if len(rows) == 2:
        percent = (rows[1]["val_loss"] / rows[0]["val_loss"] - 1) * 100
        what = f"{args.model}, {args.steps} steps, MicroAdam against f32 AdamW: held-out loss"
        judged.append(common.judge(f"{what}, percent", percent, *LOSS))
    common.finish("microadam", [*rows, *judged])


if __name__ == "__main__":
    main()
