"""Token streams from text, and batches that depend on (seed, step) alone.

A batch is a pure function of its position in the run, so a resumed run needs only its step to see
the same data, and every recipe of a comparison sees the same batches.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from .errors import UsageError
from .files import expanded

__all__ = ["Data", "DataError", "load", "read_sources"]

STDLIB_CAP = 32 * 2**20  # bytes; bounds the memory of a run, no installation reaches it today
HELD_OUT = 0.05  # part of the stream kept for the validation loss
VALIDATION_SEQUENCES = 64

# Parts of the standard library that distributions leave out or add to: without them two
# installations of one Python version give the same text.
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


class DataError(UsageError):
    """Data that cannot be read or is too short; the text names the source."""


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if STDLIB_SKIP.isdisjoint(path.relative_to(root).parts[:-1])
    ]
    if not files:
        raise DataError(f"stdlib: no .py files under {root}")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def folder_files(folder: Path) -> list[Path]:
    """Regular files under `folder` by relative path, without hidden ones and links to folders."""

    def fail(error: OSError) -> NoReturn:
        raise DataError(f"cannot read {error.filename}: {error.strerror}")

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def is_binary(text: bytes) -> bool:
    return b"\0" in text[:8192]


def read_sources(sources: Sequence[str]) -> tuple[list[bytes], list[Path]]:
    """The texts of `sources` ("stdlib", files, folders) as a list of bytes, and the paths left out
    of folders because they hold binary data (a NUL in the first 8 KiB). A file named directly is
    always taken. Raises DataError naming a source that is missing or unreadable."""
    texts, skipped = [], []
    for source in sources:
        path = expanded(source)
        if source == "stdlib":
            size = 0
            for file in stdlib_files():
                text = read(file)
                size += len(text)
                if size > STDLIB_CAP:
                    break
                texts.append(text)
        elif path.is_dir():
            for file in folder_files(path):
                text = read(file)
                if is_binary(text):
                    skipped.append(file)
                else:
                    texts.append(text)
        elif path.is_file():
            texts.append(read(path))
        elif path.exists():
            raise DataError(f"--data {source}: neither a file nor a folder")
        else:
            raise DataError(f"--data {source}: no such file or folder")
    return texts, skipped


def load_tokenizer(path: str | os.PathLike):
    path = expanded(path)
    if not path.is_file():
        raise DataError(f"--tokenizer {path}: no such file")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(
            "--tokenizer needs the package `tokenizers`: pip install tokenizers"
        ) from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for a file it cannot parse
        raise DataError(f"--tokenizer {path}: {error}") from None


@dataclass(frozen=True)
class Data:
    """`train` and `held_out`: 1-D token tensors (uint8 for bytes, int32 otherwise). `vocab`: number
    of different tokens. `fingerprint`: sha256 of the tokens, which a resumed run compares."""

    train: Tensor
    held_out: Tensor
    vocab: int
    fingerprint: str
    skipped: tuple[Path, ...] = ()

    def batch(
        self, seed: int, step: int, batch: int, length: int, micro: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of micro-batch `micro` of `step`: int64 [batch, length] each, at
        offsets that depend on (seed, step, micro) alone."""
        draw = random.Random(f"{seed}/{step}/{micro}")
        last = len(self.train) - length - 1
        return _windows(self.train, [draw.randint(0, last) for _ in range(batch)], length)

    def validation(self, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (inputs, targets) over evenly spaced, fixed windows of the held-out tail."""
        last = len(self.held_out) - length - 1
        count = min(VALIDATION_SEQUENCES, last // length + 1)
        starts = [last * i // max(count - 1, 1) for i in range(count)]
        for i in range(0, count, batch):
            yield _windows(self.held_out, starts[i : i + batch], length)


def _windows(tokens: Tensor, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = torch.stack([tokens[start : start + length + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]


def load(sources: Sequence[str], length: int, tokenizer: str | None = None) -> Data:
    """Data from `sources` (see read_sources) for sequences of `length` tokens, as bytes or through
    the `tokenizers` JSON file `tokenizer`. Raises DataError if either part would be shorter than
    one sequence."""
    coder = load_tokenizer(tokenizer) if tokenizer else None
    texts, skipped = read_sources(sources)
    if coder is None:
        tokens = torch.frombuffer(bytearray(b"\n".join(texts) or b"\n"), dtype=torch.uint8)
        vocab = 256
    else:
        ids = []
        for text in texts:
            ids += coder.encode(text.decode("utf-8", errors="replace")).ids
        tokens = torch.tensor(ids, dtype=torch.int32)
        vocab = max(coder.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    needed = length + 1  # a window and the token that follows it
    if len(tokens) < 2 * needed:
        raise DataError(
            f"--data is too short: sequences of {length} need at least {2 * needed} tokens "
            f"({needed} to train on, {needed} held out), found {len(tokens)}"
        )
    tail = max(needed, int(len(tokens) * HELD_OUT))
    fingerprint = hashlib.sha256(tokens.numpy())
    fingerprint.update(f"{vocab} {sys.byteorder}".encode())
    return Data(tokens[:-tail], tokens[-tail:], vocab, fingerprint.hexdigest(), tuple(skipped))
