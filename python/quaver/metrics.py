"""One JSON line a step, flushed as it is written; NaN and Inf are written as null."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from .errors import UsageError
from .files import read_text, write_text
from .schema import Maybe, SchemaError, check, parse

__all__ = ["Metrics"]

LINE = {"step": int, "loss": Maybe(float), "tokens_per_s": float, "skipped": int}
HELD_OUT = {"val_loss": Maybe(float)}


class Metrics:
    """The file of metrics `path`. Opened at `step` it keeps exactly the lines 1..step that an
    earlier process wrote: steps after the checkpoint are trained, and written, again. Of
    several ranks only the first `writes`.

    `crc32` is that of the lines kept, as the checkpoint has it. Raises UsageError if some of them
    are missing or damaged.
    """

    def __init__(self, path: Path, step: int = 0, crc32: int = 0, writes: bool = True):
        texts, self.lines = _complete_lines(path, step)
        if [line["step"] for line in self.lines] != list(range(1, step + 1)):
            raise UsageError(f"{path} lacks steps before the checkpoint's step {step}")
        self.crc32 = zlib.crc32("".join(texts).encode())
        if self.crc32 != crc32:
            raise UsageError(f"{path} is damaged: the checksum of its {step} lines does not match")
        self.file = None
        if writes:
            write_text(path, "".join(texts))
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self.file = open(os.open(path, flags), "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, line: dict) -> None:
        self.lines.append(line)
        text = json.dumps(line, allow_nan=False) + "\n"
        self.crc32 = zlib.crc32(text.encode(), self.crc32)
        if self.file is not None:
            self.file.write(text)
            self.file.flush()

    def sync(self) -> None:
        """Makes the lines durable; called before a checkpoint, which records their CRC-32."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def _complete_lines(path: Path, count: int) -> tuple[list[str], list[dict]]:
    """The texts and values of the first `count` lines, or of fewer: a killed process may have
    written half a line, and what follows it is trained again."""
    texts, lines = [], []
    if count and os.path.lexists(path):
        for text in read_text(path).splitlines(keepends=True)[:count]:
            try:
                line = parse(text)
                check(line, LINE | (HELD_OUT if "val_loss" in line else {}), "line")
            except SchemaError:
                break
            texts.append(text)
            lines.append(line)
    return texts, lines
