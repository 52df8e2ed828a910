"""A folder of transformers as the start of a run: its config beside the trained weights is enough
to build the model again."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..files import expanded
from . import folder as hf_folder
from .pretrained import class_of, load_pretrained, quiet

__all__ = ["Start", "load_start", "rebuild"]

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Start:
    """A causal model of transformers in `folder`. `config` is its own, `identity` that of its
    files, `vocab` the rows of its embedding, `dim` its width, `context` its longest sequence, if it
    says so."""

    folder: str
    config: object
    identity: dict
    vocab: int
    dim: int
    context: int | None

    def as_dict(self) -> dict:
        return self.identity

    def build(self) -> nn.Module:
        """The model with the folder's weights in f32, which a recipe may then convert."""
        return load_pretrained(self.folder, dtype=torch.float32).train()

    def skeleton(self) -> nn.Module:
        """The model without memory, by which options are checked."""
        return hf_folder.skeleton(self.config, torch.float32)

    def save(self, folder: Path) -> None:
        """Writes what `rebuild` reads."""
        config = copy.deepcopy(self.config)
        config.__dict__.pop("quantization_config", None)
        config.save_pretrained(folder)
        generation = expanded(self.folder) / GENERATION
        if generation.is_file():
            shutil.copyfile(generation, folder / GENERATION)

    @staticmethod
    def logits(model: nn.Module, tokens: Tensor) -> Tensor:
        """[batch, length, vocab] of tokens int64 [batch, length]."""
        return model(input_ids=tokens, use_cache=False).logits


def load_start(model: str, length: int) -> Start:
    """The start that --model names, for sequences of `length`. Raises UsageError for a folder that
    is none of transformers' or lacks files, before weights are read."""
    config = hf_folder.load_config(model, length)
    made = hf_folder.skeleton(config, torch.float32)
    vocab, dim = made.get_input_embeddings().weight.shape
    context = getattr(config, "max_position_embeddings", None)
    return Start(model, config, hf_folder.identity(model, config), vocab, dim, context)


def rebuild(folder: Path) -> nn.Module:
    """The model of a folder of `Start.save`, with weights of no meaning, in f32."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with quiet():
            made = class_of(config)._from_config(config, dtype=torch.float32)
            if (folder / GENERATION).is_file():
                made.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: cannot be read: {str(error).splitlines()[0]}") from None
    return made
