"""`quaver train --parallel` by real processes: what it computes, where it runs, and bad flags."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rank_runs
import ranks
import stand_in
import torch
import torch.distributed as dist
from rank_runs import BIG, command, finish, threads_of_ranks
from runs import losses, read_metrics

import quaver as qv
from quaver import cli, models
from quaver.comm.heartbeat import Heartbeat
from quaver.distributed import init, launch
from quaver.errors import UsageError
from quaver.parallel import Parallel

flags = rank_runs.flags


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
