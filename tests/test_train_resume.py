"""A stopped run loses nothing: interruption, resumption, and folders that hold a run already."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import losses

from quaver import recipe, train
from quaver.errors import UsageError
from quaver.job import Job
from quaver.metrics import Metrics
from quaver.rundir import RunDir


@pytest.mark.parametrize("name", recipe.names())
def test_interrupt_saves_and_resume_has_the_same_bits(settings, tmp_path, monkeypatch, name):
    whole = settings(recipe=(name,), out=str(tmp_path / "whole"), steps=24)
    train.run(whole)
    s = settings(recipe=(name,), steps=24)
    step = Job.step

    def stop_at_five(self, number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Job, "step", stop_at_five)
    with pytest.raises(train.Interrupted):
        train.run(s)
    assert len(losses(s.out, name)) == 5
    monkeypatch.undo()
    resumed = settings(recipe=(name,), steps=24, resume=True)
    result = train.run(resumed)["recipes"][name]
    assert losses(s.out, name) == losses(whole.out, name)
    expected = json.loads(Path(whole.out, "summary.json").read_text())["recipes"][name]
    for key in ("final_loss", "val_loss", "memory"):
        assert result[key] == expected[key]


def test_signal_handlers_are_put_back(settings):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train.run(settings(steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_finished_run_resumes_to_itself(settings):
    s = settings(recipe=("f32", "bf16"))
    first = train.run(s)
    stamp = os.stat(RunDir(s.out).checkpoint_path("f32")).st_mtime_ns
    again = train.run(settings(recipe=("f32", "bf16"), resume=True))
    assert again["recipes"] == first["recipes"]
    assert os.stat(RunDir(s.out).checkpoint_path("f32")).st_mtime_ns == stamp


def test_resume_of_a_run_that_was_killed_at_once_starts_it(settings):
    """Before its first checkpoint, and before its configuration."""
    s = settings(resume=True, steps=2)
    Path(s.out).mkdir()
    Path(s.out, ".lock").touch()
    train.run(s)
    expected = losses(s.out)
    (RunDir(s.out).checkpoint_path("f32")).unlink()
    RunDir(s.out).summary_path.unlink()
    train.run(s)
    assert losses(s.out) == expected


@pytest.mark.parametrize("exists", [True, False])
def test_resume_of_no_run_is_an_error(settings, exists):
    s = settings(resume=True)
    if exists:
        os.mkdir(s.out)
    with pytest.raises(UsageError, match=f"--resume: {s.out} holds no run"):
        train.run(s)
    assert os.path.exists(s.out) == exists and not (exists and os.listdir(s.out))


def test_a_run_is_not_overwritten_by_accident(settings):
    s = settings()
    train.run(s)
    before = losses(s.out)
    with pytest.raises(UsageError, match="holds a run already: --resume continues it"):
        train.run(settings(seed=1))
    assert losses(s.out) == before
    train.run(settings(seed=1, overwrite=True, steps=4))
    assert len(losses(s.out)) == 4
    assert losses(s.out)[0] != before[0]


def test_overwrite_keeps_what_is_not_ours(settings):
    s = settings(steps=1)
    train.run(s)
    note = Path(s.out, "f32", "note.txt")
    note.touch()
    train.run(settings(steps=1, recipe=("bf16",), overwrite=True))
    assert note.exists()
    assert not os.path.exists(f"{s.out}/f32/metrics.jsonl")


def test_a_foreign_folder_is_refused(settings, tmp_path):
    for extra in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="holds other files and no run"):
            train.run(settings(out=str(tmp_path), **extra))
    with pytest.raises(UsageError, match="is not a folder"):
        train.run(settings(out=str(tmp_path / "text.txt")))
    with pytest.raises(UsageError, match=r"text\.txt/run: Not a directory"):
        train.run(settings(out=str(tmp_path / "text.txt" / "run")))


def test_two_processes_do_not_share_a_folder(settings):
    s = settings()
    folder = RunDir(s.out)
    config = {"recipes": [], "data_sha256": "", "model": {}, "seed": 0}
    with folder.started(config), pytest.raises(UsageError, match="is in use by another"):
        train.run(settings(overwrite=True))
    train.run(settings(overwrite=True))


def test_resume_with_other_settings_names_them(settings, tmp_path):
    s = settings()
    train.run(s)
    with pytest.raises(UsageError) as error:
        train.run(settings(lr=0.5, seed=3, resume=True))
    assert str(error.value).endswith("was started with lr 0.001 (now 0.5), seed 0 (now 3)")
    other = tmp_path / "other.txt"
    other.write_bytes(b"other" * 100)
    with pytest.raises(UsageError, match="was started with data_sha256"):
        train.run(settings(data=(str(other),), resume=True))
    moved = tmp_path / "moved.txt"
    (tmp_path / "text.txt").rename(moved)
    train.run(settings(data=(str(moved),), resume=True, save_every=5))


def test_more_steps_on_resumption(settings, tmp_path):
    """At a rate that does not depend on their number, as if there had been more from the start."""
    recipes = {"recipe": ("f32", "coat"), "schedule": "constant", "warmup": 2}
    train.run(settings(**recipes, steps=10, out=str(tmp_path / "whole")))
    train.run(settings(**recipes, steps=6))
    train.run(settings(**recipes, steps=10, resume=True))
    for name in ("f32", "coat"):
        assert losses(settings().out, name) == losses(tmp_path / "whole", name)
    first, second = (json.loads(Path(out, "summary.json").read_text())["recipes"]["coat"]
                     for out in (tmp_path / "whole", settings().out))  # fmt: skip
    assert first["val_loss"] == second["val_loss"] and second["steps"] == 10
    assert train.run(settings(**recipes, steps=10, resume=True))["recipes"]["coat"] == second
    with pytest.raises(UsageError, match=r"was started with steps 10 \(now 6\)"):
        train.run(settings(**recipes, steps=6, resume=True))
    train.run(settings(**recipes | {"warmup": None}, steps=50, resume=True))  # its share of them
    assert len(losses(settings().out)) == 50


def test_a_damaged_checkpoint_is_refused_and_the_run_kept(settings):
    s = settings()
    train.run(s)
    os.remove(f"{s.out}/summary.json")
    path = RunDir(s.out).checkpoint_path("f32")
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    before = Path(s.out, "f32", "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="damaged: the checksum of"):
        train.run(settings(resume=True))
    assert Path(s.out, "f32", "metrics.jsonl").read_text() == before
    assert path.read_bytes() == data


def test_metrics_keep_the_lines_before_the_checkpoint(tmp_path):
    path = tmp_path / "m" / "metrics.jsonl"
    lines = [{"step": i, "loss": 0.1, "tokens_per_s": 2.0, "skipped": 0} for i in range(1, 4)]
    crcs = []
    with Metrics(path) as metrics:
        for line in lines:
            metrics.write(line)
            crcs.append(metrics.crc32)
    path.write_text(path.read_text() + '{"step": 4, "lo')  # a killed process
    with pytest.raises(UsageError, match="lacks steps before the checkpoint's step 4"):
        Metrics(path, 4, crcs[2])
    with pytest.raises(UsageError, match="damaged: the checksum of its 2 lines"):
        Metrics(path, 2, crcs[2])
    whole = path.read_text()
    path.write_text(whole.replace("0.1", "0.2", 1))
    with pytest.raises(UsageError, match="damaged"):
        Metrics(path, 2, crcs[1])
    path.write_text(whole)
    with Metrics(path, 2, crcs[1]) as metrics:
        metrics.write(lines[2])
    assert [json.loads(text) for text in path.read_text().splitlines()] == lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp8lm-o2"])
def test_a_killed_run_resumes_to_the_same_bits(settings, tmp_path, name):
    """kill -9 at random moments, in imports, steps and saves alike."""
    whole = settings(recipe=(name,), steps=60, out=str(tmp_path / "whole"))
    train.run(whole)
    s = settings(recipe=(name,), steps=60)
    command = [
        *(sys.executable, "-m", "quaver", "train", "--data", *s.data, "--model", s.model),
        *("--recipe", name, "--steps", "60", "--batch", "2", "--seq", "16", "--device", "cpu"),
        *("--out", s.out, "--save-every", "3"),
    ]
    draw = random.Random(0)
    kills = 0
    while kills < 3:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        command = [*command, "--resume"] if kills == 0 else command
        process.stdout.readline()  # the run has begun
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.communicate()
        kills += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert losses(s.out, name) == losses(whole.out, name)
