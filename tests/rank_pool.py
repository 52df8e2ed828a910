"""Real processes for tests: `run(world_size, function, *args)` calls function(rank, *args) on every
rank of a gloo group and returns the results by rank. The processes stay for the next call."""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds for a call, and for any one collective


def _work(rank, world_size, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return  # the tests are done
        file = io.BytesIO()
        try:
            torch.save(function(rank, *args), file)
        except Exception:
            pipe.send((False, traceback.format_exc()))
        else:
            pipe.send((True, file.getvalue()))


class _World:
    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        # Linear imports the compiler; once is enough.
        context.set_forkserver_preload(["torch", "torch._dynamo", "quaver"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            job = (rank, size, os.path.join(self.folder.name, "store"), theirs)
            process = context.Process(target=_work, args=job, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def call(self, function, args):
        for pipe in self.pipes:
            pipe.send((function, args))
        results, waiting = {}, dict(enumerate(self.pipes))
        deadline = time.monotonic() + TIMEOUT
        while waiting:
            ready = wait(waiting.values(), max(0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"ranks {list(waiting)} did not finish in {TIMEOUT} s")
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    done, value = waiting.pop(rank).recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died") from None
                if not done:
                    raise RuntimeError(f"rank {rank}:\n{value}")
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
        return [results[rank] for rank in range(len(self.pipes))]

    def end(self):
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


_worlds = {}


def run(world_size, function, *args):
    """Raises RuntimeError with the traceback of the first rank that failed, or on a time-out; the
    processes are then replaced."""
    if world_size not in _worlds:
        _worlds[world_size] = _World(world_size)
    try:
        return _worlds[world_size].call(function, args)
    except RuntimeError:
        _worlds.pop(world_size).end()
        raise
