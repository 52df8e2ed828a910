"""Files that appear whole or not at all, and tensor files in which a flipped byte is noticed."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quaver.errors import UsageError

__all__ = ["FileError", "read_tensors", "replacing", "write_tensors", "write_text"]


class FileError(UsageError):
    """A tensor file that is missing, damaged or foreign; the text names the file."""


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path`. What is written there replaces `path` when the block
    ends and is then durable; if the block raises, `path` stays as it was and the temporary file
    goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name per target: what a killed process left behind is overwritten, not collected.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """`text` to `path` in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _checksum(tensor):
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return zlib.crc32(data, zlib.crc32(kind))


def _checksums(tensors):
    # crc32 runs without the interpreter's lock, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(tensors, pool.map(_checksum, tensors.values()), strict=True))


def write_tensors(path, tensors, document):
    """Writes a dict of contiguous CPU tensors and a JSON-able dict to one safetensors file,
    atomically.

    Raises OSError if it cannot be written, TypeError if `document` is not JSON."""
    text = json.dumps(document | {"crc32": _checksums(tensors)})
    metadata = {"quaver": text, "crc32": str(zlib.crc32(text.encode()))}
    with replacing(path) as temporary:
        # Created here because safetensors reports a failure to do so as an error without errno.
        temporary.touch()
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from None


def read_tensors(path, kind, version):
    """The tensors and the document of a file whose document has `format` = `kind` and `version`.

    Raises FileError for a file that is missing, damaged, foreign, or of another kind or version."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileError(f"{path}: truncated, damaged or no safetensors file ({error})") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    if "quaver" not in metadata or "crc32" not in metadata:
        raise FileError(f"{path}: a safetensors file, but not a {kind}")
    text = metadata["quaver"]
    if str(zlib.crc32(text.encode())) != metadata["crc32"]:
        raise FileError(f"{path}: damaged: the checksum of its description does not match")
    document = json.loads(text)
    if document["format"] != kind:
        raise FileError(f"{path}: a {document['format']}, not a {kind}")
    if document["version"] != version:
        raise FileError(
            f"{path}: {kind} of version {document['version']}, this quaver reads version {version}"
        )
    found = _checksums(tensors)
    if found != document["crc32"]:
        wrong = sorted(
            n for n in found | document["crc32"] if found.get(n) != document["crc32"].get(n)
        )
        raise FileError(f"{path}: damaged: the checksum of {wrong[0]} does not match")
    return tensors, document
