"""The protocol of CUDA rows, beside common.py's pairs: the device's own clock, inputs that are not
in the cache, and a copy of the same number of bytes to hold a kernel against."""

import itertools
import math
import time

import torch

DEVICE = "cuda"  # a test sets "cpu" and walks every row once
CACHE_BYTES = 256 << 20  # several times the L2 cache, 50 MB on an H100
SETS = 4
TURN = 0.002  # seconds of a turn; some 30 microseconds would be enough for the clock
CALLS_AHEAD = 50  # the driver queues about a thousand launches and then makes the host wait


class Clock:
    """Seconds of one call between two CUDA events.

    A wait kernel goes first and is long enough for the host to queue all calls behind it, so that
    what is measured is the device. `host_bound` counts the turns in which it was not.
    """

    def __init__(self):
        self.lead, self.turns, self.host_bound = 1e-3, 0, 0

    def __call__(self, function, calls):
        mark, begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        mark.record()
        torch.cuda._sleep(int(self.lead * 2e9))  # cycles, at 2 GHz or less
        begin.record()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        self.turns += 1
        self.host_bound += host > mark.elapsed_time(begin) / 1e3
        self.lead = min(0.05, max(self.lead, 1.5 * host))
        return begin.elapsed_time(end) / 1e3 / calls


def protocol():
    """The arguments of `common.compare` for one row on a GPU."""
    return {"clock": Clock(), "turn": TURN, "most_calls": CALLS_AHEAD}


def set_count(bytes_per_set):
    """Input sets to rotate through: at least four, and together more than the caches hold."""
    return max(SETS, math.ceil(CACHE_BYTES / bytes_per_set))


def rotate(function, sets):
    """A function of no arguments that calls `function(*set)` with one set after another."""
    turn = itertools.cycle(sets)
    return lambda: function(*next(turn))


def copy(bytes):
    """A device-to-device copy that moves `bytes` in all: half of them read, half written."""
    half = bytes // 2
    sets = [
        tuple(torch.empty(half, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        for _ in range(set_count(bytes))
    ]
    for _, source in sets:
        source.random_()
    return rotate(lambda to, source: to.copy_(source), sets)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=dtype, device=DEVICE)
