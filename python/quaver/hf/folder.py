"""The model and the tokenizer of a folder that transformers reads, checked.

What is wrong with `model`, the folder of --model, is a UsageError of one line.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from ..errors import UsageError
from ..files import expanded, opened
from .pretrained import check_files, class_of, load_pretrained, quiet

__all__ = ["check_model", "identity", "load_config", "load_model", "load_tokenizer", "skeleton"]

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def _transformers():
    """The package, which takes seconds to import."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "a folder of transformers needs the package `transformers`: pip install quaver[hf]"
        ) from None
    return transformers


def _read(flag: str, model: str, what: str, name: str, **options):
    """`from_pretrained` of one of transformers' Auto classes on the folder that `flag` names."""
    transformers = _transformers()
    try:
        with quiet():
            auto = getattr(transformers, name)
            return auto.from_pretrained(str(expanded(model)), local_files_only=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a damaged folder: of many types, some of other packages
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{flag} {model}: {what} cannot be read: {lines[0]}") from None


def load_config(model: str, length: int):
    """The folder's config. Raises UsageError for a folder that is none of transformers' or lacks
    files of weights, and for a model that is no decoder with a language-model head, or whose
    context is below `length`."""
    folder = expanded(model)
    if not folder.is_dir():
        raise UsageError(f"--model {model}: no such folder; wanted one of transformers'")
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {model}: the folder has no config.json")
    config = _read("--model", model, "the config", "AutoConfig")
    if type(config) not in _transformers().MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"--model {model}: a {config.model_type} model has no causal language-model "
            "head in transformers; wanted a decoder"
        )
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        raise UsageError(f"--seq {length} exceeds the model's context {context}")
    if not any(folder.glob("*.bin")):
        check_files(folder)
    return config


def load_tokenizer(model: str, flag: str = "--model"):
    """The folder's tokenizer."""
    folder = expanded(model)
    if not any((folder / name).exists() for name in TOKENIZER):
        raise UsageError(f"{flag} {model}: the folder has no tokenizer (tokenizer.json)")
    return _read(flag, model, "the tokenizer", "AutoTokenizer")


def load_model(model: str, config, dtype: torch.dtype | None) -> nn.Module:
    """The model with the folder's weights as `dtype`, or as they are. Raises UsageError where some
    are missing."""
    if getattr(config, "quantization_config", None) is not None:
        return load_pretrained(model, dtype=dtype)
    made, found = _read(
        "--model", model, "the model", "AutoModelForCausalLM", dtype=dtype or "auto",
        output_loading_info=True,
    )  # fmt: skip
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, found.get(what) or ()))
        if names:
            kind = what.removesuffix("_keys")
            raise UsageError(
                f"--model {model}: {len(names)} weights are {kind}, such as {names[0]}"
            )
    return made


def skeleton(config, dtype: torch.dtype | None) -> nn.Module:
    """The model without memory, by which options are checked."""
    own = dtype or getattr(torch, str(config.dtype or "float32").removeprefix("torch."))
    with torch.device("meta"), quiet():
        return class_of(config)._from_config(config).to(own)


def check_model(model: str, made: nn.Module, tokens: int) -> None:
    """Raises UsageError where the tokenizer has more `tokens` than the model."""
    rows = made.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise UsageError(f"--model {model}: its tokenizer has {tokens} tokens, its model {rows}")


def identity(model: str, config) -> dict:
    """{"type", "sha256"} of the config's and the weights' files, wherever the folder lies."""
    folder, digest = expanded(model), hashlib.sha256()
    weights = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    for path in (folder / "config.json", *weights):
        digest.update(f"{path.name}\n".encode())
        with opened(path) as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return {"type": config.model_type, "sha256": digest.hexdigest()}
