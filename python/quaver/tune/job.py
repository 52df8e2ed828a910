"""One training of `quaver tune`, by one method."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import machine, recipe
from ..hf.folder import load_config, load_model
from ..hf.pretrained import quiet
from ..training import Run, Training, finite
from . import methods
from .chat import IGNORED, Chat, Example, collate

__all__ = ["Tuning", "held_out_loss"]

SAMPLE = 48  # tokens


def _sum_of_losses(model: nn.Module, batch: tuple[Tensor, ...], dtype) -> Tensor:
    """The sum over the answers' tokens of the batch."""
    device = next(model.parameters()).device
    tokens, mask, labels = (part.to(device) for part in batch)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    found, wanted = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(found, wanted, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def held_out_loss(model: nn.Module, chat: Chat, batch: int, name: str) -> float | None:
    """The mean over all answers' tokens of the held-out examples; `name` is the recipe's."""
    training = model.training
    model.eval()
    total = 0.0
    with machine.bf16_products(next(model.parameters()).device):
        for i in range(0, len(chat.held_out), batch):
            part = collate(chat.held_out[i : i + batch])
            total += _sum_of_losses(model, part, recipe.get(name).autocast).item()
    model.train(training)
    return finite(total / sum(example.answers for example in chat.held_out))


class Tuning(Training):
    """Method `method` of a run, whose `model` is the tokenizer of the folder, and `text` the
    Chat."""

    def __init__(self, run: Run, method: str):
        super().__init__(run, method, replace(run.settings, lr=run.settings.rate(method)))
        settings = self.settings
        config = load_config(settings.model, settings.seq)
        model = load_model(settings.model, config, settings.torch_dtype).to(self.device)
        torch.manual_seed(settings.seed)
        self.model = methods.build(method, model, settings).train()
        self.optimizer = methods.build_optimizer(self.model, settings, self.world)
        # A rate of a group over the run's, as the side network's groups have it.
        self.multiples = [group["lr"] / settings.lr for group in self.optimizer.param_groups]
        self.autocast = recipe.get(settings.recipe).autocast
        self._kept = methods.Trained(self.model)

    @property
    def kept(self) -> nn.Module:
        return self._kept

    def _own(self, configuration: dict, name: str) -> dict:
        """The data lies anywhere, and other methods change nothing."""
        free = dict.fromkeys(("data", "methods"))
        return configuration | free | {"recipe": name, "lr": configuration.get("lr", {}).get(name)}

    def _set_rate(self, lr: float) -> None:
        for group, multiple in zip(self.optimizer.param_groups, self.multiples, strict=True):
            group["lr"] = lr * multiple

    def _examples(self, step: int, micro: int) -> list[Example]:
        s = self.settings
        first = ((step - 1) * s.accumulate + micro) * s.batch
        return self.run.text.batch(s.seed, first, s.batch)

    def _batch(self, step: int, micro: int) -> list:
        """A micro-batch, and the tokens that its loss is divided by, so that over the step every
        answer's token counts alike."""
        count = self.settings.accumulate
        answers = [
            sum(example.answers for example in self._examples(step, i)) for i in range(count)
        ]
        return [*collate(self._examples(step, micro)), sum(answers) / count]

    def _loss(self, tokens: Tensor, mask: Tensor, labels: Tensor, answers: float) -> Tensor:
        return _sum_of_losses(self.model, (tokens, mask, labels), self.autocast) / answers

    def _tokens(self, step: int) -> int:
        count = range(self.settings.accumulate)
        return sum(len(e.tokens) for micro in count for e in self._examples(step, micro))

    def _validate(self) -> float | None:
        return held_out_loss(self.model, self.run.text, self.settings.batch, self.settings.recipe)

    def _result(self, metrics) -> dict:
        result = super()._result(metrics)
        self._write()
        count = sum(p.numel() for p in methods.trained(self.model))
        return result | {"trained": count}

    def _write(self) -> None:
        """The folder of the result. A run that is killed here writes it again."""
        folder = self.run.folder.tuned_path(self.name)
        following = folder.with_name("tuned.next")
        if following.exists():
            shutil.rmtree(following)
        with quiet():
            methods.save(self.name, self.model, following, self.run.model)
        folder.mkdir(exist_ok=True)
        for path in following.iterdir():
            os.replace(path, folder / path.name)
        following.rmdir()

    @torch.no_grad()
    def _sample(self) -> dict:
        """The model's own answer to the first held-out example, the likeliest token each time."""
        tokenizer, example = self.run.model, self.run.text.held_out[0]
        context = getattr(self.model.config, "max_position_embeddings", None)
        room = min(SAMPLE, context // 2) if context else SAMPLE
        start = example.tokens[: example.start]
        start = start[-(context - room) :] if context else start
        prompt = torch.tensor([start], device=self.device)
        self.model.eval()
        with (
            quiet(),
            machine.bf16_products(self.device),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            found = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        parts = {
            "prompt": example.tokens[: example.start],
            "wanted": example.tokens[example.start :],
            "answer": found[0, prompt.shape[1] :].tolist(),
        }
        return {key: tokenizer.decode(ids, skip_special_tokens=True) for key, ids in parts.items()}
