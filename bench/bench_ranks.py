"""Ranks that die, stop, differ or finish: how does `quaver train` end on every rank?

Each run has three ranks over gloo. In one of them a rank is killed or stopped at a named moment, or
gets other flags than the rest; then every rank must end within 60 s, with one line on stderr that
names the rank or the flag. Where nothing happens, every rank must end with status 0.

Without arguments every case of the table runs once, and 20 runs are left alone. `--kills 53` kills
at random moments, `--exits 200` counts the runs that are left alone and end well.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
import matplotlib.pyplot  # noqa: F401 (once here, not in every rank)
import torch._dynamo  # noqa: F401
import torch.distributed as dist

import quaver as qv
from quaver import cli, data, job, models, rundir
from quaver.comm.heartbeat import Heartbeat
from quaver.comm.rendezvous import Rendezvous
from quaver.comm.transport import Transport

SIZE = 3
LIMIT = 60.0  # seconds
MODEL = (
    '{"vocab": 256, "dim": 64, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 128, "context": 64}'
)

# A rank dies or stops as it calls this function for the n-th time.
MOMENTS = {
    "start": (cli, "main", 1),
    "store": (Rendezvous, "_join", 1),
    "heartbeat": (Heartbeat, "__init__", 1),
    "flags": (Heartbeat, "gather", 1),
    "group": (dist, "init_process_group", 1),
    "data": (data, "load", 1),
    "folder": (rundir.RunDir, "check", 1),  # rank 0 alone
    "model": (models, "build", 1),
    "step 1": (job.Job, "step", 1),
    "step 3": (job.Job, "step", 3),
    "message": (Transport, "all_to_all", 8),
    "save 1": (qv.distributed, "save", 1),
    "save 2": (qv.distributed, "save", 2),
    "result": (job.Job, "_result", 1),
    "end": (dist, "destroy_process_group", 1),
}
# Flags of rank 1 alone, with what every rank's line names and its status.
DIFFERENCES = (
    ({"--save-every": "3"}, "--save-every", 2),
    ({"--steps": "7"}, "--steps", 2),
    ({"--batch": "12"}, "--batch", 2),
    ({"--seq": "32"}, "--seq", 2),
    ({"--recipe": "bf16"}, "--recipe", 2),
    ({"--parallel": "zero=3"}, "--parallel", 2),
    ({"--parallel": "dp=2"}, "--parallel", 2),
    ({"--resume": None}, "--resume", 2),
    ({"--out": "elsewhere"}, "--out", 2),
    ({"--data": "no-such-file"}, "no-such-file", 2),
    ({"--model": "tiny"}, "--model", 2),
    ({"--model": "no-such-model"}, "no-such-model", 2),
    ({"--lr": "-1"}, "--lr", 2),
    ({"--steps": "many"}, "--steps", 2),
    ({"--no-such-flag": None}, "--no-such-flag", 2),
)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def interrupt(moment, number):
    """This process sends itself signal `number` at `moment`."""
    owner, name, wanted = MOMENTS[moment]
    function, calls = getattr(owner, name), 0

    def stops(*args, **options):
        nonlocal calls
        calls += 1
        if calls == wanted:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    setattr(owner, name, stops)


class Rank:
    """A forked process that runs the command line, and ends as `python -m quaver` does."""

    def __init__(self, rank, port, flags, errors, before=lambda: None):
        self.errors, self.status, self.began = errors, None, time.monotonic()
        self.process = os.fork()
        if self.process:
            return
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        before()
        sys.argv[1:] = flags
        cli.command()

    def ended(self):
        if self.status is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.began
        return self.status is not None

    def kill(self):
        if not self.ended():
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)


def command(folder, changes):
    flags = {
        **{"--data": f"{folder}/text.txt", "--model": f"{folder}/model.json", "--steps": "6"},
        **{"--recipe": "fp8lm-o2", "--batch": "6", "--seq": "16", "--device": "cpu"},
        **{"--save-every": "2", "--out": f"{folder}/out", "--parallel": f"dp={SIZE}"},
    } | changes
    return ["train", *(text for pair in flags.items() for text in pair if text is not None)]


def run(victim=None, moment=None, number=signal.SIGKILL, changes=(), everyone=()):
    """Runs the ranks. Returns [(status or None, seconds, stderr)] in rank order; `victim` has the
    signal `number` at `moment`, or `changes` of its flags."""
    folder = tempfile.mkdtemp()  # no context manager: the forked ranks would remove it as they end
    Path(folder, "text.txt").write_bytes(random.Random(0).randbytes(200) * 50)
    Path(folder, "model.json").write_text(MODEL)
    port, ranks = free_port(), []
    for rank in range(SIZE):
        hit = rank == victim
        flags = command(folder, dict(everyone) | (dict(changes) if hit else {}))
        before = (lambda: interrupt(moment, number)) if hit and moment else (lambda: None)
        ranks.append(Rank(rank, port, flags, Path(folder, f"errors{rank}"), before))
    others = [r for i, r in enumerate(ranks) if i != victim or number != signal.SIGSTOP]
    deadline = time.monotonic() + 2 * LIMIT
    while others and time.monotonic() < deadline:
        others = [rank for rank in others if not rank.ended()]
        time.sleep(0.02)
    found = []
    for rank in ranks:
        rank.kill()
        seconds = rank.seconds if rank.status is not None else None
        found.append((rank.status, seconds, rank.errors.read_text()))
    shutil.rmtree(folder)
    return found


def judge(found, victim, status, text):
    """The fault in the way that the ranks other than `victim` ended; "" for none."""
    wrong = []
    for rank, (ended, seconds, errors) in enumerate(found):
        if rank == victim:
            continue
        # Torch's store logs in C++ where it loses a connection.
        lines = [line for line in errors.splitlines() if line.startswith("quaver")]
        if ended is None:
            wrong.append(f"rank {rank} did not end")
        elif ended != status:
            wrong.append(f"rank {rank} ended with {ended}")
        elif seconds > LIMIT:
            wrong.append(f"rank {rank} took {seconds:.0f} s")
        elif len(lines) != 1 or text not in lines[0] or "Traceback" in errors:
            wrong.append(f"rank {rank} wrote {len(lines)} lines: {errors[-300:]!r}")
    return ", ".join(wrong)


def report(rows, name, found, victim, wrong):
    seconds = max([s for i, (_, s, _) in enumerate(found) if s and i != victim], default=0.0)
    line = next((e.splitlines()[-1] for i, (_, _, e) in enumerate(found) if i != victim and e), "")
    print(f"{name:<34}{seconds:6.1f} s  {wrong or 'good':<30} {line[:150]}", flush=True)
    rows.append({"name": name, "seconds": seconds, "wrong": wrong, "line": line})


def disturbed(rows, victim, moment, number):
    verb = "stopped" if number == signal.SIGSTOP else "killed"
    found = run(victim, moment, number)
    # At the end the others may be done before the rank dies.
    lenient = moment == "end" and {status for i, (status, _, _) in enumerate(found) if i != victim}
    status = 0 if lenient == {0} else found[(victim + 1) % SIZE][0] or 1
    wrong = judge(found, victim, status if status in (1, 2) else 1, "rank")
    report(rows, f"rank {victim} {verb}: {moment}", found, victim, "" if lenient == {0} else wrong)


def differences(rows):
    for changes, text, status in DIFFERENCES:
        found = run(1, changes=changes)
        report(rows, f"rank 1: {changes}", found, None, judge(found, None, status, text))


def exits(rows, count):
    """Runs of one step that nothing disturbs."""
    counts, began = collections.Counter(), time.monotonic()
    for i in range(count):
        for status, _, errors in run(everyone={"--steps": "1", "--recipe": "bf16"}):
            counts[status] += 1
            if status or errors:
                print(f"run {i}: status {status}: {errors[-300:]}", flush=True)
        if i % 20 == 19:
            print(f"{i + 1} runs: {dict(counts)}", flush=True)
    bad = sum(n for status, n in counts.items() if status)
    seconds = (time.monotonic() - began) / max(1, count)
    print(f"{count} runs of {SIZE} ranks, {seconds:.1f} s each: {bad} ranks ended badly {counts}")
    rows.append({"name": "exits", "runs": count, "bad": bad, "wrong": "exits" if bad else ""})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, help="kills or stops at random moments, instead of all"
    )
    parser.add_argument("--exits", type=int, help="runs that are left alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(common.describe(common.machine()))
    rows, draw = [], random.Random(args.seed)
    everything = args.kills is None and args.exits is None
    cases = [(v, m, signal.SIGKILL) for m in MOMENTS for v in (0, 1) if m != "folder" or v == 0]
    cases += [(v, m, signal.SIGSTOP) for m in ("flags", "step 3") for v in (0, 1)]
    if not everything:
        cases = [draw.choice(cases) for _ in range(args.kills or 0)]
    for victim, moment, number in cases:
        disturbed(rows, victim, moment, number)
    if everything:
        differences(rows)
    exits(rows, 20 if everything else args.exits or 0)
    if everything:
        common.save("ranks", rows)
    wrong = [row["name"] for row in rows if row["wrong"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} good")
    if wrong:
        sys.exit(f"ranks: {wrong}")


if __name__ == "__main__":
    main()
