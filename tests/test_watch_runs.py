"""qv.watch on several ranks, and `quaver train --watch`."""

import functools
import json
import os
import random
import signal

import pytest
import ranks
import torch
from test_watch import Net, loss_of

import quaver as qv
from quaver import job, train, watching
from quaver.distributed import ddp, fully_shard
from quaver.errors import UsageError


def decide(rank, sharded):
    """The names that are plain after each step, and the tensors measured last, where rank 1 alone
    has outliers."""
    torch.manual_seed(0)
    model = qv.convert(Net(), "tensorwise", skip=["head"])
    watch = qv.watch(model, every=2, fallback="auto")
    if sharded:
        fully_shard(model)
    optimizer = qv.AdamW(model.parameters(), 1e-2, recipe="tensorwise")
    if not sharded:
        ddp(model, optimizer=optimizer)
    plain = []
    for step in range(12):
        model.spike = 1e7 if rank == 1 and step >= 4 else 1.0
        optimizer.zero_grad()
        loss_of(model, step, slice(6 * rank, 6 * rank + 6)).backward()
        optimizer.step()
        watch.step()
        plain.append(watch.plain)
    return plain, {name: list(found) for name, found in watch.last.items()}


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_decide_alike(sharded):
    one, two = ranks.run(2, decide, sharded)
    assert one == two
    plain, measured = one
    assert plain[-1] == ["second"]
    assert "input" in measured["second"]


def test_a_run_moves_layers_and_resumes_with_the_same_bits(tmp_path, monkeypatch):
    """quaver train --watch, under a limit that its layers are above and below by turns."""
    text, out = tmp_path / "text.txt", {name: tmp_path / name for name in ("whole", "cut")}
    text.write_bytes(random.Random(0).randbytes(200) * 50)
    limited = functools.partial(watching.watch, flushed=1.0, kurtosis=5.0, calm=1)
    monkeypatch.setattr(job, "watch", limited)

    def run(name, **more):
        options = {
            "data": (str(text),), "recipe": ("coat",), "steps": 12, "batch": 2, "seq": 16,
            "device": "cpu", "save_every": 4, "eval_every": 3, "out": str(out[name]), "watch": 2,
        }  # fmt: skip
        train.run(train.Settings(**(options | more)))
        lines = (out[name] / "coat" / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [line | {"tokens_per_s": 0} for line in found]

    whole = run("whole")
    moved = [line["watch"]["moved"] for line in whole if "watch" in line]
    assert len(moved) == 6
    assert {plain for step in moved for plain in step.values()} == {True, False}
    step = job.Job.step

    def stop_at_seven(self, number):
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(job.Job, "step", stop_at_seven)
        with pytest.raises(train.Interrupted):
            run("cut")
    assert run("cut", resume=True) == whole
    with pytest.raises(UsageError, match="watch"):
        run("cut", resume=True, watch=3)
