"""Ranks of `quaver train --parallel` that die, stop, err, differ or come late are named."""

import json
import os
import signal
import socket
import time
import zlib
from pathlib import Path

import pytest
import rank_runs
import ranks
import torch
import torch.distributed as dist
from rank_runs import command, finish, start
from runs import losses
from safetensors.torch import load_file

import quaver as qv
from quaver import checkpoint, cli, data, models
from quaver.comm.heartbeat import Heartbeat, RankFailure
from quaver.comm.rendezvous import Rendezvous
from quaver.distributed import init, launch
from quaver.errors import UsageError
from quaver.job import Job

flags = rank_runs.flags


@pytest.mark.parametrize("parallel", ["zero=3", "fsdp=3"])
def test_a_killed_rank_is_named_and_the_run_resumes_with_the_same_bits(flags, tmp_path, parallel):
    size, arguments = 3, ("--parallel", parallel)
    finish(size, flags("whole", "fp8lm-o3", *arguments))
    run = start(size, flags("cut", "fp8lm-o3", *arguments), (1, 4))
    found = run.outcomes()
    assert found[1] == ("died", -signal.SIGKILL)
    for rank in (0, 2):
        kind, (status, text, seconds) = found[rank]
        assert kind == "ok" and status == 1
        assert "rank 1 has died" in text and text.startswith("quaver train: error: rank")
        assert seconds < 60
    assert summary_missing(tmp_path / "cut")
    finish(size, flags("cut", "fp8lm-o3", *arguments, "--resume"))
    assert losses(tmp_path / "cut", "fp8lm-o3") == losses(tmp_path / "whole", "fp8lm-o3")
    assert checksums(tmp_path / "cut") == checksums(tmp_path / "whole")


def checksums(out):
    path = out / "fp8lm-o3" / "checkpoint" / "state.safetensors"
    if not path.is_dir():
        return qv.tensor_file.read_tensors(path, checkpoint.FORMAT, checkpoint.VERSION)[1]["crc32"]
    found = {}  # of FSDP2's shards; the random generators of Python were never seeded
    for file in (path / json.loads((path / "checkpoint.json").read_text())["folder"]).iterdir():
        tensors = load_file(file)
        found |= {
            (file.name, name): zlib.crc32(t.flatten().view(torch.uint8).numpy())
            for name, t in tensors.items()
            if not name.startswith("rng.")
        }
    return found


def summary_missing(out):
    return not Path(out, "summary.json").exists()


def test_a_signal_to_one_rank_stops_all_and_another_number_of_ranks_resumes(flags, tmp_path):
    run = start(
        2, flags("run", "fp8lm-o3", "--parallel", "zero=2"), (1, 3), signal.SIGTERM
    )  # fmt: skip
    assert [status for status, _, _ in run.results()] == [130, 130]
    assert len(losses(tmp_path / "run", "fp8lm-o3")) == 3
    assert cli.main(flags("run", "fp8lm-o3", "--resume")) == 0
    assert cli.main(flags("one", "fp8lm-o3")) == 0
    for a, b in zip(
        losses(tmp_path / "run", "fp8lm-o3"), losses(tmp_path / "one", "fp8lm-o3"), strict=True
    ):
        assert a[1] == pytest.approx(b[1], rel=5e-3)


def test_an_error_of_the_first_rank_ends_all(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note").touch()
    for status, text, _ in start(2, flags("run", "f32", "--parallel", "dp=2")).results():
        assert status == 2
        assert "holds other files and no run" in text


@pytest.fixture
def environment(monkeypatch):
    """Sets torchrun's variables, for a store at `port` of this machine."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def make(port, rank=1):
        for name, value in zip(names, (rank, 2, "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, str(value))

    return make


@pytest.mark.parametrize("silent", [False, True])
def test_a_store_that_does_not_answer_is_named(environment, silent):
    """One that is not there, and one that accepts connections and says nothing."""
    with pytest.raises(UsageError, match=r"RANK, .* not set: start the ranks with torchrun"):
        init()
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        port = there.getsockname()[1]
        if silent:
            there.listen()
        environment(port)
        began = time.monotonic()
        with pytest.raises(UsageError, match=rf"the store at 127.0.0.1:{port} .* within 2 s"):
            init(timeout=2)
        assert time.monotonic() - began < 20
    environment(port, rank=2)
    with pytest.raises(UsageError, match=r"wanted RANK in \[0, WORLD_SIZE\)"):
        init()


def test_a_rank_whose_peers_do_not_arrive_names_them(environment):
    environment(ranks._free_port(), rank=0)
    with pytest.raises(RankFailure, match="rank 1 has not arrived within 2 s"):
        init(timeout=2)
    assert Heartbeat._of_process is None and not dist.is_initialized()


MOMENTS = {  # a rank dies as it calls the function
    "before it joins": (Rendezvous, "join"),
    "as it joins": (Heartbeat, "gather"),
    "as it connects": (dist, "init_process_group"),
    "reading data": (data, "load"),
    "building the model": (models, "build"),
    "saving": (qv.distributed, "save"),
    "at the result": (Job, "_result"),
}


def _dies(rank, arguments, victim, moment):
    if rank == victim:
        owner, name = MOMENTS[moment]
        setattr(owner, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    launch.START_TIMEOUT = 10
    return command(rank, arguments)


@pytest.mark.parametrize(
    ("victim", "moment"), [*((0, m) for m in MOMENTS), (1, "as it joins"), (1, "saving")]
)
def test_whenever_a_rank_dies_the_others_end_by_name(flags, victim, moment):
    arguments = flags("run", "f32", "--parallel", "dp=3")
    found = ranks.Ranks(3, _dies, arguments, victim, moment, timeout=100, init=False).outcomes()
    assert found.pop(victim) == ("died", -signal.SIGKILL)
    for kind, (status, text, seconds) in found:
        assert kind == "ok" and status in (1, 2)
        own = [line for line in text.splitlines() if line.startswith("quaver")]
        assert len(own) == 1 and "Traceback" not in text
        # Where the victim listened and a rank connects after its death, or rank 0 never did, all
        # that is known is that nobody answers.
        silent = moment in ("before it joins", "as it joins")
        # One that had reached it may hear of the death in other ways, by the store or the rank.
        named = ("the store", f"rank {victim}") if silent else (f"rank {victim} has",)
        assert any(name in own[0] for name in named), own[0]
        assert seconds < 60


def _starts_late(rank, arguments):
    launch.FAREWELL = 0.1
    time.sleep(2 * rank)
    return _dies(rank, arguments, 1, "as it joins")


def test_a_rank_that_starts_after_another_has_died_hears_of_it(flags):
    arguments = flags("run", "f32", "--parallel", "dp=3")
    found = ranks.Ranks(3, _starts_late, arguments, timeout=100, init=False).outcomes()
    assert found.pop(1) == ("died", -signal.SIGKILL)
    for kind, (status, text, _) in found:
        assert kind == "ok" and status == 1 and "rank 1 has died" in text, text


def _differs(rank, arguments, changes):
    if rank == 1:
        for flag, value in changes.items():
            if value is None:
                arguments = [*arguments, flag]
            else:
                arguments[arguments.index(flag) + 1] = value
    return command(rank, arguments)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--save-every": "3"}, "--save-every is 2 on rank 0, 3 on rank 1"),
        ({"--resume": None}, "--resume is False on rank 0, True on rank 1"),
        ({"--steps": "7"}, "--steps is 6 on rank 0, 7 on rank 1"),
        ({"--recipe": "bf16"}, "--recipe is f32 on rank 0, bf16 on rank 1"),
        ({"--batch": "24"}, "--batch is 12 on rank 0, 24 on rank 1"),
        ({"--parallel": "zero=2"}, "--parallel is dp=2 on rank 0, zero=2 on rank 1"),
        ({"--parallel": "dp=3"}, "--parallel dp=3 is for 3 processes, 2 started"),
        ({"--data": "no-such-text"}, "no-such-text"),
        ({"--model": "tiny"}, "--model is "),
        ({"--lr": "-1"}, "--lr"),
        ({"--steps": "many"}, "argument --steps: invalid int value: 'many'"),
        ({"--no-such-flag": None}, "unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_flag_of_one_rank_ends_all_by_name(flags, changes, named):
    arguments = flags("run", "f32", "--lr", "1e-3", "--parallel", "dp=2")
    for status, text, seconds in ranks.Ranks(
        2, _differs, arguments, changes, timeout=100, init=False
    ).results():
        assert status == 2 and seconds < 60
        assert named in text and len(text.splitlines()) == 1 and text.startswith("quaver")
