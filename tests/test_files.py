"""A file is whole at every moment, whatever others write or plant at its path, or die doing."""

import fcntl
import json
import multiprocessing
import os
import signal
import stat
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quaver.errors import FileError
from quaver.files import expanded, read_text, replacing, write_text
from quaver.tensor_file import DTYPES, TensorFile, read_tensors, write_tensors

KIND = ("quaver test", 1)
DOCUMENT = {"format": KIND[0], "version": KIND[1]}
fork = multiprocessing.get_context("fork")


def left(folder):
    return [name for name in os.listdir(folder) if name.endswith(".quaver")]


def test_a_block_that_raises_changes_nothing(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "file", {"x": torch.ones(2)}, DOCUMENT)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_home_and_path_like(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    class Like:
        def __fspath__(self):
            return "~/folder/file"

    write_text(Like(), "text")
    assert (tmp_path / "folder" / "file").read_text() == "text"
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def _half_a_file(path, ready):
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        ready.set()
        time.sleep(60)


def start_writer(path):
    ready = fork.Event()
    process = fork.Process(target=_half_a_file, args=(path, ready))
    process.start()
    assert ready.wait(30)
    return process


def test_only_what_a_killed_writer_left_is_removed(tmp_path):
    path = tmp_path / "state"
    digits = "0" * 32
    foreign = [f".state.{digits}", f".state.{digits[:-1]}.quaver", f".other.{digits}.quaver"]
    for name in foreign:
        (tmp_path / name).write_text("a user's")
    (tmp_path / f".state.{digits}.quaver").symlink_to(tmp_path / foreign[0])
    (tmp_path / f".state.{'1' * 32}.quaver").mkdir()
    theirs = {*foreign, f".state.{digits}.quaver", f".state.{'1' * 32}.quaver"}
    killed, living = start_writer(path), start_writer(path)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert len(os.listdir(tmp_path)) == len(theirs) + 2
    write_text(path, "whole")
    try:
        assert len(os.listdir(tmp_path)) == len(theirs) + 2  # the living one's, and `state`
        assert path.read_text() == "whole"
    finally:
        living.kill()
        living.join()
    write_text(path, "whole")
    assert set(os.listdir(tmp_path)) == theirs | {"state"}


def test_a_temporary_that_a_cleaner_took_is_made_again(tmp_path, monkeypatch):
    """Between its creation and its lock a writer's file looks like a leftover."""
    lock, taken = fcntl.flock, []

    def take_first(file, how):
        if not taken:
            taken.extend(left(tmp_path))
            os.unlink(tmp_path / taken[0])
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", take_first)
    write_text(tmp_path / "file", "text")
    assert taken and (tmp_path / "file").read_text() == "text"


def test_links_at_the_path_are_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file").symlink_to(victim)
    write_text(tmp_path / "file", "new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "device", "missing", "latin"])
def test_what_is_no_text_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "latin":
        path.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match=str(path)):
        read_text(path)


def _save_often(path, value, count):
    tensors = {"x": torch.full((5000,), float(value))}
    for i in range(count):
        write_tensors(path, tensors, DOCUMENT | {"who": value, "i": i})


@pytest.mark.parametrize("start", ["fresh", "existing"])
def test_several_savers_of_one_path(tmp_path, start):
    """The file is at every moment one of them, whole, and nobody fails."""
    path = tmp_path / "state"
    if start == "existing":
        _save_often(path, 9, 1)
    savers = [fork.Process(target=_save_often, args=(path, i, 40)) for i in range(4)]
    for saver in savers:
        saver.start()
    seen = 0
    while any(saver.is_alive() for saver in savers):
        if path.exists():
            tensors, document = read_tensors(path, *KIND)
            assert tensors["x"].unique().tolist() == [document["who"]]
            seen += 1
    for saver in savers:
        saver.join()
        assert saver.exitcode == 0
    assert seen > 10
    assert os.listdir(tmp_path) == ["state"]


# Tensor files


@pytest.fixture
def tensors():
    found = {str(d): torch.arange(7).reshape(7, 1).to(d) for d in DTYPES.values()}
    return found | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        plain = [t.reshape(-1).view(torch.uint8) if t.numel() else t for t in (a[name], b[name])]
        assert torch.equal(*plain)


def test_the_library_of_the_format_reads_what_we_write(tmp_path, tensors):
    write_tensors(tmp_path / "file", tensors, DOCUMENT)
    same(load_file(tmp_path / "file"), tensors)
    same(read_tensors(tmp_path / "file", *KIND)[0], tensors)


def test_we_read_what_the_library_of_the_format_writes(tmp_path, tensors):
    write_tensors(tmp_path / "ours", tensors, DOCUMENT)
    with open(tmp_path / "ours", "rb") as stream:
        head = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    save_file(tensors, tmp_path / "theirs", head["__metadata__"])
    same(read_tensors(tmp_path / "theirs", *KIND)[0], tensors)


def test_a_dtype_without_a_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FileError, match=r"x: torch\.complex128 has no name"):
        write_tensors(tmp_path / "file", {"x": torch.ones(1, dtype=torch.complex128)}, DOCUMENT)
    assert os.listdir(tmp_path) == []


def forge(path, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"x": entry(shape=[10**12], offsets=[0, 4 * 10**12])}, 4),
        ({"x": entry(shape=[2**62, 4], offsets=[0, 4])}, 4),
        ({"x": entry(shape=[-1, -1])}, 4),
        ({"x": entry(shape=[0, 2**70], offsets=[0, 0])}, 0),
        ({"x": entry(shape=[True])}, 4),
        ({"x": entry(offsets=[4, 8])}, 8),
        ({"x": entry(offsets=[0, 4]), "y": entry(offsets=[2, 6])}, 6),
        ({"x": entry(offsets=[0, 4]), "y": entry(offsets=[0, 4])}, 4),
        ({"x": entry(offsets=[0])}, 4),
        ({"x": entry(dtype="F7")}, 4),
        ({"x": entry(dtype=None)}, 4),
        ({"x": {}}, 4),
        ({"x": []}, 4),
        ({"x": entry()}, 5),
        ({"x": entry()}, 3),
        ([], 0),
        (b'{"x": 1' + b" " * 9, 0),
        (b"[" * 100_000, 0),
        (b'{"a":' * 100_000, 0),
        (b'{"x": ' + b"1" * 5000 + b"}", 0),
        (b"\xff\xff", 0),
        (b'{"x": {}, "x": {}}', 0),
    ],
)
def test_a_header_that_lies_is_refused_by_name(tmp_path, header, size):
    path = tmp_path / "file"
    forge(path, header, bytes(size))
    with pytest.raises(FileError, match=f"{path}: truncated, damaged or no safetensors file"):
        read_tensors(path, *KIND)


def test_nothing_is_allocated_before_the_header_is_checked(tmp_path, monkeypatch):
    """A sparse file: 2 GiB of claims and a few bytes of disk."""
    path = tmp_path / "file"
    forge(path, {"x": entry(shape=[2**29], offsets=[0, 2**31])})
    os.truncate(path, path.stat().st_size + 2**31)

    def refuse(self):
        raise AssertionError("the tensors were read")

    monkeypatch.setattr(TensorFile, "read", refuse)
    began = time.process_time()
    with pytest.raises(FileError, match="a safetensors file, but not a quaver test"):
        read_tensors(path, *KIND)
    assert time.process_time() - began < 1
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 2**31))  # a header of 2 GiB
    with pytest.raises(FileError, match="of which the header claims"):
        read_tensors(path, *KIND)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"x": torch.ones(1000)}, DOCUMENT)
    with open(path, "rb", buffering=0) as stream:
        file = TensorFile(path, stream, *KIND)
        os.truncate(path, path.stat().st_size - 10)
        with pytest.raises(FileError, match="became shorter"):
            file.read()
