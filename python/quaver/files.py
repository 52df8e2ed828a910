"""Files that appear whole or not at all, whatever others write or plant at the path.

A writer works in a temporary file of its own, .NAME.<32 hex digits>.quaver, which it holds locked.
One that nobody holds belongs to a writer that was killed; the next writer of NAME removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import FileError, UsageError

__all__ = ["expanded", "locked", "new_folder", "opened", "read_text", "remove_known", "replacing",
           "sync", "write_text"]  # fmt: skip

READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: a pipe must not wait for a writer
SUFFIX = ".quaver"
CUT = 48  # characters of a name: with the digits it must stay below a file system's 255 bytes
LEFTOVER = re.compile(rf"\.(.+)\.[0-9a-f]{{32}}{re.escape(SUFFIX)}", re.DOTALL)
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def expanded(path: str | os.PathLike) -> Path:
    """`path`, a str or PathLike, with a leading ~ replaced by the home folder."""
    return Path(os.path.expanduser(os.fsdecode(path)))


def sync(path: Path) -> None:
    """Makes a file or the entries of a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def opened(path: Path, follow: bool = True) -> Iterator[BinaryIO]:
    """A regular file, unbuffered, for reading. FileError for anything else; without `follow` for a
    symbolic link too."""
    try:
        handle = os.open(path, READ | (0 if follow else os.O_NOFOLLOW))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as error:
        reason = "a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise FileError(f"{path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError(f"{path}: not a regular file")
    with open(handle, "rb", buffering=0) as file:
        yield file


def read_text(path: Path, limit: int = 1 << 30, follow: bool = False) -> str:
    """A UTF-8 file of at most `limit` bytes. FileError, naming it, for anything else."""
    with opened(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FileError(f"{path}: {size} bytes, wanted at most {limit}")
        try:
            return file.readall().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file, open for writing. It replaces `path`, durably, when the block ends; if the block
    raises, `path` stays as it was. Of several writers at once, the last to end wins. The mode is
    the umask's. A link at `path` is replaced, not followed. Raises OSError naming `path`."""
    path = expanded(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        remove_leftovers(path)
        file, temporary = _create(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(SUFFIX):
            error.filename, error.filename2 = str(path), None  # the temporary name would not help
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, op: str) -> Iterator[Path]:
    """A folder that appears at `path`, whole and durable, when the block ends: the block fills the
    one that it gets. If the block raises, nothing is left. Folders of writers of `path` that were
    killed are removed. UsageError, with `op`, for a path that holds anything but an empty folder.
    """
    _check_new(path, op)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_folders(path)
    temporary = path.with_name(f".{path.name[:CUT]}.{secrets.token_hex(16)}{SUFFIX}")
    temporary.mkdir()
    handle = os.open(temporary, READ | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        sync(temporary)
        _check_new(path, op)
        os.rename(temporary, path)  # over an empty folder too
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _check_new(path: Path, op: str) -> None:
    reason = None
    if path.is_symlink():
        reason = "is a symbolic link"
    elif path.is_dir():
        reason = "is not empty" if any(os.scandir(path)) else None
    elif path.exists():
        reason = "is no folder"
    if reason is not None:
        raise UsageError(f"{op}: wanted a new or an empty folder, {path} {reason}")


def _remove_left_folders(path: Path) -> None:
    for left in path.parent.glob(f".*{SUFFIX}"):
        match = LEFTOVER.fullmatch(left.name)
        if not match or match[1] != path.name[:CUT]:
            continue
        with suppress(OSError):  # a file, a link, gone meanwhile, or locked by its writer
            handle = os.open(left, READ | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if os.fstat(handle).st_uid == os.geteuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            finally:
                os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`text` to `path` in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def _create(path: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file of this writer, locked."""
    while True:
        temporary = path.with_name(f".{path.name[:CUT]}.{secrets.token_hex(16)}{SUFFIX}")
        file = open(os.open(temporary, CREATE, 0o666), "wb")  # noqa: SIM115 (the caller closes it)
        with suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()  # another writer took it for a leftover before it was locked


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files of writers of `path` that were killed: regular files of this user
    with such a name, that no living process holds locked."""
    with os.scandir(path.parent) as entries:
        found = [(LEFTOVER.fullmatch(entry.name), entry.path) for entry in entries]
    for match, left in found:
        if match and match[1] == path.name[:CUT]:
            remove_leftover(left)


def remove_leftover(path: str | os.PathLike) -> None:
    """Removes one such file, if it is one."""
    with suppress(OSError):  # gone or renamed meanwhile, a link, or locked by its writer
        handle = os.open(path, READ | os.O_NOFOLLOW)
        try:
            found = os.fstat(handle)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
        finally:
            os.close(handle)


def remove_known(folder: Path, patterns: dict) -> None:
    """Removes files below `folder` whose names match `patterns`, of regular expressions: of a file
    with None, of a folder with patterns of its own. Folders that are then empty go too; links and
    all else stay."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in list(os.scandir(folder)):
        path = Path(entry.path)
        pattern = next((p for p in patterns if re.fullmatch(p, entry.name)), None)
        if LEFTOVER.fullmatch(entry.name):
            remove_leftover(path)
        elif pattern is None or entry.is_symlink():
            continue
        elif not entry.is_dir():
            path.unlink()
        elif patterns[pattern] is not None:
            remove_known(path, patterns[pattern])
    with suppress(OSError):  # it holds something else
        folder.rmdir()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, which a killed process loses; its folder is made. UsageError if
    another process holds it, or it cannot be made."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, flags, 0o666)
    except OSError as error:
        link = error.errno == errno.ELOOP
        raise UsageError(
            f"{path if link else path.parent}: {'a symbolic link' if link else error.strerror}"
        ) from None
    with open(lock, "rb", buffering=0):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path.parent} is in use by another process") from None
        yield
