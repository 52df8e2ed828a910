"""Runs of `quaver train --parallel` on ranks that are processes of a test."""

import contextlib
import gc
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import ranks
from pictures import leave_out
from runs import MODEL

from quaver import cli
from quaver.job import Job

BIG = {**MODEL, "dim": 64, "layers": 4, "ffn": 128}


@pytest.fixture
def flags(tmp_path):
    """The command line of a run that takes a second."""
    (tmp_path / "text.txt").write_bytes(random.Random(0).randbytes(200) * 50)
    (tmp_path / "model.json").write_text(json.dumps(BIG))

    def make(out, recipe, *more, steps=6):
        return [
            *("train", "--data", f"{tmp_path}/text.txt", "--model", f"{tmp_path}/model.json"),
            *("--recipe", recipe, "--steps", str(steps), "--batch", "12", "--seq", "16"),
            *("--device", "cpu", "--save-every", "2", "--out", str(tmp_path / out), *more),
        ]  # fmt: skip

    return make


def threads_of_ranks():
    """Names of this process's threads that serve a group or the heartbeat. One that is left when
    the interpreter ends can abort the process. A joined thread is listed a moment longer."""
    end = time.monotonic() + 10
    while True:
        gc.collect()
        names = []
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                names.append(Path(task, "comm").read_text())
        left = [name for name in names if "gloo" in name or "tcpstore" in name] + [
            thread.name for thread in threading.enumerate() if thread.name.startswith("quaver")
        ]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)


def command(rank, arguments, die=None, how=signal.SIGKILL):
    """The command line in this process; (rank, step) of `die` gets a signal in that step."""
    step = Job.step

    def dies(self, number):
        if die == (self.world.rank, number):
            if how == signal.SIGKILL:  # in the middle: the others are in their messages
                self.model.register_forward_hook(lambda *a: os.kill(os.getpid(), how))
            else:
                os.kill(os.getpid(), how)
        return step(self, number)

    if die is not None:
        Job.step = dies
    leave_out()
    read, write = os.pipe()
    os.dup2(write, 2)
    began = time.monotonic()
    status = cli.main(arguments)
    os.close(write)
    os.dup2(1, 2)
    # FSDP2's parameters and meshes refer to each other and to the group, and whether a cache of
    # torch's holds one differs between machines. The command ends by os._exit, which waits for no
    # thread.
    if status == 0 and not any("fsdp" in argument for argument in arguments):
        left = threads_of_ranks()
        assert left == [], left
    return status, os.read(read, 10**5).decode(), time.monotonic() - began


def start(size, arguments, *more):
    return ranks.Ranks(size, command, arguments, *more, timeout=300, init=False)


def finish(size, arguments):
    for status, text, _ in start(size, arguments).results():
        assert status == 0, text
