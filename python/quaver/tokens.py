"""Tokens of documents, each of which ends with the tokenizer's end token."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .documents import DataError
from .files import expanded
from .hf import folder as hf_folder

__all__ = ["Coder", "load_coder"]

# End tokens in common use: a tokenizer's own file does not say which of its tokens is one.
ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]")
TOGETHER = 256  # documents that are encoded at once, on all cores


class Coder:
    """A tokenizer of the package tokenizers whose token `end` ends a document. `save` writes the
    files that transformers loads it from into a folder. `vocab`: one more than its largest id."""

    def __init__(self, tokenizer, end: str, save: Callable[[Path], object]):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer, self.save = tokenizer, save
        self.end = tokenizer.token_to_id(end)
        self.vocab = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, documents: Iterable[bytes]) -> Tensor:
        """The tokens of all documents one behind the other, int32 [tokens]: each with the tokens
        that the tokenizer puts around a text, and its end."""
        ids, documents = array("i"), iter(documents)
        while texts := _texts(islice(documents, TOGETHER)):
            for encoded in self.tokenizer.encode_batch(texts):
                ids.extend(encoded.ids)
                if not encoded.ids or encoded.ids[-1] != self.end:
                    ids.append(self.end)
        return (
            torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _texts(documents: Iterator[bytes]) -> list[str]:
    return [document.decode("utf-8", errors="replace") for document in documents]


def load_coder(flag: str, path: str, end: str | None = None) -> Coder:
    """The tokenizer of a JSON file of the package tokenizers, or of a folder of transformers, which
    `flag` names. Its end token is `end`, or the folder's, or of a file the one of ENDS that it has.
    Raises DataError for a file that is none, and for a tokenizer without an end token."""
    place = expanded(path)
    if place.is_dir():
        return _of_folder(flag, path, end)
    if not place.is_file():
        raise DataError(f"{flag} {path}: no such file")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(
            f"{flag} needs the package `tokenizers`: pip install quaver[train]"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(place))
    except Exception as error:  # the package raises bare Exception for a file it cannot parse
        raise DataError(f"{flag} {path}: {error}") from None
    found = [text for text in ([end] if end else ENDS) if tokenizer.token_to_id(text) is not None]
    if not found:
        raise _without_end(flag, path, end)

    def save(folder: Path) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": found[0]}
        text = json.dumps(described, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    return Coder(tokenizer, found[0], save)


def _of_folder(flag: str, path: str, end: str | None) -> Coder:
    whole = hf_folder.load_tokenizer(path, flag)
    tokenizer = getattr(whole, "backend_tokenizer", None)
    if tokenizer is None:
        raise DataError(
            f"{flag} {path}: the tokenizer is a {type(whole).__name__}, which the package "
            "tokenizers cannot run; wanted one with a tokenizer.json"
        )
    known = end or whole.eos_token
    if known is None or tokenizer.token_to_id(known) is None:
        raise _without_end(flag, path, end)
    whole.eos_token = known
    return Coder(tokenizer, known, whole.save_pretrained)


def _without_end(flag: str, path: str, end: str | None) -> DataError:
    if end:
        return DataError(f"--end-token {end}: the tokenizer of {flag} {path} has no such token")
    return DataError(
        f"{flag} {path}: the tokenizer has no end token, by which documents are joined; "
        "--end-token names the one to take"
    )
