"""The NCCL communicator, as threads over a stand-in that moves host memory."""

import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from quaver.distributed.nccl import Nccl

STAND_IN = Path(__file__).resolve().parents[1] / "build/release/tests/libnccl_stand_in.so"
built = pytest.mark.skipif(
    not STAND_IN.exists(), reason=f"{STAND_IN.name} is not built: `make test` builds it"
)


def ranks(size, body):
    """body(communicator) as every rank; the first error, if any, is raised here."""
    store, errors = HashStore(), []

    def run(rank):
        try:
            communicator = Nccl(store, rank, size, timeout=20.0, library=str(STAND_IN), host=True)
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

        values = torch.tensor([float(c.rank), -1.0 - c.rank])
        c.max_(values)
        assert values.tolist() == [size - 1.0, -1.0]
        values = torch.ones(3)
        c.sum_(values)
        assert values.tolist() == [size] * 3
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
        with pytest.raises(ValueError, match="equal size, divisible by 1 ranks, got 4 and 3"):
            c.all_to_all(x[:3], x)
        c.abort()
        with pytest.raises(ValueError, match="communicator of rank 0 is closed"):
            c.check()

    ranks(1, body)


@built
def test_host_tensors_are_refused_where_nccl_would_read_device_memory():
    c = Nccl(HashStore(), 0, 1, library=str(STAND_IN))
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
