"""Checkpoints of sharded models through torch.distributed.checkpoint: every rank writes its shards,
and any other number of ranks reads them, one process without torchrun included.

    PATH/checkpoint.json    what `quaver.save` describes, and the size and CRC-32 of each file
    PATH/a, PATH/b          the shards, safetensors: one folder is named by checkpoint.json, the
                            other is being written or absent

Tensors are stored as they are, under the names of `quaver.save`. Nothing of ours is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule

from ... import rng
from ...checkpoint import CheckpointError, collect, plan
from ...comm.transport import Transport
from ...errors import FileError
from ...files import write_text
from ...placement import like
from ...tensor import is_sharded, local
from .fsdp import histories, share_histories

FORMAT = "quaver distributed checkpoint"
VERSION = 2
DOCUMENT = "checkpoint.json"
CHUNK = 1 << 24  # bytes read at a time


def save(path, model, optimizer=None, *, step=0, extra=None) -> None:
    """`quaver.save` for a model that is sharded over ranks, into the folder `path`; all ranks call
    it, between steps. An earlier checkpoint there stays until the new one is durable. Amax
    histories become the same on all ranks; random generators are stored for each rank.

    Raises CheckpointError on all ranks, naming what cannot be stored or written.
    """
    path = Path(path)
    _reshard(model)
    share_histories(model)
    with _together(path):
        if hasattr(optimizer, "owners"):
            raise CheckpointError("a folder is for FSDP2; ZeRO's states go into a file")
        tensors, document = collect(model, optimizer, step, extra)
        random = torch.tensor(list(json.dumps(document.pop("random")).encode()), dtype=torch.uint8)
        tensors |= {"rng.plain": random}
        tensors = {_own(name): tensor.detach() for name, tensor in tensors.items()}
        folder = "a"
        if _rank() == 0:
            folder = "b" if _current_folder(path) == "a" else "a"
            shutil.rmtree(path / folder, ignore_errors=True)
            (path / folder).mkdir(parents=True)
    # The first rank's word: an empty shard has no memory by which to see who is tied to whom.
    document, folder = _gather((document, folder))[0]
    tensors = {name: t for name, t in tensors.items() if name not in document["aliases"]}
    described = {
        n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors.items()
    }
    with _together(path):
        writer = dcp.HuggingFaceStorageWriter(str(path / folder), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    with _together(path):
        names = sorted(os.listdir(path / folder))[_rank() :: _ranks()]
        files = {name: _checksum(path / folder / name) for name in names}
    document |= {"format": FORMAT, "version": VERSION, "folder": folder, "ranks": _ranks()}
    document["tensors"] = _merge(described)
    document["files"] = _merge(files)
    with _together(path):
        if _rank() == 0:
            write_text(path / DOCUMENT, json.dumps(document))
            shutil.rmtree(path / ("a" if folder == "b" else "b"), ignore_errors=True)


def load(path, model, optimizer=None) -> dict:
    """Restores what `save` wrote on any number of ranks, bit for bit, and returns {"step": int,
    "extra": value}. The model is sharded as it was or otherwise, or whole. A rank that was there
    when it was saved gets its random generators back, with an `optimizer`.

    Raises CheckpointError on all ranks, and leaves everything as it was, if the checkpoint is
    missing, damaged, foreign or does not fit.
    """
    path = Path(path)
    _reshard(model)
    with _together(path):
        document = _read(path)
        folder = path / document["folder"]
        _check_files(folder, document["files"])
    parameters = dict(model.named_parameters())
    tensors = {
        name: _room(name, *kind, parameters)
        for name, kind in document["tensors"].items()
        if not name.startswith("rng.") or name.startswith(_own("rng."))
    }
    with _together(path):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        generators = {n: tensors.pop(n) for n in list(tensors) if n.startswith("rng.")}
        restore = plan(model, optimizer, tensors, document)
    with torch.no_grad():
        for apply in restore:
            apply()
        # A mean over fewer tokens on each rank gives each of them more weight, at most by this.
        growth = max(1.0, _ranks() / document["ranks"])
        for history in histories(model, "grad_history"):
            history[1:] *= growth
    if optimizer is not None and generators:
        states = {name.removeprefix(_own("rng.")): state for name, state in generators.items()}
        random = json.loads(bytes(states.pop("plain").tolist()))
        rng.set_state(states, random)
    return {"step": document["step"], "extra": document["extra"]}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value) -> list:
    """Every rank's JSON value."""
    device = torch.get_default_device()
    if dist.is_initialized() and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    return Transport().share(value, device)


def _merge(mine: dict) -> dict:
    return {key: value for one in _gather(mine) for key, value in one.items()}


@contextmanager
def _together(path: Path):
    """What fails on one rank fails on all, with that rank's reason; so no rank waits for one that
    gave up."""
    failure = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        failure = error
    reasons = _gather(None if failure is None else str(failure))
    if failure is not None and not isinstance(failure, (OSError, FileError, CheckpointException)):
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            where = f" (rank {rank})" if _ranks() > 1 else ""
            raise CheckpointError(f"{path}: {reason}{where}") from failure


def _reshard(model) -> None:
    """After a forward without backward the outermost unit still holds gathered weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _own(name: str) -> str:
    """The name of a tensor in the checkpoint: random generators are this rank's."""
    return f"rng.{_rank()}.{name.removeprefix('rng.')}" if name.startswith("rng.") else name


def _checksum(file: Path) -> list[int]:
    size = crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _check_files(folder: Path, files: dict) -> None:
    """The ranks share the files out."""
    for name in sorted(files)[_rank() :: _ranks()]:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder.name}/{name} is missing")
        if _checksum(folder / name) != files[name]:
            raise CheckpointError(f"{folder.name}/{name} is damaged: its checksum does not match")


def _current_folder(path: Path) -> str | None:
    return _read(path)["folder"] if (path / DOCUMENT).exists() else None


def _read(path: Path) -> dict:
    try:
        document = json.loads((path / DOCUMENT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {DOCUMENT}: no checkpoint of a sharded model") from None
    except ValueError as error:
        raise CheckpointError(f"{DOCUMENT} is damaged: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{DOCUMENT} is not of a {FORMAT}")
    if document["version"] != VERSION:
        raise CheckpointError(
            f"{FORMAT} of version {document['version']}, this quaver reads version {VERSION}"
        )
    return document


def _room(name: str, dtype: str, shape: list[int], parameters: dict) -> Tensor:
    """An empty tensor for what the checkpoint calls `name`; a part of one where it belongs to a
    parameter that is sharded here."""
    words = name.split(".")[1:]  # without "model" or "optimizer"
    owners = (parameters.get(".".join(words[:n])) for n in range(len(words), 0, -1))
    owner = next((p for p in owners if p is not None), None)
    kind = getattr(torch, dtype)
    if owner is None or not is_sharded(owner) or not shape or shape[0] != owner.shape[0]:
        return torch.empty(shape, dtype=kind)
    rows = local(owner).shape[0]
    return like(owner, torch.empty(rows, *shape[1:], dtype=kind, device=owner.device))
