"""The documents of --data: text files whole, and a field of the rows of jsonl and parquet files."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from .errors import UsageError
from .files import expanded

__all__ = ["DataError", "Notes", "documents", "is_table", "table_rows"]

STDLIB_CAP = 32 * 2**20  # bytes; bounds the memory of a run, no installation reaches it today

# Parts of the standard library that distributions leave out or add to: without them two
# installations of one Python version give the same text.
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}

TABLES = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}  # as `datasets` calls them
TEXTS = {"", ".adoc", ".c", ".cc", ".cpp", ".cs", ".css", ".cu", ".cuh", ".go", ".h", ".hpp",
         ".htm", ".html", ".java", ".jl", ".js", ".kt", ".log", ".lua", ".md", ".php", ".pl", ".py",
         ".r", ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".tex", ".text", ".ts",
         ".txt", ".xml"}  # fmt: skip
WANTED = "wanted .jsonl, .jsonl.gz, .parquet, or text such as .txt, .md and .py"


class DataError(UsageError):
    """Data that cannot be read or is too short; the text names the source."""


@dataclass
class Notes:
    """What was not taken: binary files of folders, and the count of rows without text."""

    binary: list[Path] = field(default_factory=list)
    empty: int = 0

    def __str__(self) -> str:
        parts = []
        if self.binary:
            parts.append(f"{len(self.binary):,} binary files, such as {self.binary[0]}")
        if self.empty:
            parts.append(f"{self.empty:,} rows without text")
        return f"left out {' and '.join(parts)}" if parts else ""


def documents(sources: Sequence[str], column: str, notes: Notes) -> Iterator[bytes]:
    """The documents of `sources` in order: "stdlib", files and folders. A text file is one, a row
    of a .jsonl or .parquet file is one, its text in the field `column`. Of a folder all files are
    taken, except hidden and binary ones (a NUL in the first 8 KiB).

    Raises DataError for a source that is missing or unreadable, for a named file of another kind or
    with binary data, and for rows without the field."""
    for source in sources:
        path = expanded(source)
        if source == "stdlib":
            yield from _stdlib()
        elif path.is_dir():
            for file in folder_files(path):
                if is_table(file):
                    yield from _table(file, column, notes)
                elif is_binary(text := read(file)):
                    notes.binary.append(file)
                else:
                    yield text
        elif path.is_file():
            yield from _named(source, path, column, notes)
        elif path.exists():
            raise DataError(f"--data {source}: neither a file nor a folder")
        else:
            raise DataError(f"--data {source}: no such file or folder")


def _named(source: str, path: Path, column: str, notes: Notes) -> Iterator[bytes]:
    if is_table(path):
        yield from _table(path, column, notes)
    elif path.suffix.lower() not in TEXTS:
        raise DataError(f"--data {source}: data of unknown kind ({path.suffix}); {WANTED}")
    elif is_binary(text := read(path)):
        raise DataError(f"--data {source}: binary data (a byte of 0); {WANTED}, in UTF-8")
    else:
        yield text


# Text


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


def _stdlib() -> Iterator[bytes]:
    size = 0
    for file in stdlib_files():
        text = read(file)
        size += len(text)
        if size > STDLIB_CAP:
            break
        yield text


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


# Tables


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in TABLES.items() if name.endswith(suffix)), None)


def is_table(path: Path) -> bool:
    """Whether a file has rows of fields, by its name."""
    return _kind(path) is not None


def table_rows(flag: str, path: Path) -> Iterator[dict]:
    """The rows of a .jsonl or .parquet file, one after the other, by the package `datasets`; no
    copy of the file is made. Raises DataError, with `flag`, for a file that it cannot read."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{flag} {path}: needs the package `datasets`: pip install quaver[train]"
        ) from None
    if path.stat().st_size == 0:
        return
    try:
        # The path is a pattern there. Its own log would repeat the error.
        level = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        files = glob.escape(str(path.resolve()))
        yield from datasets.load_dataset(
            _kind(path), data_files=files, split="train", streaming=True
        )
    except Exception as error:  # of a damaged file: of many types, some of other packages
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{flag} {path}: cannot be read: {lines[0]}") from None
    finally:
        datasets.logging.set_verbosity(level)


def _table(path: Path, column: str, notes: Notes) -> Iterator[bytes]:
    for number, row in enumerate(table_rows("--data", path), 1):
        if column not in row:
            raise DataError(
                f"--data {path}: no field {column!r} among {', '.join(row)}; --text-field names "
                "the one with the text"
            )
        text = row[column]
        if not text and (text is None or isinstance(text, str)):
            notes.empty += 1
        elif isinstance(text, str):
            yield text.encode(errors="replace")
        else:
            raise DataError(
                f"--data {path}: row {number}: {column!r} is a {type(text).__name__}, wanted text"
            )
