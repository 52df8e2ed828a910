"""Tensor files in which a flipped byte is noticed: safetensors with checksums and a description.

The header is read and checked against the size of the file before anything else is: what a file
claims costs nothing until it has proven to be true.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .errors import FileError
from .files import opened, replacing
from .schema import Each, SchemaError, check, parse

__all__ = ["TensorFile", "read_tensors", "stream_tensors", "write_tensors"]

# The names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; the format's own
ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}
DOCUMENT = {"format": str, "version": int}


def _data(tensor: Tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def _checksum(tensor: Tensor) -> int:
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return zlib.crc32(_data(tensor), zlib.crc32(kind))


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    # crc32 runs without the interpreter's lock, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(tensors, pool.map(_checksum, tensors.values()), strict=True))


def write_tensors(path, tensors: Mapping[str, Tensor], document: dict) -> None:
    """Writes contiguous CPU tensors and a JSON-able dict to one safetensors file, atomically.

    Raises FileError for a dtype that the format lacks, OSError if the file cannot be written,
    TypeError if `document` is not JSON."""
    text = json.dumps(document | {"crc32": _checksums(tensors)})
    stream_tensors(
        path, tensors, tensors.items(), {"quaver": text, "crc32": str(zlib.crc32(text.encode()))}
    )


def stream_tensors(
    path,
    kinds: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str],
) -> None:
    """Writes contiguous CPU tensors to one safetensors file, atomically, as they come: of `tensors`
    one is in memory at a time. `kinds` are their dtypes and shapes (meta tensors, say).

    Raises FileError for a dtype that the format lacks, ValueError unless the tensors are those of
    `kinds`, OSError if the file cannot be written."""
    for name, kind in kinds.items():
        if kind.dtype not in NAMES:
            raise FileError(f"{name}: {kind.dtype} has no name in a safetensors file")
    header, end = {"__metadata__": metadata}, 0
    # Large elements first: every tensor is then aligned to its own.
    for name in sorted(kinds, key=lambda name: -kinds[name].element_size()):
        kind, begin = kinds[name], end
        end += kind.nbytes
        entry = (NAMES[kind.dtype], list(kind.shape), [begin, end])
        header[name] = dict(zip(ENTRY, entry, strict=True))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    places = {name: 8 + len(head) + header[name]["data_offsets"][0] for name in kinds}
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in tensors:
            wanted = kinds[name]
            if name not in places or (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
                raise ValueError(
                    f"{path}: {name}: wanted {wanted.dtype} {list(wanted.shape)} once, got "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )
            file.seek(places.pop(name))
            file.write(_data(tensor))
        if places:
            raise ValueError(f"{path}: {min(places)} is missing")


def read_tensors(path, kind: str, version: int) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the document of a file whose document has `format` = `kind` and `version`.

    Raises FileError for a file that is missing, damaged, foreign, or of another kind or version."""
    with opened(Path(path)) as stream:
        file = TensorFile(path, stream, kind, version)
        return file.read(), file.document


class TensorFile:
    """The header of a file that `write_tensors` wrote: `document`, and `kinds`, {name: meta
    tensor}, all checked. Raises FileError as `read_tensors` does."""

    def __init__(self, path, stream, kind: str, version: int):
        self.path, self._stream = path, stream
        self._size = os.fstat(stream.fileno()).st_size
        header = self._header()
        metadata = header.pop("__metadata__", {})
        self._places, self.kinds = {}, {}
        for name, entry in header.items():
            self._add(name, entry)
        self._check_places()
        self.document = self._document(metadata, kind, version)

    def _damaged(self, reason) -> FileError:
        return FileError(f"{self.path}: truncated, damaged or no safetensors file ({reason})")

    def _header(self) -> dict:
        length = int.from_bytes(self._bytes(0, min(8, self._size)), "little")
        if self._size < 8 or not 2 <= length <= min(self._size - 8, HEADER_LIMIT):
            raise self._damaged(f"{self._size} bytes, of which the header claims {length}")
        self._start = 8 + length
        try:
            header = parse(self._bytes(8, length).decode("utf-8"), unique=True)
            check(header, Each(dict), "header")
        except ValueError as error:  # of Unicode, JSON or the schema
            raise self._damaged(error) from None
        return header

    def _add(self, name: str, entry: dict) -> None:
        """Books a tensor; its size must be that of its shape and dtype."""
        try:
            check(entry, ENTRY, name)
        except SchemaError as error:
            raise self._damaged(error) from None
        dtype, shape, offsets = (entry[key] for key in ENTRY)
        if dtype not in DTYPES:
            raise self._damaged(f"{name}: unknown dtype {dtype}")
        if len(offsets) != 2 or any(number < 0 for number in (*shape, *offsets)):
            raise self._damaged(f"{name}: shape {shape} at {offsets}")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            raise self._damaged(f"{name}: {dtype} {shape} does not fill the bytes {offsets}")
        self._places[name] = offsets
        try:
            self.kinds[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        except (RuntimeError, TypeError, OverflowError):  # sizes that torch cannot count
            raise self._damaged(f"{name}: shape {shape}") from None

    def _check_places(self) -> None:
        """The tensors follow each other without gap or overlap and fill the file."""
        end = 0
        for name, place in sorted(self._places.items(), key=lambda item: item[1]):
            if place[0] != end:
                raise self._damaged(f"{name} begins at {place[0]}, wanted {end}")
            end = place[1]
        if self._start + end != self._size:
            raise self._damaged(f"{self._size} bytes, wanted {self._start + end}")

    def _document(self, metadata: dict, kind: str, version: int) -> dict:
        text, crc = metadata.get("quaver"), metadata.get("crc32")
        if not isinstance(text, str) or not isinstance(crc, str):
            raise FileError(f"{self.path}: a safetensors file, but not a {kind}")
        if str(zlib.crc32(text.encode("utf-8", "surrogatepass"))) != crc:
            raise FileError(f"{self.path}: damaged: the checksum of its description does not match")
        try:
            document = parse(text)
            check(document, DOCUMENT, "description")
            if document["format"] != kind:
                raise FileError(f"{self.path}: a {document['format']}, not a {kind}")
            if document["version"] != version:
                raise FileError(
                    f"{self.path}: {kind} of version {document['version']}, this quaver reads "
                    f"version {version}"
                )
            check(document, {"crc32": Each(int)}, "description")
        except SchemaError as error:
            raise FileError(f"{self.path}: damaged: {error}") from None
        if self.kinds.keys() != document["crc32"].keys():
            name = min(self.kinds.keys() ^ document["crc32"].keys())
            raise FileError(f"{self.path}: damaged: {name} is not in both header and description")
        return document

    def _bytes(self, start: int, size: int) -> bytearray:
        buffer = bytearray(size)
        self._fill(memoryview(buffer), start)
        return buffer

    def _fill(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._stream.fileno(), [buffer[done:]], start + done)
            except OSError as error:
                raise FileError(f"{self.path}: {error.strerror}") from None
            if not count:
                raise self._damaged("it became shorter while it was read")
            done += count

    def read(self) -> dict[str, Tensor]:
        """All tensors, on the CPU, of which every checksum holds."""
        tensors = {}
        for name, kind in self.kinds.items():
            tensors[name] = torch.empty(kind.shape, dtype=kind.dtype)
            if kind.numel():
                self._fill(memoryview(_data(tensors[name])), self._start + self._places[name][0])
        expected = self.document["crc32"]
        wrong = [n for n, crc in _checksums(tensors).items() if crc != expected[n]]
        if wrong:
            raise FileError(f"{self.path}: damaged: the checksum of {min(wrong)} does not match")
        return tensors
