"""A LightningModule, trained in FP8 by a plugin of the Trainer, saved and resumed.

python examples/lightning_fit.py [--recipe coat] [--devices 2 [--shard]] [--resume CHECKPOINT]
"""

import argparse
from dataclasses import replace

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

import quaver as qv
from quaver.lightning import QuaverPrecision

LETTERS, WIDTH, BATCH = 32, 64, 32


def letters(count: int, seed: int) -> torch.utils.data.Dataset:
    """Sequences of 18 letters, each of which has 8 possible followers, one of them in 9 of 16
    cases: the loss of who has learned all of it is 1.54."""
    table = torch.randint(LETTERS, (2 * LETTERS, 8), generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(16, (18, count), generator=torch.Generator().manual_seed(seed))
    columns = list(chosen[:2])
    for choice in chosen[2:].clamp(max=7):
        columns.append(table[columns[-1] + LETTERS * (columns[-2] % 2), choice])
    return torch.utils.data.TensorDataset(torch.stack(columns, 1))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, WIDTH)
        self.norm = nn.RMSNorm(2 * WIDTH)
        self.up, self.down = nn.Linear(2 * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, LETTERS)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(torch.cat((x[:, :-1], x[:, 1:]), -1))
        return self.lm_head(self.down(F.gelu(self.up(x))))


class Speller(pl.LightningModule):
    def __init__(self, recipe: str | None):
        super().__init__()
        self.recipe, self.network, self.sharded = recipe, Network(), False

    def configure_model(self):
        """Under ModelParallelStrategy the model is converted here, and then sharded."""
        if self.sharded or self.device_mesh is None:
            return  # done by an earlier call, or the plugin's work
        self.sharded = True
        if self.recipe == "coat":
            self.bfloat16()  # FSDP2 takes one dtype
        if self.recipe is not None:
            qv.convert(self, self.recipe)
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        logits = self.network(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[0][:, 2:].flatten())

    def training_step(self, batch, index):
        return self.loss(batch)

    def train_dataloader(self):
        """Starts where a resumed run left off; Lightning would start with the first batch."""
        trainer, rows = self.trainer, letters(BATCH * self.trainer.max_steps, seed=1)
        first = BATCH * trainer.global_step + trainer.global_rank
        mine = torch.utils.data.Subset(rows, range(first, len(rows), trainer.world_size))
        return torch.utils.data.DataLoader(mine, BATCH // trainer.world_size)

    def validation_step(self, batch, index):
        self.log("held_out", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        options = {"lr": 3e-3, "weight_decay": 0.01, "betas": (0.9, 0.95)}
        if self.recipe is None:
            return torch.optim.AdamW(self.parameters(), **options)
        recipe = qv.recipe.get(self.recipe)
        if self.sharded:  # FP8 states of one scale a tensor, since shards would cut groups
            codes = {"exp_avg": "e4m3-tensor", "exp_avg_sq": "f16-tensor"}
            recipe = replace(recipe, plain_moments=True, **codes)
        return qv.AdamW(self.parameters(), recipe=recipe, **options)


def main(
    recipe: str | None = "coat",
    devices: int = 1,
    steps: int = 100,
    folder: str = "runs/lightning",
    resume: str | None = None,
    shard: bool = False,
) -> tuple[float, Speller]:
    """Trains without FP8 where `recipe` is None; returns the held-out loss and the model."""
    pl.seed_everything(0, verbose=False)
    model = Speller(recipe)
    save = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=steps // 2)
    fsdp2 = ModelParallelStrategy(
        devices, 1, save_distributed_checkpoint=False
    )  # a file, no folder
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=fsdp2 if shard else ("ddp" if devices > 1 else "auto"),
        plugins=[] if recipe is None else [QuaverPrecision(recipe)],
        max_steps=steps,
        gradient_clip_val=None if recipe is None and shard else 1.0,  # plain Lightning has none
        callbacks=[save],
        use_distributed_sampler=False,  # it would shuffle, and anew where a run resumes
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    held_out = torch.utils.data.DataLoader(letters(512, seed=2), batch_size=256)
    trainer.fit(model, ckpt_path=resume)
    trainer.validate(model, held_out, verbose=False)
    loss = trainer.callback_metrics["held_out"].item()
    if trainer.is_global_zero:
        print(f"held-out loss {loss:.6f}")
    return loss, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="coat")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", default="runs/lightning")
    parser.add_argument("--resume")
    parser.add_argument("--shard", action="store_true", help="by FSDP2")
    main(**vars(parser.parse_args()))
