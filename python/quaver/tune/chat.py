"""Conversations of jsonl and parquet files as tokens, of which the answers alone are trained on.

A line is {"prompt": ..., "response": ...}, or {"messages": [{"role": ..., "content": ...}, ...]}. A
tokenizer's chat template lays it out; without one it is PLAIN. An answer and what comes before it
are made tokens apart, as generation does it, and an answer ends with the tokenizer's end token.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..documents import DataError, table_rows
from ..files import expanded, read_text
from ..schema import SchemaError, check, parse

__all__ = ["IGNORED", "Chat", "Example", "collate", "load"]

IGNORED = -100  # the label of a token that is not trained on
MESSAGES = [{"role": str, "content": str}]
PLAIN = "{role}: {content}\n"
EVALUATED = 256  # held-out examples at most


@dataclass(frozen=True)
class Example:
    """`tokens` of a conversation, `labels` of the same length (IGNORED outside of answers), and
    `start`, where the last answer begins."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    start: int

    @property
    def answers(self) -> int:
        """Tokens that are predicted: the first has none before it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class Notes:
    """What was not taken as it was."""

    cut: int = 0
    left_out: int = 0
    answers: int = 0

    def __str__(self) -> str:
        parts = (
            (self.cut, "examples longer than --seq were cut"),
            (self.left_out, "left out, since --seq ends before their answer"),
            (self.answers, "earlier answers are no target, since the chat template rewrites them"),
        )
        return "; ".join(f"{count:,} {text}" for count, text in parts if count)


@dataclass(frozen=True)
class Chat:
    """The examples of a run; `fingerprint` is the sha256 of all of them."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    fingerprint: str
    notes: Notes = field(default_factory=Notes)

    def batch(self, seed: int, first: int, count: int) -> list[Example]:
        """Examples `first`, `first` + 1, ... of an endless sequence: epochs, each in an order that
        depends on the seed and its number alone."""
        size = len(self.train)
        return [
            self.train[_order(size, seed, at // size)[at % size]]
            for at in range(first, first + count)
        ]


@functools.lru_cache(2)  # a batch may lie in two epochs
def _order(size: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(size), size)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and labels, int64 [examples, longest], padded behind."""
    longest = max(len(example.tokens) for example in examples)
    rows = [
        (
            [*example.tokens, *[0] * (longest - len(example.tokens))],
            [1] * len(example.tokens) + [0] * (longest - len(example.tokens)),
            [*example.labels, *[IGNORED] * (longest - len(example.labels))],
        )
        for example in examples
    ]
    tokens, mask, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
    return tokens, mask, labels


def load(settings, tokenizer) -> Chat:
    """The examples of --data, and the held-out ones of --eval-data or a share of them, which is the
    same for every seed. Raises DataError naming the file, and the line in it, that is wrong."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"--model {settings.model}: its tokenizer has no end token, by which answers end; set "
            "eos_token in tokenizer_config.json"
        )
    notes = Notes()
    train = _examples("--data", settings.data, settings, tokenizer, notes)
    if settings.eval_data:
        held_out = _examples("--eval-data", settings.eval_data, settings, tokenizer, notes)
    else:
        if len(train) < 2:
            raise DataError("--data: one example; wanted one to train on and one held out")
        count = min(len(train) - 1, max(1, round(len(train) * settings.held_out)))
        kept = set(random.Random(0).sample(range(len(train)), count))
        held_out = [example for i, example in enumerate(train) if i in kept]
        train = [example for i, example in enumerate(train) if i not in kept]
    count = min(len(held_out), EVALUATED)
    held_out = [held_out[i * len(held_out) // count] for i in range(count)]
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(f"{len(part)}\n".encode())
        for example in part:
            digest.update(f"{example.tokens}{example.labels}".encode())
    return Chat(tuple(train), tuple(held_out), digest.hexdigest(), notes)


def _examples(flag: str, paths: Sequence[str], settings, tokenizer, notes: Notes) -> list[Example]:
    layout, found, seen = Layout(tokenizer, notes), [], 0
    for path in map(expanded, paths):
        for where, messages in _conversations(flag, path, settings):
            seen += 1
            tokens, labels, start = layout.example(where, messages)
            if len(tokens) > settings.seq:
                tokens, labels = tokens[: settings.seq], labels[: settings.seq]
                example = Example(tuple(tokens), tuple(labels), min(start, settings.seq))
                if not example.answers:
                    notes.left_out += 1
                    continue
                notes.cut += 1
            found.append(Example(tuple(tokens), tuple(labels), min(start, settings.seq)))
    if not seen:
        raise DataError(f"{flag} {' '.join(paths)}: no examples")
    if not found:
        raise DataError(
            f"{flag}: --seq {settings.seq} ends before the answer of every example; raise it"
        )
    return found


def _conversations(flag: str, path: Path, settings) -> Iterator[tuple[str, list[dict]]]:
    """("file:line", messages) of every line of a file that is not empty, or every row."""
    if not path.exists():
        raise DataError(f"{flag} {path}: no such file")
    if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
        kind = path.suffix or ("folder" if path.is_dir() else "file")
        raise DataError(
            f"{flag} {path}: data of unknown kind ({kind}); wanted a .jsonl or .parquet file"
        )
    read = _lines(path) if path.suffix == ".jsonl" else enumerate(table_rows(flag, path), 1)
    for number, line in read:
        where = f"{path}:{number}"
        try:
            value = parse(line) if isinstance(line, str) else line
            check(value, dict, "the line")
            yield where, _messages(value, settings.prompt_field, settings.response_field)
        except SchemaError as error:
            raise DataError(f"{where}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(path, follow=True).split("\n"), 1):
        if line.strip():
            yield number, line


def _messages(value: dict, prompt: str, response: str) -> list[dict]:
    """The messages of a line. Raises SchemaError for one that has none, or no answer."""
    if prompt in value or response in value or "messages" not in value:
        for name in (prompt, response):
            if name not in value:
                raise SchemaError(
                    f"no field {name!r} and no messages, among {', '.join(value) or 'none'}; "
                    "--prompt-field and --response-field name others"
                )
        check(value, {prompt: str, response: str}, "the line")
        messages = [
            {"role": "user", "content": value[prompt]},
            {"role": "assistant", "content": value[response]},
        ]
    else:
        messages = value["messages"]
        check(messages, MESSAGES, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            last = f"role {messages[-1]['role']!r}" if messages else "none"
            raise SchemaError(
                f"{len(messages)} messages, the last of {last}; wanted an assistant's behind others"
            )
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            raise SchemaError("an answer is empty")
    return messages


class Layout:
    """Lays conversations out by a tokenizer."""

    def __init__(self, tokenizer, notes: Notes):
        self.tokenizer, self.notes = tokenizer, notes
        self.end = tokenizer.eos_token_id
        begin = tokenizer.bos_token_id
        adds = begin is not None and tokenizer("").input_ids[:1] == [begin]
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.begin = [begin] if adds and not self.templated else []

    def example(self, where: str, messages: list[dict]) -> tuple[list[int], list[int], int]:
        """Tokens, labels, and where the last answer begins."""
        pieces = self._templated(where, messages) if self.templated else _plain(messages)
        tokens, labels = list(self.begin), [IGNORED] * len(self.begin)
        start = len(tokens)
        for text, is_answer in pieces:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if not is_answer:
                tokens += ids
                labels += [IGNORED] * len(ids)
                continue
            start = len(tokens)
            if self.end not in ids:
                ids = [*ids, self.end]
            taught = len(ids) - ids[::-1].index(self.end)  # what a template adds behind is not
            tokens += ids
            labels += ids[:taught] + [IGNORED] * (len(ids) - taught)
        return tokens, labels, start

    def _templated(self, where: str, messages: list[dict]) -> list[tuple[str, bool]]:
        """(text, whether it is an answer) in order."""
        whole = self._apply(where, messages)
        pieces, done = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
                continue
            before = self._apply(where, messages[:i], add_generation_prompt=True)
            last = i == len(messages) - 1
            after = whole if last else self._apply(where, messages[: i + 1])
            fits = whole.startswith(before) and whole.startswith(after)
            if fits and done <= len(before) < len(after):
                pieces += [
                    (whole[done : len(before)], False),
                    (whole[len(before) : len(after)], True),
                ]
                done = len(after)
            elif last:
                raise DataError(
                    f"{where}: the chat template gives no text in which the answer follows what "
                    "comes before it"
                )
            else:
                self.notes.answers += 1
        return pieces

    def _apply(self, where: str, messages: list[dict], **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise what they like
            raise DataError(f"{where}: the chat template refuses it: {error}") from None


def _plain(messages: list[dict]) -> Iterator[tuple[str, bool]]:
    for message in messages:
        if message["role"] != "assistant":
            yield PLAIN.format(**message), False
            continue
        yield PLAIN.format(role="assistant", content="").rstrip(), False
        yield f" {message['content']}", True
