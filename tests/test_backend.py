"""Messages over quaver's own communicator, through a stand-in for NCCL that moves host memory,
against the same messages over gloo."""

import os
import signal

import pytest
import ranks
import stand_in
import torch
import torch.distributed as dist
from stand_in import built

import quaver as qv
from quaver import reference
from quaver.comm.backend import NcclBackend, ProcessGroupBackend, backend_of
from quaver.comm.heartbeat import RankFailure
from quaver.comm.transport import Transport

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def gradients(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(s, generator=generator) for s in [(5, 7), (300,), (16, 33)]]


def _messages(transport):
    """One of each, with what this rank sent."""
    rank, size = transport.rank, transport.size
    x = torch.arange(6, dtype=torch.float32) + 10 * rank
    lengths = [r + 1 for r in range(size)]
    pieces = torch.arange(sum(lengths), dtype=torch.int16) + 100 * rank
    rows = [torch.full((3 * r,), r if r == rank else 99, dtype=torch.uint8) for r in range(size)]
    found = [
        transport.all_gather(x.to(torch.bfloat16).view(2, 3), "weight").wait(),
        transport.all_to_all(pieces, lengths, "gradient").wait(),
        transport.shift(x.to(E4M3), "activation").wait().float(),
        transport.max(torch.tensor([float(rank), -float(rank)]), "scale").wait(),
        transport.gather_rows(rows, "weight").wait(),
        torch.cat(rows),
        torch.tensor(transport.all_gather_object({"rank": rank})[-1]["rank"]),
    ]
    plain = torch.full((2, 2), float(rank))
    transport.broadcast([plain])
    passed = torch.full((4,), float(rank))
    if rank == size - 1:  # to one rank, of which the others know nothing
        transport.send(passed, 0)
    elif rank == 0:
        transport.receive(passed, size - 1)
    return [*found, plain, passed], transport.traffic


def _reductions(rank):
    means = qv.distributed.all_reduce_mean(gradients(rank), E5M2)
    owned = qv.distributed.reduce_scatter_mean(gradients(rank), [0, 1, 1])
    codes = [m.qdata.view(torch.uint8) for m in means]
    return codes + [m.scale for m in means] + [o for o in owned if o is not None]


def _both_ways(rank, folder):
    found = []
    for way in (ProcessGroupBackend, NcclBackend):
        if way is NcclBackend:
            stand_in.carry(folder)
        transport = Transport()
        assert type(transport._backend) is way
        assert transport.sums_fp8 == (way is NcclBackend)
        found.append((*_messages(transport), _reductions(rank)))
    (plain, traffic, means), (ours, our_traffic, our_means) = found
    for a, b in zip(plain + means, ours + our_means, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert traffic == our_traffic
    return True


@built
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_bytes_and_traffic_as_over_a_process_group(size, tmp_path):
    assert ranks.run(size, _both_ways, tmp_path) == [True] * size


def _ring(rank, folder, mu):
    stand_in.carry(folder)
    mu = torch.full((3,), mu)
    means = qv.distributed.all_reduce_mean(gradients(rank), E4M3, "ring", mu=mu)
    return [(m.qdata.view(torch.uint8), m.scale, m.amax) for m in means]


@built
@pytest.mark.parametrize("mu", [0.5, 1.0])  # the second saturates
def test_ring_is_the_communicators_own_sum(mu, tmp_path):
    """The stand-in adds in rank order and rounds at every addition."""
    size = 3
    found = ranks.run(size, _ring, tmp_path, mu)
    everyones = [gradients(rank) for rank in range(size)]
    for i, parts in enumerate(zip(*everyones, strict=True)):
        amax = max(float(p.abs().max()) for p in parts)
        scale = reference.scale_from_amax(torch.tensor(amax / mu), E4M3, power_of_two=True)
        codes = [reference.encode(p / scale, E4M3) for p in parts]
        total = codes[0].float()
        for code in codes[1:]:
            total = reference.encode(total + code.float(), E4M3).float()
        for rank in range(size):
            got, got_scale, got_amax = found[rank][i]
            assert torch.equal(got, total.to(E4M3).view(torch.uint8))
            assert float(got_scale) == pytest.approx(float(scale) / size, rel=1e-6)
            assert float(got_amax) == pytest.approx(float(total.abs().max() * scale) / size)


def _groups(rank, folder):
    """Two groups beside each other, and one over all."""
    stand_in.carry(folder)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = Transport(pairs[rank // 2])
    world = Transport()
    assert backend_of(pairs[rank // 2]) is pair._backend
    mine = torch.tensor([rank])
    return [t.all_gather(mine, "scale").wait().flatten().tolist() for t in (pair, world, pair)]


@built
def test_each_group_has_its_own_communicator(tmp_path):
    found = ranks.run(4, _groups, tmp_path)
    for rank, (pair, world, again) in enumerate(found):
        assert pair == again == ([0, 1] if rank < 2 else [2, 3])
        assert world == [0, 1, 2, 3]


def _killed(rank, folder):
    """The message itself never fails: only the heartbeat finds the dead rank."""
    stand_in.carry(folder)
    os.environ["QUAVER_STAND_IN_DEAF"] = "1"
    transport = Transport()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankFailure, match=rf"rank {rank}, all_gather: rank 1 has died"):
        transport.all_gather(torch.zeros(1), "scale").wait()
    return True


@built
def test_a_killed_rank_ends_a_message_that_would_wait_for_ever(tmp_path):
    found = ranks.Ranks(3, _killed, tmp_path).outcomes()
    assert found == [("ok", True), ("died", -signal.SIGKILL), ("ok", True)]


def _refused(rank):
    os.environ["QUAVER_COMMUNICATOR"] = "mpi"
    with pytest.raises(ValueError, match=r"one of \('quaver', 'torch'\), got 'mpi'"):
        Transport()
    os.environ["QUAVER_COMMUNICATOR"] = "quaver"
    with pytest.raises(ValueError, match="moves host memory; this group is over gloo"):
        Transport()
    os.environ["QUAVER_NCCL_LIBRARY"] = "no-such-nccl.so"
    with pytest.raises(ValueError, match=r"NCCL does not load: no-such-nccl\.so"):
        Transport()
    return True


def test_a_backend_that_cannot_serve_is_named():
    assert ranks.run(2, _refused) == [True, True]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_one_rank_over_real_nccl_in_its_own_stream():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        backend = backend_of(None)
        assert isinstance(backend, NcclBackend)
        sent = torch.randn(1 << 20, device="cuda").view(torch.uint8)
        for message in (
            lambda got: backend.all_gather(got, sent),
            lambda got: backend.all_to_all(got, sent, [len(sent)], [len(sent)]),
            lambda got: backend.shift(got, sent, 0, 0),
        ):
            got = torch.zeros_like(sent)
            for work in message(got):
                work.wait()
            assert torch.equal(got, sent)  # in the current stream, which now waits
        values = torch.randn(64, device="cuda")
        before = values.clone()
        for work in backend.max_(values) + backend.broadcast(sent, 0):
            work.wait()
        assert torch.equal(values, before)
    finally:
        dist.destroy_process_group()
