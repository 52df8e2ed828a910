"""Reads a folder of transformers: plain weights, whatever FP8 format they are stored in."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import FileError, UsageError
from ..files import expanded, read_text
from ..schema import Each, SchemaError, check, parse

__all__ = ["check_files", "class_of", "load_pretrained", "quiet"]

INDEX = "model.safetensors.index.json"
METHODS = ("fp8", "compressed-tensors")


def load_pretrained(folder: str | os.PathLike, *, dtype: torch.dtype | None = None):
    """The model of a folder of transformers, in eval mode, with plain weights: those in FP8 (block,
    tensor, compressed-tensors) are decoded. A start for `quaver.convert` like any other model.

    Args:
        folder: config.json and safetensors, say by `quaver.export` or a download.
        dtype: of the parameters; None is the folder's own, bf16 for FP8.

    Raises:
        UsageError: a folder that is none, or lacks a file; another quantisation; weights that are
            missing or of another shape; a package that is not installed.
    """
    path = expanded(folder)
    method = check_files(path)
    transformers = _transformers()
    with quiet(), _one_line(path):
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
        if method is not None:
            config.quantization_config["dequantize"] = True
        model, found = class_of(config).from_pretrained(
            str(path),
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
        )
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(map(str, found.get(what) or ()))
        if keys:
            raise FileError(
                f"{path}: {len(keys)} weights are {what.removesuffix('_keys')}, such as {keys[0]}"
            )
    return _plain(model)


def class_of(config) -> type:
    """The class of transformers that a config names; the causal model where it names none."""
    transformers = _transformers()
    names = config.architectures or ["AutoModelForCausalLM"]
    kind = getattr(transformers, names[0], None)
    return kind or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def check_files(path: Path) -> str | None:
    """The quantisation of a folder, None for plain weights, once its config and the headers of all
    its files are read. Raises UsageError as load_pretrained does."""
    described = _config(path)
    tensors = _tensors(path)
    method = _method(path, described)
    if method == "fp8":
        _check_blocks(path, described["quantization_config"], tensors)
    return method


def _transformers():
    try:
        import transformers
    except ImportError:
        raise UsageError("load_pretrained: wanted transformers; pip install quaver[hf]") from None
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from writing bars and warnings: what matters is checked and named."""
    logging = _transformers().utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one package about the other
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Errors of transformers and of packages that it wants, as one line that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{path}: cannot be loaded: {lines[0]}") from error


def _config(path: Path) -> dict:
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; wanted one that transformers' model is in")
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{path}: the folder has no config.json; wanted a model of transformers")
    try:
        config = parse(read_text(file, follow=True))
        check(config, dict, "config.json")
    except SchemaError as error:
        raise FileError(f"{file} is damaged: {error}") from None
    if "model_type" not in config:
        raise UsageError(f"{file} has no model_type; wanted a folder of a model of transformers")
    return config


def _method(path: Path, config: dict) -> str | None:
    """The quantisation of a folder; None for plain weights."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in METHODS:
        raise UsageError(
            f"{path}: the weights are quantised by {method!r}; wanted one of {', '.join(METHODS)}, "
            "or plain weights"
        )
    return method


def _tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all tensors, by the headers of files that are all there and whole."""
    import safetensors

    if (path / INDEX).is_file():
        try:
            index = parse(read_text(path / INDEX, follow=True))
            check(index, {"weight_map": Each(str)}, INDEX)
        except SchemaError as error:
            raise FileError(f"{path / INDEX} is damaged: {error}") from None
        places = index["weight_map"]
    elif (path / "model.safetensors").is_file():
        places = {}
    else:
        raise FileError(f"{path}: no model.safetensors and no {INDEX}: download the weights too")
    shapes = {}
    for name in sorted(set(places.values())) or ["model.safetensors"]:
        file = path / name
        if not file.is_file():
            raise FileError(f"{path}: {name} is missing: download it again")
        try:
            with safetensors.safe_open(file, "pt") as opened:
                found = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise FileError(f"{file}: cut short or damaged ({error}): download it again") from None
        lost = sorted(key for key, place in places.items() if place == name and key not in found)
        if lost:
            raise FileError(f"{file}: has no {lost[0]}, which {INDEX} places there")
        shapes |= found
    return shapes


def _check_blocks(path: Path, quantization: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses weights that transformers would decode by blocks of another size: it divides a side
    evenly among the scales."""
    block = quantization.get("weight_block_size")
    if block is None:
        return
    for key, scale in shapes.items():
        shape = shapes.get(key.removesuffix("_scale_inv"))
        if not key.endswith("weight_scale_inv") or shape is None or len(scale) < 2:
            continue
        for n, count, size in zip(shape[-2:], scale[-2:], block, strict=True):
            if count != math.ceil(n / size) or (count > 1 and n % size):
                raise UsageError(
                    f"{path}: {key} has {list(scale)} scales for {list(shape)}; wanted sides that "
                    f"are multiples of {size}, or at most {size}: transformers decodes others wrong"
                )


def _plain(model):
    """The model without the marks of a quantised folder, by which it would be quantised again."""
    model.config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            vars(config).pop("_is_quantized", None)
    return model
