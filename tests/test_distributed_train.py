"""`quaver train --parallel` by real processes: what it computes, writes, survives and refuses."""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import ranks
import stand_in
import torch
import torch.distributed as dist
from runs import MODEL, losses, read_metrics
from safetensors.torch import load_file

import quaver as qv
from quaver import checkpoint, cli, data, models
from quaver.comm.heartbeat import Heartbeat, RankFailure
from quaver.comm.rendezvous import Rendezvous
from quaver.distributed import init, launch
from quaver.errors import UsageError
from quaver.job import Job
from quaver.parallel import Parallel

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


def summary(out, recipe):
    return json.loads(Path(out, "summary.json").read_text())["recipes"][recipe]


@pytest.mark.parametrize(
    ("recipe", "parallel"), [("fp8lm-o3", "zero=4"), ("fp8lm-o3", "fsdp=4"), ("fp8lm-o2", "dp=2")]
)
def test_ranks_train_what_one_process_trains(flags, tmp_path, recipe, parallel):
    size = int(parallel[-1])
    finish(size, flags("many", recipe, "--parallel", parallel))
    assert cli.main(flags("one", recipe)) == 0
    for a, b in zip(
        losses(tmp_path / "many", recipe), losses(tmp_path / "one", recipe), strict=True
    ):
        assert a[1] == pytest.approx(b[1], rel=5e-3)
    many, one = (summary(tmp_path / out, recipe) for out in ("many", "one"))
    assert many["val_loss"] == pytest.approx(one["val_loss"], rel=5e-3)
    assert one["communication"] == dict.fromkeys(("gradient", "weight", "activation", "scale"), 0)
    lines = read_metrics(tmp_path / "many", recipe)
    for kind, count in many["communication"].items():
        assert count == sum(line["communication"][kind] for line in lines)
    # A weight is f16 + e4m3 + e4m3 + f16 for master, gradient and moments.
    per = many["memory"]["bytes_per_param"]
    if parallel == "dp=2":
        assert per["state"] == pytest.approx(6, rel=0.01)
        assert many["communication"]["weight"] == 0
    elif parallel == "fsdp=4":
        wanted = (2 + 4 + 1 + 2) / size  # a part of everything; the gradient is f32
        print(f"bytes per parameter and rank: {per['all']:.3f}, by the formula {wanted:.3f}")
        assert per["all"] == pytest.approx(wanted, rel=0.01)
    else:
        wanted = 1 + 1 + 6 / size  # an e4m3 weight, its transpose, and a part of the rest
        print(f"bytes per parameter and rank: {per['all']:.3f}, by the formula {wanted:.3f}")
        assert per["all"] == pytest.approx(wanted, rel=0.01)


def _carried(rank, folder, arguments):
    stand_in.carry(folder)
    return command(rank, arguments)


@stand_in.built
def test_quavers_own_communicator_trains_the_same(flags, tmp_path):
    """Groups for data, tensors and all of the ranks, each with its own."""
    (tmp_path / "model.json").write_text(json.dumps({**BIG, "kv_heads": 2}))
    options = "fp8lm-o3", "--parallel", "zero=2,tp=2"
    finish(4, flags("group", *options))
    own = ranks.Ranks(4, _carried, tmp_path, flags("own", *options), timeout=300, init=False)
    assert [status for status, _, _ in own.results()] == [0] * 4
    assert losses(tmp_path / "own", "fp8lm-o3") == losses(tmp_path / "group", "fp8lm-o3")
    sent = [summary(tmp_path / out, "fp8lm-o3")["communication"] for out in ("own", "group")]
    assert sent[0] == sent[1]


def test_weight_gradients_take_half_of_bf16s_bytes(flags, tmp_path):
    """Of converted weights, scales and padding included, as DDP with bf16 gradients would send."""
    size = 2
    finish(size, flags("run", "fp8lm-o2", "--parallel", "dp=2", steps=2))
    model = qv.convert(models.build(models.load(str(tmp_path / "model.json"))))
    weights = sum(p.numel() for p in model.parameters() if isinstance(p, qv.ScaledTensor))
    others = sum(p.numel() for p in model.parameters() if not isinstance(p, qv.ScaledTensor))
    sent = read_metrics(tmp_path / "run", "fp8lm-o2")[0]["communication"]
    around = 2 * (size - 1) / size  # of a ring all-reduce
    fp8 = sent["gradient"] + sent["scale"] - around * 4 * others
    ratio = fp8 / (around * 2 * weights)
    print(f"bytes of weight gradients against bf16: {ratio:.3f}")
    # Of a model this small, the amaxes of its layers' histories are a percent alone.
    assert 0.5 <= ratio <= 0.52 + sent["scale"] / (around * 2 * weights)


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


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("dp=2,tp=2", "is for 4 processes, 1 started"),
        ("fsdp=2,tp=2", "takes fsdp=N, or one of dp=N and zero=N, and tp=N"),
        ("dp", "wants dp=N, zero=N, fsdp=N or tp=N, N at least 1, got 'dp'"),
        ("dp=0", "got 'dp=0'"),
        ("dp=x", "got 'dp=x'"),
        ("", "got ''"),
        ("dp=2,zero=2", "takes fsdp=N, or one of dp=N and zero=N, and tp=N"),
        ("dp=2,dp=2", "takes fsdp=N, or one of"),
        ("dp=5", "--batch 12 does not divide among 5 ranks"),
        ("dp=2", "is for 2 processes, 1 started: torchrun --nproc-per-node 2 -m quaver train"),
    ],
)
def test_bad_parallel_is_named(flags, capsys, parallel, message):
    assert cli.main(flags("run", "f32", "--parallel", parallel)) == 2
    assert message in capsys.readouterr().err
    assert Parallel.parse(None) == Parallel() and Parallel.parse("zero=3") == Parallel("zero", 3)


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


def test_a_recipe_that_parallel_does_not_take_is_refused_before_anything_is_written(
    flags, tmp_path
):
    arguments = flags("run", "coat", "--parallel", "fsdp=2")
    for status, text, _ in ranks.Ranks(2, command, arguments, timeout=100, init=False).results():
        assert status == 2 and "FSDP2 takes parameters of one dtype" in text
    assert not (tmp_path / "run").exists()


def _joins_twice(rank):
    """One after the other in a process, as a notebook's cell that is run again."""

    def leftovers():
        hearts = [x for x in gc.get_objects() if isinstance(x, Heartbeat)]  # atexit keeps none
        return threads_of_ranks(), len(hearts), signal.getsignal(signal.SIGINT) == handler

    handler = signal.getsignal(signal.SIGINT)
    found = []
    for _ in range(2):
        with launch.joined(torch.device("cpu"), settings={"a": 1}) as world:
            init()  # does nothing
            with pytest.raises(
                UsageError, match=r"wanted a group .* \('gloo', \d, 2\) exists already"
            ):
                init("cuda")
            found.append(world.all_gather(rank))
            world.transport.max(torch.ones(3), "scale").wait()
        assert not dist.is_initialized()
        del world
        gc.collect()
        found.append(leftovers())
    return found


def test_joining_twice_works_and_leaves_no_thread_handler_or_group():
    for first, left, second, left_again in ranks.run(2, _joins_twice, init=False):
        assert first == second == [0, 1]
        assert left == left_again == ([], 0, True)


@pytest.mark.slow
def test_under_torchrun(flags, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "quaver",
    ]
    done = subprocess.run(
        [*launch, *flags("run", "fp8lm-o3", "--parallel", "zero=2")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "fp8lm-o3  step 6/6" in done.stdout
    assert summary(tmp_path / "run", "fp8lm-o3")["communication"]["weight"] > 0
    example = Path(__file__).parents[1] / "examples" / "train_ranks.py"
    done = subprocess.run(
        [*launch[:5], str(example), "20", str(tmp_path / "example.safetensors")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step   19" in done.stdout
    assert (tmp_path / "example.safetensors").stat().st_size > 0


def can_make_hosts():
    made = subprocess.run(["ip", "netns", "add", "quaver-probe"], capture_output=True).returncode
    return made == 0 and not subprocess.run(["ip", "netns", "delete", "quaver-probe"]).returncode


@pytest.mark.slow
def test_two_hosts_train_what_one_does(flags, tmp_path):
    if not (shutil.which("ip") and can_make_hosts()):
        pytest.skip("network namespaces need root and iproute2")
    script = Path(__file__).parents[1] / "examples" / "two_hosts.sh"
    _, *arguments = flags("two", "fp8lm-o3", "--parallel", "dp=4")
    done = subprocess.run(
        [str(script), *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    finish(4, flags("one", "fp8lm-o3", "--parallel", "dp=4"))
    assert losses(tmp_path / "two", "fp8lm-o3") == losses(tmp_path / "one", "fp8lm-o3")
    # Nothing of the hosts is left.
    assert "quaver-" not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
