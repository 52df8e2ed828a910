"""Writes a model as a folder that transformers loads, in bf16 or FP8."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UsageError
from .files import expanded, new_folder, write_text
from .hf.formats import FORMATS, Format, check_amax, decoded, not_finite
from .hf.source import NO_MATRIX, Source, Weight, source_of
from .tensor_file import stream_tensors

__all__ = ["FORMATS", "ExportReport", "export"]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class ExportReport:
    """The result of `export`. `fp8`: the layers whose weights are FP8; `left`: {layer: the reason}
    of the linear layers whose weights are bf16; `nbytes`: of all tensors."""

    path: Path
    format: str
    fp8: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}, {self.nbytes / 1e6:.1f} MB"]
        if self.format != "bf16":
            lines.append(f"{len(self.fp8)} layers in FP8")
            reasons: dict[str, list[str]] = {}
            for name, why in self.left.items():
                reasons.setdefault(why, []).append(name)
            for why, names in reasons.items():
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"left {', '.join(names[:3])}{more}: {why}")
        return "\n".join(lines)


@torch.no_grad()
def export(
    model: nn.Module,
    folder: str | os.PathLike,
    format: str = "bf16",
    *,
    tokenizer=None,
    max_shard_size: int | str = "5GB",
) -> ExportReport:
    """Writes `model`, of transformers or a quaver.models.Llama, converted or not, as a folder that
    from_pretrained loads: config.json, generation_config.json, safetensors with their index.

    Parameters become bf16; buffers keep their dtype. In the other formats the weights of linear
    layers are e4m3 with float32 powers of two that decode them:

    - "fp8-block": transformers' FineGrainedFP8, `weight_scale_inv` for each 128 x 128. A layer with
      a side above 128 that is no multiple of it stays bf16, because transformers and vLLM divide
      such a side differently.
    - "fp8-tensor": FineGrainedFP8 with one `weight_scale_inv` a weight.
    - "compressed-tensors": one `weight_scale` a weight.

    Of a converted model those are the layers that multiply in FP8. With one scale their codes are
    those that training multiplies by; in "fp8-block", those of a recipe with grain="block", and
    their scales, which are powers of two only if the recipe's are. Of a plain model they are all
    linear layers except heads and gates. One weight is in memory at a time. The folder appears
    whole or not at all.

    Args:
        folder: a new or an empty folder; its parents are made.
        tokenizer: written beside the model by its save_pretrained. Its `eos_token_id` becomes that
            of a configuration that has none, as a quaver.models.Llama's.
        max_shard_size: bytes of a safetensors file, or "5GB", "500MiB"; a larger tensor has a file
            of its own.

    Raises:
        TypeError: another model, or a tokenizer without save_pretrained.
        UsageError: another format or size, a folder that is not empty, a model that is sharded, has
            adapters or values that are not finite, or no layer that the format could encode.
        OSError: a file cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"export: tokenizer must have save_pretrained, got {type(tokenizer).__name__}"
        )
    limit, kind = _size(max_shard_size), FORMATS[format]
    source = source_of(model)
    if kind.suffix is not None:
        _choose(source, kind, format)
    pieces = list(_pieces(source, kind))
    path = expanded(folder)
    with new_folder(path, "export") as inside:
        if source.code is not None:
            source.code(inside)
        _set_end(source, tokenizer)
        _write_config(source, kind, inside)
        if tokenizer is not None:
            tokenizer.save_pretrained(inside)
        _write_shards(_shards(pieces, limit), inside)
    fp8 = source.fp8 if kind.suffix is not None else []
    left = {name: why for name, why in source.left.items() if why != NO_MATRIX}
    return ExportReport(path, format, fp8, left, sum(piece.nbytes for piece in pieces))


def _size(size: int | str) -> int:
    """Bytes of a whole number, or of text such as "5GB" or "500 MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", str(size).strip().upper())
    if match is None or isinstance(size, (bool, float)) or float(match[1]) <= 0:
        raise UsageError(f'export: max_shard_size must be bytes or text like "5GB", got {size!r}')
    return max(1, int(float(match[1]) * UNITS[match[2] or ""]))


def _choose(source: Source, kind: Format, format: str) -> None:
    """Leaves layers that the format cannot hold. UsageError where none stays."""
    if kind.blocks:
        for weight in source.weights:
            for name, rows in weight.parts.items():
                layer = name.rpartition(".")[0]
                shape = (rows or weight.tensor.shape[0], *weight.tensor.shape[1:])
                if weight.layer is not None and layer in source.fp8:
                    why = _why_no_blocks(shape)
                    if why is not None:
                        source.fp8.remove(layer)
                        source.left[layer] = why
    if not source.fp8:
        reasons = sorted(set(source.left.values()) - {NO_MATRIX})
        detail = f" ({'; '.join(reasons)})" if reasons else ""
        raise UsageError(
            f"export: {format} holds none of the model's layers{detail}; "
            f"use {'fp8-tensor' if kind.blocks else 'bf16'}"
        )


def _why_no_blocks(shape: tuple[int, ...]) -> str | None:
    bad = [n for n in shape if n > 128 and n % 128]
    return f"a side of {bad[0]} is no multiple of 128" if bad else None


@dataclass(frozen=True)
class _Piece:
    """Tensors of a folder that are made together: their kinds, as meta tensors by name."""

    kinds: dict[str, Tensor]
    make: Callable[[], dict[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(kind.nbytes for kind in self.kinds.values())


def _pieces(source: Source, kind: Format) -> Iterator[_Piece]:
    """The pieces of all weights. Those that transformers stores joined are one."""
    fp8 = set(source.fp8) if kind.suffix is not None else set()
    plain = []
    for weight in source.weights:
        layers = {name.rpartition(".")[0] for name in weight.parts}
        if weight.layer is not None and layers & fp8:
            yield _encoded(source, kind, weight, fp8)
        else:
            plain.append(weight)
    yield from _plain_pieces(source, plain)


def _encoded(source: Source, kind: Format, weight: Weight, fp8: set[str]) -> _Piece:
    tensor, names = weight.tensor, list(weight.parts)
    rows = [tensor.shape[0] if n is None else n for n in weight.parts.values()]
    kinds = {}
    stored = {name: _renamed(source, name) for name in names}
    chosen = [name.rpartition(".")[0] in fp8 for name in names]
    for name, height, is_fp8 in zip(names, rows, chosen, strict=True):
        shape = (height, tensor.shape[1])
        dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
        kinds[stored[name]] = torch.empty(shape, dtype=dtype, device="meta")
        if is_fp8:
            scale = torch.empty(kind.scale_shape(*shape), dtype=torch.float32, device="meta")
            kinds[_scale_name(stored[name], kind)] = scale

    def make() -> dict[str, Tensor]:
        made = {}
        codes = kind.split_codes(tensor, weight.layer, rows, names[0])
        plain = None if all(chosen) else decoded(tensor, torch.bfloat16).split(rows)
        for i, name in enumerate(names):
            if chosen[i]:
                made[stored[name]], made[_scale_name(stored[name], kind)] = codes[i]
            else:
                made[stored[name]] = plain[i]
        return made

    return _Piece(kinds, make)


def _renamed(source: Source, name: str) -> str:
    (stored,) = source.revert({name: torch.empty(2, 4, device="meta")})
    return stored


def _scale_name(name: str, kind: Format) -> str:
    return name.removesuffix("weight") + kind.suffix


def _plain_pieces(source: Source, weights: list[Weight]) -> Iterator[_Piece]:
    joined: dict[frozenset, list[Weight]] = {}
    by_name: dict[str, frozenset] = {}
    for weight in weights:
        keys = frozenset(source.revert(_values(weight, meta=True)))
        group = keys.union(*(by_name[key] for key in keys if key in by_name))
        members = [w for old in {by_name[k] for k in keys if k in by_name} for w in joined.pop(old)]
        joined[group] = [*members, weight]
        by_name |= dict.fromkeys(group, group)
    for members in joined.values():

        def make(members=members, meta=False) -> dict[str, Tensor]:
            values = {}
            for weight in members:
                values |= _values(weight, meta)
            return source.revert(values)

        yield _Piece(make(meta=True), make)


def _values(weight: Weight, meta: bool) -> dict[str, Tensor]:
    """The plain tensors that a weight is stored as; on the meta device, where they are counted."""
    tensor = weight.tensor
    dtype = torch.bfloat16 if tensor.is_floating_point() and not weight.keeps else tensor.dtype
    if meta:
        value = torch.empty(tensor.shape, dtype=dtype, device="meta")
    else:
        value = decoded(tensor, dtype)
        _check_finite(next(iter(weight.parts)), tensor, value)
    if len(weight.parts) == 1:
        return {next(iter(weight.parts)): value}
    parts = value.split(list(weight.parts.values()))
    return dict(zip(weight.parts, parts, strict=True))


def _check_finite(name: str, tensor: Tensor, value: Tensor) -> None:
    """Refuses a parameter that is not finite; a buffer may be (a mask, say)."""
    check_amax(tensor, name)
    if isinstance(tensor, nn.Parameter) and value.is_floating_point() and value.numel():
        low, high = value.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise not_finite(name)


def _shards(pieces: list[_Piece], limit: int) -> list[list[_Piece]]:
    shards, size = [[]], 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _write_shards(shards: list[list[_Piece]], inside: Path) -> None:
    """Writes the safetensors files, and their index where there are several."""
    places, total = {}, 0
    for i, pieces in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        kinds = {key: kind for piece in pieces for key, kind in piece.kinds.items()}
        stream_tensors(inside / name, kinds, _made(pieces), {"format": "pt"})
        places |= dict.fromkeys(kinds, name)
        total += sum(piece.nbytes for piece in pieces)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(inside / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _made(pieces: list[_Piece]) -> Iterator[tuple[str, Tensor]]:
    for piece in pieces:
        made = piece.make()
        while made:
            name, tensor = made.popitem()
            yield name, tensor.detach().cpu().contiguous()
            del tensor


def _set_end(source: Source, tokenizer) -> None:
    """The token that ends a text, where the configuration names none: `generate` stops there."""
    config = source.config
    known = getattr(config, "eos_token_id", None) is not None
    end = None if known else getattr(tokenizer, "eos_token_id", None)
    if end is None:
        return
    size = getattr(config, "vocab_size", None)
    if size is not None and end >= size:
        raise UsageError(
            f"export: the tokenizer's end token is {end} and the model has {size} tokens; wanted "
            "the tokenizer that the model was trained with"
        )
    config.eos_token_id = end
    if source.generation is not None:
        source.generation.eos_token_id = end


def _write_config(source: Source, kind: Format, inside: Path) -> None:
    config = source.config
    config.dtype = "bfloat16"
    if kind.config is not None:
        config.quantization_config = kind.config(sorted(source.left))
    config.save_pretrained(inside)
    if source.generation is not None:
        source.generation.save_pretrained(inside)
