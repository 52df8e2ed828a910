"""Ranks that stay for the next call, for tests of many short calls: `run` as in ranks.py."""

import io
import os
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from ranks import TIMEOUT, _context, _free_port

# Linear imports the compiler: once is enough.
_context.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed", "quaver", "quaver.distributed"]
)


def _work(rank, size, port, pipe):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
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


class _Pool:
    def __init__(self, size):
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            job = (rank, size, port, theirs)
            process = _context.Process(target=_work, args=job, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
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

    def kill(self):
        for process in self.processes:
            process.kill()


_pools = {}


def run(size, function, *args):
    """The results of function(rank, *args) on every rank. Raises RuntimeError with the traceback of
    the first rank that failed, or on a time-out; the processes are then replaced."""
    if size not in _pools:
        _pools[size] = _Pool(size)
    try:
        return _pools[size].call(function, args)
    except RuntimeError:
        _pools.pop(size).kill()
        raise
