"""Token streams from text, and batches that depend on (seed, step) alone.

A batch is a pure function of its position in the run, so a resumed run needs only its step to see
the same data, and every recipe of a comparison sees the same batches.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .documents import DataError, Notes, documents
from .tokens import Coder

__all__ = ["Data", "DataError", "load"]

HELD_OUT = 0.05  # part of the stream kept for the validation loss
VALIDATION_SEQUENCES = 64


@dataclass(frozen=True)
class Data:
    """`train` and `held_out`: 1-D token tensors (uint8 for bytes, int32 otherwise). `vocab`: number
    of different tokens. `fingerprint`: sha256 of the tokens, which a resumed run compares. `notes`:
    what of the sources is not in it. `coder`: of the tokens; None for bytes."""

    train: Tensor
    held_out: Tensor
    vocab: int
    fingerprint: str
    notes: Notes = field(default_factory=Notes)
    coder: Coder | None = None

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; of bytes that are no UTF-8 a mark each."""
        if self.coder is None:
            return bytes(ids).decode("utf-8", errors="replace")
        return self.coder.decode(ids)


def _windows(tokens: Tensor, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = torch.stack([tokens[start : start + length + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]


def load(
    sources: Sequence[str], length: int, coder: Coder | None = None, column: str = "text"
) -> Data:
    """Data of the documents of `sources` (see documents.documents; `column` is the field of rows)
    for sequences of `length` tokens: by `coder`, each document with its end token, or as bytes with
    a newline between documents. Raises DataError if either part would be shorter than one
    sequence."""
    notes = Notes()
    found = documents(sources, column, notes)
    if coder is None:
        tokens = torch.frombuffer(bytearray(b"\n".join(found) or b"\n"), dtype=torch.uint8)
    else:
        tokens = coder.encode(found)
    vocab = 256 if coder is None else coder.vocab
    needed = length + 1  # a window and the token that follows it
    if len(tokens) < 2 * needed:
        raise DataError(
            f"--data is too short: sequences of {length} need at least {2 * needed} tokens "
            f"({needed} to train on, {needed} held out), found {len(tokens)}"
        )
    tail = max(needed, int(len(tokens) * HELD_OUT))
    fingerprint = hashlib.sha256(tokens.numpy())
    fingerprint.update(f"{vocab} {sys.byteorder}".encode())
    return Data(tokens[:-tail], tokens[-tail:], vocab, fingerprint.hexdigest(), notes, coder)
