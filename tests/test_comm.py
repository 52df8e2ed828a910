"""The NCCL communicator, as threads and processes over a stand-in that moves host memory."""

import os
import signal
import threading

import pytest
import ranks as processes
import torch
from stand_in import PATH, built
from torch.distributed import HashStore, distributed_c10d

from quaver.comm.nccl import Nccl


def ranks(size, body):
    """body(communicator) as every rank; the first error, if any, is raised here."""
    store, errors = HashStore(), []

    def run(rank):
        try:
            communicator = Nccl(store, rank, size, timeout=20.0, library=str(PATH), host=True)
            body(communicator)
            communicator.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@built
@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives_move_every_byte(size):
    def body(c):
        send = (torch.arange(size * 4) + 40 * c.rank).to(torch.uint8).reshape(size, 4)
        recv = torch.zeros_like(send)
        c.all_to_all(recv, send)
        wanted = [(torch.arange(4) + 40 * p + 4 * c.rank).tolist() for p in range(size)]
        assert recv.tolist() == wanted

        codes = torch.tensor([1.5, -2.0] if c.rank else [0.5, 448.0]).to(torch.float8_e4m3fn)
        gathered = torch.zeros(size, 2, dtype=torch.float8_e4m3fn)
        c.all_gather(gathered, codes)
        assert gathered.float().tolist() == [[0.5, 448.0]] + [[1.5, -2.0]] * (size - 1)

        # From p to q go p + 2q bytes modulo 3, of value p.
        out = [(c.rank + 2 * p) % 3 for p in range(size)]
        came = [(p + 2 * c.rank) % 3 for p in range(size)]
        recv = torch.zeros(sum(came), dtype=torch.uint8)
        c.all_to_all(recv, torch.full((sum(out),), c.rank, dtype=torch.uint8), came, out)
        assert recv.tolist() == [p for p in range(size) for _ in range(came[p])]

        values = torch.tensor([1.0, 2.0]) * c.rank
        c.broadcast(values, size - 1)
        assert values.tolist() == [size - 1.0, 2.0 * (size - 1)]

        values = torch.tensor([float(c.rank), -1.0 - c.rank])
        c.max_(values)
        assert values.tolist() == [size - 1.0, -1.0]
        values = torch.ones(3)
        c.sum_(values)
        assert values.tolist() == [size] * 3
        assert c.sums_fp8
        codes = torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn)
        c.sum_(codes)
        assert codes.float().tolist() == [size, 448.0]  # saturated
        c.check()

    ranks(size, body)


@built
def test_mistakes_are_named():
    def body(c):
        x = torch.zeros(4, dtype=torch.uint8)
        with pytest.raises(ValueError, match="wanted a recv of 4 bytes for 1 ranks, got 8"):
            c.all_gather(torch.zeros(8, dtype=torch.uint8), x)
        with pytest.raises(ValueError, match="send must be contiguous"):
            c.all_to_all(x, torch.zeros(8, dtype=torch.uint8)[::2])
        with pytest.raises(ValueError, match=r"as much from rank 0 as goes to it.*got 3 and 4"):
            c.all_to_all(x[:3], x)
        for parts in ([3], [5], [-1], [2, 2]):
            with pytest.raises(ValueError, match=f"1 parts of send.* 4 bytes, got .{parts[0]}"):
                c.all_to_all(x, x, [4], parts)
        with pytest.raises(ValueError, match=r"wanted a root in \[0, 1\), got 1"):
            c.broadcast(x, 1)
        c.abort()
        with pytest.raises(ValueError, match="communicator of rank 0 is closed"):
            c.check()

    ranks(1, body)


def _open(rank, size):
    store = distributed_c10d._get_default_store()
    return Nccl(store, rank, size, timeout=20.0, library=str(PATH), host=True)


def _exchange(rank, size):
    c = _open(rank, size)
    recv = torch.zeros(size, dtype=torch.uint8)
    c.all_to_all(recv, torch.arange(size, dtype=torch.uint8) + 10 * rank)
    total = torch.tensor([float(rank)])
    c.sum_(total)
    c.close()
    return recv.tolist(), total.item()


@built
@pytest.mark.parametrize("size", [2, 4])
def test_processes(size):
    for rank, (got, total) in enumerate(processes.run(size, _exchange, size)):
        assert got == [10 * p + rank for p in range(size)]
        assert total == sum(range(size))


def _killed(rank, size, folder):
    os.environ["TMPDIR"] = str(folder)
    c = _open(rank, size)
    c.max_(torch.zeros(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ValueError, match=f"NCCL failed on rank {rank} of {size}: remote process"):
        c.max_(torch.zeros(1))
    with pytest.raises(ValueError, match="was aborted"):
        c.max_(torch.zeros(1))
    return True


@built
def test_a_killed_process_is_an_error_on_the_others_and_not_a_hang(tmp_path):
    found = processes.Ranks(3, _killed, 3, tmp_path).outcomes()
    assert found == [("ok", True), ("died", -signal.SIGKILL), ("ok", True)]


@built
def test_host_tensors_are_refused_where_nccl_would_read_device_memory():
    c = Nccl(HashStore(), 0, 1, library=str(PATH))
    with pytest.raises(ValueError, match="wanted tensors on cuda, got cpu"):
        c.max_(torch.ones(1))
    c.close()


def test_an_nccl_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"NCCL does not load: no-such-nccl\.so"):
        Nccl(HashStore(), 0, 1, library="no-such-nccl.so")


def test_a_store_without_an_answer_is_named():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 waited 0.05 s for rank 0's id"):
        Nccl(HashStore(), 1, 2, timeout=0.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_world_of_one_over_real_nccl():
    c = Nccl(HashStore(), 0, 1)
    send = torch.arange(64, dtype=torch.uint8, device="cuda")
    for collective in (c.all_to_all, c.all_gather):
        recv = torch.zeros_like(send)
        collective(recv, send)
        assert torch.equal(recv, send)
    codes = torch.randn(256, device="cuda").to(torch.float8_e4m3fn)
    before = codes.clone()
    c.sum_(codes)
    assert torch.equal(codes.view(torch.uint8), before.view(torch.uint8))
    c.check()
    c.close()
