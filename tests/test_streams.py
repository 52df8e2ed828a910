"""Memory that one CUDA stream allocated and another one reads, with stand-ins for the streams, on
the CPU: a trace of allocations, reads, waits and frees.

torch's allocator hands freed memory to the next allocation of the stream that allocated it, at
once. Where another stream reads it, the tensor must live until its stream has waited for the other,
or `record_stream` must have told the allocator.
"""

import contextlib

import pytest
import ranks
import torch
import torch.distributed as dist
from tensor_parallels import DY, PLAN, X, mlp
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import quaver as qv
from quaver.comm import backend, transport
from quaver.distributed import Transport, ZeroAdamW, ddp
from quaver.distributed.tensor_parallel import parallelize, sequence
from quaver.tensor import plain_tensors


class Stream:
    """Executes nothing: the host has done its work already, and the trace judges the rest."""

    current = None

    def __init__(self, trace, name):
        self.trace, self.name = trace, name

    def wait_stream(self, other):
        self.trace.waits(self, other)

    wait_event = wait_stream

    def record_event(self):
        return self  # stands for all that the stream has done until somebody waits: no less

    @contextlib.contextmanager
    def active(self):
        before, Stream.current = Stream.current, self
        try:
            yield
        finally:
            Stream.current = before


class Trace(TorchDispatchMode):
    """`errors` names each read of memory that its own stream could have written again meanwhile;
    `reads` counts those by another stream than the memory's."""

    def __init__(self):
        super().__init__()
        self.main = Stream(self, "main")
        self.home, self.pending, self.recorded, self.errors, self.reads = {}, [], set(), [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = storages((args, kwargs))
        fresh = function is torch.ops.aten.lift_fresh.default  # of torch.tensor: allocated just now
        for key, storage in inputs.items():
            home, _ = self.home.setdefault(key, (Stream.current if fresh else self.main, storage))
            if home is not Stream.current:
                self.pending.append((storage, key, home, Stream.current, str(function)))
                self.reads += 1
        result = function(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in inputs and key not in self.home:
                self.home[key] = (Stream.current, storage)
                self.allocates(Stream.current)
        return result

    def allocates(self, stream):
        for storage, key, home, reader, what in self.pending:
            if home is stream and storage.expired() and (key, reader) not in self.recorded:
                self.errors.append(f"{what} on {reader.name} reads what {home.name} freed")

    def waits(self, stream, other):
        self.pending = [p for p in self.pending if not (p[2] is stream and p[3] is other)]

    def record(self, tensor, stream):
        self.recorded |= {(key, stream) for key in storages(tensor)}


def storages(tree):
    """The storages in a tree of tensors by address, which stays theirs while we have the value."""
    leaves = torch.utils._pytree.tree_leaves(tree)
    tensors = [t for x in leaves if isinstance(x, torch.Tensor) for t in plain_tensors(x)]
    return {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in tensors}


class Messages:
    """What the communicator does, by gloo."""

    def all_gather(self, got, sent):
        dist.all_gather_into_tensor(got, sent)

    def broadcast(self, row, root):
        dist.broadcast(row, root)

    def all_to_all(self, got, sent, came, went):
        dist.all_to_all_single(got, sent, came, went)

    def max_(self, values):
        dist.all_reduce(values, dist.ReduceOp.MAX)


def start(record):
    """A trace, and stand-ins for the streams of torch and of the communicator."""
    trace = Trace()
    Stream.current = trace.main
    torch.cuda.current_stream = lambda device=None: Stream.current
    torch.cuda.stream = Stream.active
    torch.Tensor.record_stream = lambda t, stream: trace.record(t, stream) if record else None
    nccl = object.__new__(backend.NcclBackend)
    nccl.rank, nccl.size, nccl.sums_fp8 = dist.get_rank(), dist.get_world_size(), False
    nccl._nccl, nccl._stream = Messages(), Stream(trace, "nccl")
    transport.backend_of = lambda group: nccl
    return trace


def data_parallel(rank, kind, record=True):
    trace = start(record)
    torch.manual_seed(0)
    # Deep, and a bucket for each tensor: the first ones arrive while backward still allocates.
    model = qv.convert(nn.Sequential(*(nn.Linear(32, 32) for _ in range(8))), "fp8lm-o2")
    optimizer = (ZeroAdamW if kind == "zero" else qv.AdamW)(model.parameters(), recipe="fp8lm-o2")
    algorithm = "ring" if kind == "ring" else "two_shot"
    parallel = ddp(model, optimizer=optimizer, algorithm=algorithm, bucket_bytes=1)
    parallel._stream = Stream(trace, "ddp")
    with trace:
        for _ in range(2):
            model(torch.randn(16, 32)).square().mean().backward()
            qv.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return trace.errors, trace.reads


def tensor_parallel(rank):
    trace = start(record=True)
    link = Transport()
    model = parallelize(mlp("fp8lm-o2"), link, PLAN, fp8_sum=True, regather=True)
    with trace:
        for _ in range(2):
            x = sequence.own(X, link).requires_grad_()
            model(x).backward(sequence.own(DY, link))
    return trace.errors, trace.reads


@pytest.mark.parametrize("kind", ["two_shot", "ring", "zero"])
def test_backward_does_not_overwrite_what_is_being_sent(kind):
    for errors, reads in ranks.run(2, data_parallel, kind):
        assert errors == []
        assert reads > 100  # the trace saw other streams at work


def test_gathers_of_tensor_parallelism_keep_their_memory():
    for errors, reads in ranks.run(2, tensor_parallel):
        assert errors == []
        assert reads > 10


def test_the_trace_finds_gradients_that_are_freed_too_early():
    for errors, _ in ranks.run(2, data_parallel, "two_shot", False):
        assert any("ddp reads what main freed" in error for error in errors), errors
