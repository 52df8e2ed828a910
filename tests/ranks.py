"""Real processes for tests: one a rank, over gloo, forked from a server that has torch loaded."""

import io
import multiprocessing
import os
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 180  # seconds: a hang fails, a busy machine does not

_context = multiprocessing.get_context("forkserver")
# What a rank would take seconds to import: converting a model brings the compiler.
_context.set_forkserver_preload([
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "matplotlib.pyplot",
    "quaver", "quaver.train",
])  # fmt: skip


class Ranks:
    """`size` processes that each run function(rank, *args), in a group unless they `init` one
    themselves. `results` waits for all of them."""

    def __init__(self, size, function, *args, timeout=TIMEOUT, init=True):
        self.deadline = time.monotonic() + timeout
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_main,
                args=(theirs, rank, size, port, timeout if init else None, function, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def outcome(self, rank):
        """("ok", result), ("error", text), or ("died", exit code)."""
        process, pipe = self.processes[rank], self.pipes[rank]
        try:
            found = (
                pipe.recv_bytes() if pipe.poll(max(0, self.deadline - time.monotonic())) else None
            )
        except EOFError:
            process.join(5)
            return "died", process.exitcode
        if found is None:
            self.kill()
            raise TimeoutError(f"rank {rank} of {len(self.processes)} did not end in time")
        return torch.load(io.BytesIO(found), weights_only=False)

    def outcomes(self):
        found = [self.outcome(rank) for rank in range(len(self.processes))]
        for process in self.processes:
            process.join(10)
        self.kill()
        return found

    def results(self):
        found = self.outcomes()
        errors = [f"rank {r}: {text}" for r, (kind, text) in enumerate(found) if kind != "ok"]
        assert not errors, "\n".join(errors)
        return [result for _, result in found]

    def kill(self):
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def run(size, function, *args, **options):
    """The results of function(rank, *args) on every rank."""
    return Ranks(size, function, *args, **options).results()


def _free_port():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port


def _main(pipe, rank, size, port, timeout, function, args):
    def send(*found):
        # Through one buffer: torch would pass tensors by descriptors that end with this process.
        buffer = io.BytesIO()
        torch.save(found, buffer)
        pipe.send_bytes(buffer.getvalue())

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if timeout is not None:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        send("ok", function(rank, *args))
        if timeout is not None:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        send("error", traceback.format_exc())
