"""Checkpoints of sharded models through torch.distributed.checkpoint: every rank writes its shards,
and any other number of ranks reads them, one process without torchrun included.

    PATH/checkpoint.json    what `quaver.save` describes, and the size and CRC-32 of each file
    PATH/a, PATH/b          the shards, safetensors: one folder is named by checkpoint.json, the
                            other is being written or absent

Tensors are stored as they are, under the names of `quaver.save`. Nothing of ours is pickled, and
nothing outside of PATH is read or written, whatever checkpoint.json says.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule

from ... import rng
from ...checkpoint import CheckpointError, check_document, collect, plan
from ...comm.together import together
from ...comm.transport import Transport
from ...errors import FileError
from ...files import expanded, locked, opened, read_text, remove_known, write_text
from ...placement import like
from ...schema import Each, SchemaError, check, parse, with_crc32, without_crc32
from ...tensor import is_sharded, local
from ..replicas import histories
from .fsdp import sync_histories

FORMAT = "quaver distributed checkpoint"
VERSION = 3
DOCUMENT = "checkpoint.json"
FOLDERS = ("a", "b")
SHARD = r"shard-\d+-model-\d+-of-\d+\.safetensors"
CHUNK = 1 << 24  # bytes read at a time
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip
INDEX = {
    "format": str,
    "version": int,
    "folder": str,
    "ranks": int,
    "tensors": Each({"dtype": str, "shape": [int]}),
    "files": Each({"bytes": int, "crc32": int}),
}


def save(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int = 0,
    extra=None,
) -> None:
    """`quaver.save` for a model that is sharded over ranks, into the folder `path`; all ranks call
    it, between steps. An earlier checkpoint there stays until the new one is durable. Amax
    histories become the same on all ranks; random generators are stored for each rank.

    Raises CheckpointError on all ranks, naming what cannot be stored or written.
    """
    path = expanded(path)
    _reshard(model)
    sync_histories(model)
    with ExitStack() as stack:
        with _collective(path):
            if hasattr(optimizer, "owners"):
                raise CheckpointError("a folder is for FSDP2; ZeRO's states go into a file")
            tensors, document = collect(model, optimizer, step, extra)
            plain = json.dumps(document.pop("random")).encode()
            tensors |= {"rng.plain": torch.tensor(list(plain), dtype=torch.uint8)}
            tensors = {_own(name): tensor.detach() for name, tensor in tensors.items()}
            folder = _start(path, stack) if _rank() == 0 else None
        # Rank 0's aliases: an empty shard has no address by which tied tensors could be recognized.
        document, folder = _gather((document, folder))[0]
        tensors = {name: t for name, t in tensors.items() if name not in document["aliases"]}
        with _collective(path):
            writer = dcp.HuggingFaceStorageWriter(str(path / folder), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        with _collective(path):
            names = sorted(os.listdir(path / folder))[_rank() :: _ranks()]
            files = {name: _checksum(path / folder / name) for name in names}
        document |= {"format": FORMAT, "version": VERSION, "folder": folder, "ranks": _ranks()}
        document["tensors"] = _merge({name: _kind(tensor) for name, tensor in tensors.items()})
        document["files"] = _merge(files)
        with _collective(path):
            if _rank() == 0:
                write_text(path / DOCUMENT, json.dumps(with_crc32(document)))
                _clear(path / _other(folder))


def load(
    path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict:
    """Restores what `save` wrote on any number of ranks, bit for bit, and returns {"step": int,
    "extra": value}. The model is sharded as it was or otherwise, or whole. A rank that was there
    when it was saved gets its random generators back, with an `optimizer`.

    Raises CheckpointError on all ranks, and leaves everything as it was, if the checkpoint is
    missing, damaged, foreign or does not fit.
    """
    path = expanded(path)
    _reshard(model)
    with _collective(path):
        document = _read(path)
        folder = path / document["folder"]
        _check_files(folder, document["files"])
        tensors = _empty_tensors(model, document)
    with _collective(path):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        generators = _generators(tensors)
        restore = plan(model, optimizer, tensors, document)
        _check_all_named(folder, document)
    with torch.no_grad():
        for apply in restore:
            apply()
        # With fewer tokens a rank, gradients may grow by this factor.
        growth = max(1.0, _ranks() / document["ranks"])
        for history in histories(model, "grad_history"):
            history[1:] *= growth
    if optimizer is not None and generators is not None:
        rng.set_state(*generators)
    return {"step": document["step"], "extra": document["extra"]}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value) -> list:
    """Every rank's JSON value."""
    return Transport().all_gather_object(value, _device())


def _device() -> torch.device:
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.get_default_device()


def _merge(mine: dict) -> dict:
    return {key: value for one in _gather(mine) for key, value in one.items()}


@contextmanager
def _collective(path: Path) -> Iterator[None]:
    """A block whose errors, of files and of torch's checkpoints, are a CheckpointError of all
    ranks."""
    with together(Transport(), _device(), CheckpointError):
        try:
            yield
        except (OSError, FileError, SchemaError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        except CheckpointException as error:  # a BaseException; its text has the ranks' tracebacks
            reasons = "; ".join(f"rank {r}: {e[0]!r}" for r, e in error.failures.items())
            raise CheckpointError(f"{path}: {reasons}") from error


def _reshard(model) -> None:
    """Reshards all units: after a forward without backward the outermost holds gathered weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _own(name: str) -> str:
    """The name of a tensor in the checkpoint: random generators are this rank's."""
    return f"rng.{_rank()}.{name.removeprefix('rng.')}" if name.startswith("rng.") else name


def _generators(tensors: dict[str, Tensor]) -> tuple[dict, dict] | None:
    """Removes the random generators from `tensors`; this rank's, checked, if it has any there."""
    prefix = _own("rng.")
    found = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
    if not found:
        return None
    if "plain" not in found or found["plain"].dtype != torch.uint8:
        raise CheckpointError(f"{prefix}plain must be bytes")
    plain = parse(bytes(found.pop("plain").tolist()).decode("utf-8", "replace"))
    rng.check_state(found, plain)
    return found, plain


# Files


def _other(folder: str) -> str:
    return FOLDERS[1 - FOLDERS.index(folder)]


def _start(path: Path, stack: ExitStack) -> str:
    """Makes a folder for new shards ready, and keeps other writers out until the stack ends."""
    stack.enter_context(locked(path / ".lock"))
    folder = _other(_read(path)["folder"]) if (path / DOCUMENT).exists() else FOLDERS[0]
    _clear(path / folder)
    if os.path.lexists(path / folder):
        raise CheckpointError(f"{folder} holds other files than shards")
    (path / folder).mkdir()
    return folder


def _clear(folder: Path) -> None:
    remove_known(folder, {SHARD: None})


def _checksum(path: Path) -> dict[str, int]:
    size = crc32 = 0
    with opened(path, follow=False) as file:
        while chunk := file.read(CHUNK):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    return {"bytes": size, "crc32": crc32}


def _check_files(folder: Path, files: dict) -> None:
    """Checks that the folder holds exactly the shards; each rank checks the checksums of some."""
    found = os.listdir(folder) if folder.is_dir() and not folder.is_symlink() else []
    missing, foreign = files.keys() - set(found), set(found) - files.keys()
    if missing:
        raise CheckpointError(f"{folder.name}/{min(missing)} is missing")
    if foreign:
        raise CheckpointError(f"{folder.name}/{min(foreign)} is no part of the checkpoint")
    for name in sorted(files)[_rank() :: _ranks()]:
        if _checksum(folder / name) != files[name]:
            raise CheckpointError(f"{folder.name}/{name} is damaged: its checksum does not match")


def _check_all_named(folder: Path, document: dict) -> None:
    """Checks that the shards hold no tensor that the document leaves out."""
    claimed, held = _claimed(document), sum(_tensor_bytes(folder / n) for n in document["files"])
    if claimed != held:
        raise CheckpointError(
            f"{DOCUMENT} names tensors of {claimed} bytes, the shards hold {held}"
        )


def _tensor_bytes(path: Path) -> int:
    """The bytes of a safetensors file that follow its header, whose length comes first."""
    with opened(path, follow=False) as file:
        return max(path.stat().st_size - 8 - int.from_bytes(file.read(8), "little"), 0)


# The document


def _read(path: Path) -> dict:
    """checkpoint.json, checked; it names nothing outside of its folder."""
    if not os.path.lexists(path / DOCUMENT):
        raise CheckpointError(f"no {DOCUMENT}: no checkpoint of a sharded model")
    try:
        document = parse(read_text(path / DOCUMENT))
        check(document, {"format": str, "version": int}, DOCUMENT)
        if document["format"] != FORMAT:
            raise SchemaError(f"not of a {FORMAT}")
        if document["version"] != VERSION:
            raise CheckpointError(
                f"{FORMAT} of version {document['version']}, this quaver reads version {VERSION}"
            )
        without_crc32(document)
        check(document, INDEX, DOCUMENT)
        check_document(document, document["tensors"])
        _check_index(document)
    except SchemaError as error:
        raise CheckpointError(f"{DOCUMENT} is damaged: {error}") from None
    return document


def _check_index(document: dict) -> None:
    if document["folder"] not in FOLDERS:
        raise SchemaError(f"folder must be a or b, got {document['folder']!r}")
    if document["ranks"] < 1:
        raise SchemaError(f"ranks must be at least 1, got {document['ranks']}")
    for name in document["files"]:
        if not re.fullmatch(SHARD, name):
            raise SchemaError(f"{name!r} is no name of a shard")
    for name, kind in document["tensors"].items():
        if kind["dtype"] not in DTYPES:
            raise SchemaError(f"{name} has the unknown dtype {kind['dtype']!r}")
        if any(n < 0 for n in kind["shape"]):
            raise SchemaError(f"{name} has shape {kind['shape']}")
    claimed = _claimed(document)
    held = sum(file["bytes"] for file in document["files"].values())
    if claimed > held:
        raise SchemaError(f"its tensors have {claimed} bytes, its files {held}")


def _claimed(document: dict) -> int:
    """The bytes of all tensors that the document names."""
    kinds = document["tensors"].values()
    return sum(math.prod(kind["shape"]) * DTYPES[kind["dtype"]].itemsize for kind in kinds)


def _kind(tensor: Tensor) -> dict:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _empty_tensors(model: nn.Module, document: dict) -> dict[str, Tensor]:
    """Empty tensors that the shards are read into: all but the random generators of other ranks."""
    parameters = dict(model.named_parameters())
    return {
        name: _empty(name, DTYPES[kind["dtype"]], kind["shape"], parameters)
        for name, kind in document["tensors"].items()
        if not name.startswith("rng.") or name.startswith(_own("rng."))
    }


def _empty(name: str, dtype: torch.dtype, shape: list[int], parameters: dict) -> Tensor:
    """An empty tensor for what the checkpoint calls `name`; a part of one where it belongs to a
    parameter that is sharded here."""
    words = name.split(".")[1:]  # without "model" or "optimizer"
    owners = (parameters.get(".".join(words[:n])) for n in range(len(words), 0, -1))
    owner = next((p for p in owners if p is not None), None)
    if owner is None or not is_sharded(owner) or not shape or shape[0] != owner.shape[0]:
        return torch.empty(shape, dtype=dtype)
    rows = local(owner).shape[0]
    return like(owner, torch.empty(rows, *shape[1:], dtype=dtype, device=owner.device))
