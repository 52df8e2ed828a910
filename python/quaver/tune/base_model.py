"""The model and the tokenizer of a folder that transformers reads, checked."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ..errors import UsageError
from ..files import expanded, opened
from ..hf.pretrained import load_pretrained, quiet
from .settings import Settings

__all__ = [
    "check_model",
    "identity",
    "load_config",
    "load_model",
    "load_tokenizer",
    "quiet",
    "skeleton",
]

WEIGHTS = ("*.safetensors", "*.bin")


def _transformers():
    """The package, which takes seconds to import."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "tune needs the package `transformers`: pip install transformers"
        ) from None
    return transformers


def _read(settings: Settings, what: str, name: str, **options):
    """`from_pretrained` of one of transformers' Auto classes on the folder."""
    transformers = _transformers()
    folder = expanded(settings.model)
    if not folder.is_dir():
        raise UsageError(f"--model {settings.model}: no such folder; wanted one of transformers'")
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {settings.model}: the folder has no config.json")
    try:
        with quiet():
            auto = getattr(transformers, name)
            return auto.from_pretrained(str(folder), local_files_only=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a damaged folder: of many types, some of other packages
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"--model {settings.model}: {what} cannot be read: {lines[0]}") from None


def load_config(settings: Settings):
    """The folder's config. Raises UsageError for a folder that is none of transformers', or of a
    model that is no decoder with a language-model head."""
    config = _read(settings, "the config", "AutoConfig")
    if type(config) not in _transformers().MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"--model {settings.model}: a {config.model_type} model has no causal language-model "
            "head in transformers; wanted a decoder"
        )
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and settings.seq > context:
        raise UsageError(f"--seq {settings.seq} exceeds the model's context {context}")
    return config


def load_tokenizer(settings: Settings):
    """The folder's tokenizer."""
    folder = expanded(settings.model)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / name).exists() for name in names):
        raise UsageError(f"--model {settings.model}: the folder has no tokenizer (tokenizer.json)")
    return _read(settings, "the tokenizer", "AutoTokenizer")


def load_model(settings: Settings) -> nn.Module:
    """The model with the folder's weights, in --dtype. Raises UsageError where some are missing."""
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if getattr(load_config(settings), "quantization_config", None) is not None:
        return load_pretrained(settings.model, dtype=None if dtype == "auto" else dtype)
    model, found = _read(
        settings, "the model", "AutoModelForCausalLM", dtype=dtype, output_loading_info=True
    )
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, found.get(what) or ()))
        if names:
            kind = what.removesuffix("_keys")
            raise UsageError(
                f"--model {settings.model}: {len(names)} weights are {kind}, such as {names[0]}"
            )
    return model


def skeleton(settings: Settings, config) -> nn.Module:
    """The model without memory, by which options are checked."""
    transformers = _transformers()
    dtype = settings.dtype if settings.dtype != "auto" else str(config.dtype or "float32")
    with torch.device("meta"), quiet():
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(getattr(torch, dtype.removeprefix("torch.")))


def check_model(settings: Settings, model: nn.Module, tokenizer) -> None:
    """Raises UsageError where the tokenizer has more tokens than the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UsageError(
            f"--model {settings.model}: its tokenizer has {len(tokenizer)} tokens, its model {rows}"
        )


def identity(settings: Settings, config) -> dict:
    """{"type", "sha256"} of the config's and the weights' files, wherever the folder lies."""
    folder, digest = expanded(settings.model), hashlib.sha256()
    weights = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    for path in (folder / "config.json", *weights):
        digest.update(f"{path.name}\n".encode())
        with opened(path) as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return {"type": config.model_type, "sha256": digest.hexdigest()}
