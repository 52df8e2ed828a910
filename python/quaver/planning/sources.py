"""The model of a plan: a module, a configuration, a folder or a name, built without storage."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import models
from ..errors import UsageError
from ..files import expanded
from ..nn import LinearBase
from ..tensor import ScaledTensor, is_sharded

__all__ = ["Source", "source", "without_storage"]

WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")  # a configuration's name for it


@dataclass(frozen=True)
class Source:
    """`build` gives a new model on the meta device; `context` is its longest sequence, if it has
    one; `width` that of its hidden states."""

    name: str
    build: Callable[[], nn.Module]
    width: int
    context: int | None


def source(model, dtype: torch.dtype) -> Source:
    """The source of an nn.Module (copied without its bytes, in its own dtypes), a Config of
    quaver.models or of transformers, a preset's name, a JSON file or a folder with a config.json of
    either; configurations are built with parameters of `dtype`. Raises UsageError."""
    if isinstance(model, nn.Module):
        return _of_module(model)
    if isinstance(model, models.Config):
        return _of_config(model, model.family, dtype)
    if hasattr(model, "model_type"):
        return _of_transformers(model, str(model.model_type), dtype)
    if not isinstance(model, (str, os.PathLike)):
        raise UsageError(
            "plan: model must be a module, a configuration, a folder or a name, got "
            f"{type(model).__name__}"
        )
    name = os.fspath(model)
    if name in models.PRESETS:
        return _of_config(models.PRESETS[name], name, dtype)
    path = expanded(name)
    if path.is_dir():
        return _of_folder(path, dtype)
    return _of_config(models.load(name), name, dtype)


def _of_folder(path: Path, dtype: torch.dtype) -> Source:
    if not (path / "config.json").is_file():
        raise UsageError(
            f"plan: {path} has no config.json; wanted the folder of a Hugging Face model"
        )
    try:
        from transformers import AutoConfig
    except ImportError:
        raise _needs_transformers(path) from None
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise UsageError(f"plan: {path}: {str(error).splitlines()[0]}") from None
    return _of_transformers(config, str(path), dtype)


def _needs_transformers(what) -> UsageError:
    return UsageError(f"plan: {what} needs transformers: pip install quaver[hf]")


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


def _to(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters alone: buffers, as of rotary positions, keep their precision."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.train()


def _of_config(config: models.Config, name: str, dtype: torch.dtype) -> Source:
    def build() -> nn.Module:
        with _on_meta():
            return _to(models.build(config), dtype)

    return Source(name, build, config.dim, config.context)


def _of_transformers(config, name: str, dtype: torch.dtype) -> Source:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise _needs_transformers(name) from None

    def build() -> nn.Module:
        try:
            with _on_meta():
                return _to(AutoModelForCausalLM.from_config(copy.deepcopy(config)), dtype)
        except (ValueError, ImportError) as error:
            raise UsageError(f"plan: {name}: {str(error).splitlines()[0]}") from None

    context = getattr(config, "max_position_embeddings", None)
    return Source(name, build, _width(config) or 0, context)


def _width(config) -> int | None:
    return next((w for key in WIDTHS if (w := getattr(config, key, None))), None)


def _of_module(model: nn.Module) -> Source:
    config = getattr(model, "config", None)
    linear = next((m for m in model.modules() if isinstance(m, (nn.Linear, LinearBase))), None)
    width = _width(config) or getattr(linear, "in_features", 0)
    for name, p in model.named_parameters():
        if is_sharded(p):
            raise UsageError(
                f"plan: {name} is sharded over ranks; plan the model before it is, with parallel="
            )
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "context", None)
    return Source(type(model).__name__, lambda: without_storage(model), width, context)


def without_storage(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device; none of its bytes are copied."""

    def empty(t: Tensor) -> Tensor:
        return torch.empty_like(t, device="meta")

    memo: dict[int, object] = {}
    for t in (*model.parameters(), *model.buffers()):
        new = t.detach()._map(empty) if isinstance(t, ScaledTensor) else empty(t.detach())
        parameter = isinstance(t, nn.Parameter)
        memo[id(t)] = nn.Parameter(new, t.requires_grad) if parameter else new
    for module in model.modules():
        copies = vars(module).get("fp8_weight")
        if copies is not None:  # made anew of the copied weight
            memo[id(copies)] = None
    return copy.deepcopy(model, memo).train()
