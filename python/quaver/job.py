"""One training of `quaver train`, of a recipe and an optimizer, on text."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed, recipe
from .assembly import build_model, build_optimizer, is_fsdp
from .hf.start import Start
from .optimizers import label
from .schedule import learning_rate, parameter_groups
from .training import Run, Training, finished, finite
from .watching import watch

__all__ = ["Job", "Run", "finished", "learning_rate", "parameter_groups"]

SAMPLE = 48  # tokens of a prompt, and as many behind it


class Job(Training):
    """Recipe `name` of a run with an optimizer of --optimizer (None: AdamW with the recipe's own
    states): the model and optimizer of the configuration, on this rank."""

    def __init__(self, run: Run, name: str, optimizer: str | None = None):
        settings = replace(run.settings, lr=run.settings.rate(optimizer))
        super().__init__(run, label(name, optimizer), settings)
        self.recipe, self.chosen = recipe.get(name), optimizer
        self.model = build_model(settings, run.model, self.recipe, self.world)
        self.optimizer = self._build_optimizer()
        if settings.watch and self.recipe.linear is not None:
            self.watch = watch(self.model, every=settings.watch, fallback="auto")
        if self.world.size > 1:
            self._connect()

    def _build_optimizer(self) -> torch.optim.Optimizer:
        settings, config = self.settings, self.run.model
        return build_optimizer(settings, config, self.recipe, self.world, self.model, self.chosen)

    def _connect(self) -> None:
        """Sets `parallel`, which averages gradients unless FSDP2 does, and `transport`."""
        if is_fsdp(self.settings, self.world):
            self.transport = distributed.transport_of(self.model)
            return
        group = self.world.data_group
        self.parallel = distributed.ddp(self.model, optimizer=self.optimizer, group=group)
        self.transport = self.parallel.transport

    def _own(self, configuration: dict, name: str) -> dict:
        """The part of a run's configuration that this training depends on, with its name: not where
        the data lies, nor the other trainings."""
        free = dict.fromkeys(("data", "recipes", "optimizers"))
        lr = configuration.get("lr")
        lr = lr.get(self.chosen) if isinstance(lr, dict) else lr
        return configuration | free | {"recipe": name, "lr": lr}

    def _predict(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, vocab] of tokens int64 [batch, length]."""
        tokens, dtype = tokens.to(self.device), self.recipe.autocast
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            if isinstance(self.run.model, Start):
                return self.run.model.logits(self.model, tokens)
            return self.model(tokens)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self._predict(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.to(self.device).flatten())

    def _batch(self, step: int, micro: int) -> list[Tensor]:
        """This rank's part of a micro-batch."""
        settings, world = self.settings, self.world
        whole = self.run.text.batch(settings.seed, step, settings.batch, settings.seq, micro)
        rows = settings.batch // world.data_size
        return [part[world.data_rank * rows : (world.data_rank + 1) * rows] for part in whole]

    def _tokens(self, step: int) -> int:
        return self.settings.batch * self.settings.seq * self.settings.accumulate

    @torch.no_grad()
    def _validate(self) -> float | None:
        """The mean loss of the held-out batches, which ranks share out."""
        self.model.eval()
        found = {}
        batches = list(self.run.text.validation(self.settings.batch, self.settings.seq))
        # The same number on every rank, because forwards of a sharded model are collective: a rank
        # without a batch left repeats an earlier one.
        for turn in range(0, len(batches), self.world.data_size):
            i = min(turn + self.world.data_rank, len(batches) - 1)
            inputs, targets = batches[i]
            found[str(i)] = (self._loss(inputs, targets).item() * len(inputs), len(inputs))
        self.model.train()
        parts = self.world.all_gather(found)
        everywhere = {int(i): pair for part in parts for i, pair in part.items()}
        pairs = [everywhere[i] for i in range(len(everywhere))]
        return finite(sum(total for total, _ in pairs) / sum(count for _, count in pairs))

    @torch.no_grad()
    def _sample(self) -> dict[str, str]:
        """The first held-out tokens, and the likeliest token behind them each time. Every rank
        takes part, because forwards of a sharded model are collective."""
        text, parts = self.run.text, self.settings.parallel.tensor
        # Of one length, which the ranks of a split model share: what lies behind is not seen.
        length = min(self.settings.seq, 2 * SAMPLE // parts * parts)
        wanted = text.held_out[:length].long()
        row, start = wanted.clone(), (length + 1) // 2
        row[start:] = 0
        self.model.eval()
        for at in range(start, length):
            row[at] = self._predict(row[None])[0, at - 1].argmax()
        self.model.train()
        cut = {"prompt": wanted[:start], "wanted": wanted[start:], "answer": row[start:]}
        return {key: text.decode(ids.tolist()) for key, ids in cut.items()}
