"""The loop: what a step computes, what a run writes, and that a stopped run loses nothing."""

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import quaver as qv
from quaver import data, models, recipe, train
from quaver.errors import UsageError
from quaver.job import Job, learning_rate
from quaver.metrics import Metrics
from quaver.plot import memory_kinds
from quaver.probe import Probe
from quaver.progress import table
from quaver.rundir import RunDir

MODEL = {"vocab": 256, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 48, "context": 64}


@pytest.fixture
def settings(tmp_path):
    """Settings of a run that takes a second."""
    text = tmp_path / "text.txt"
    text.write_bytes(random.Random(0).randbytes(200) * 50)
    model = tmp_path / "model.json"
    model.write_text(json.dumps(MODEL))

    def make(**changes):
        values = {
            "data": (str(text),),
            "model": str(model),
            "recipe": ("f32",),
            "steps": 8,
            "batch": 2,
            "seq": 16,
            "device": "cpu",
            "out": str(tmp_path / "run"),
            "save_every": 3,
        }
        return train.Settings(**(values | changes))

    return make


def read_metrics(out, name="f32"):
    return [json.loads(line) for line in Path(out, name, "metrics.jsonl").read_text().splitlines()]


def losses(out, name="f32"):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(out, name)]


FLAGS = {"betas": (0.8, 0.99), "weight_decay": 0.3, "clip": 0.05, "schedule": "linear"}


@pytest.mark.parametrize("flags", [{}, FLAGS, {"clip": 0.0}])
def test_a_run_equals_a_loop_in_plain_torch(settings, flags):
    s = settings(accumulate=2, **flags)
    train.run(s)
    torch.manual_seed(0)
    model = models.build(models.load(s.model))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    decays = {"params": matrices, "weight_decay": s.weight_decay}
    groups = [decays, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=s.betas)
    text = data.load(s.data, s.seq)
    for line in read_metrics(s.out):
        step = line["step"]
        parts = [text.batch(0, step, 2, 16, micro) for micro in range(2)]
        inputs, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = line["lr"]
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["lr"] == learning_rate(step, s)


def test_learning_rate_warms_up_and_falls_to_a_tenth(settings):
    s = settings(steps=100, warmup=10, lr=2.0)
    rates = [learning_rate(step, s) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert sorted(rates[9:], reverse=True) == rates[9:]
    assert rates[54] == pytest.approx(1.1)  # half of the way down
    assert rates[-1] == pytest.approx(0.2)
    line = [learning_rate(step, settings(steps=100, warmup=10, lr=2.0, schedule="linear"))
            for step in (5, 10, 55, 100)]  # fmt: skip
    assert line == pytest.approx([1.0, 2.0, 1.1, 0.2])
    flat = settings(steps=100, warmup=10, lr=2.0, schedule="constant")
    assert [learning_rate(step, flat) for step in (5, 11, 100)] == [1.0, 2.0, 2.0]
    # Rates do not depend on how a run is cut: step 1 of no warmup is on the cosine already.
    assert learning_rate(1, settings(steps=1, warmup=0, lr=2.0)) == pytest.approx(0.2)


def test_what_a_run_writes(settings, capsys):
    s = settings(recipe=("f32", "bf16"), steps=40)
    summary = train.run(s)
    assert json.loads(Path(s.out, "summary.json").read_text()) == summary
    assert list(summary["recipes"]) == ["f32", "bf16"]
    for name, result in summary["recipes"].items():
        lines = read_metrics(s.out, name)
        assert [line["step"] for line in lines] == list(range(1, 41))
        keys = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "skipped"}
        assert all(set(line) == keys for line in lines[:-1])
        assert lines[-1].keys() == keys | {"val_loss"}
        assert lines[-1]["val_loss"] == result["val_loss"]
        # 5 % of 40 steps.
        assert result["final_loss"] == pytest.approx((lines[38]["loss"] + lines[39]["loss"]) / 2)
        assert result["final_loss"] < lines[0]["loss"]
        speeds = sorted(line["tokens_per_s"] for line in lines)
        assert speeds[19] <= result["tokens_per_s"] <= speeds[20]
        assert result["steps"] == 40
        assert result["memory"]["bytes_per_param"]["state"] == 16
        assert result["memory"]["activation"] > 0
    for picture in ("loss.png", "memory.png"):
        assert Path(s.out, picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    shown = capsys.readouterr().out
    assert "bf16  step 40/40  held-out" in shown
    assert table(summary["recipes"]) in shown
    sample = summary["recipes"]["bf16"]["sample"]
    assert f"prompt  {' '.join(sample['prompt'].split())}\n" in shown
    held_out = data.load(s.data, s.seq).held_out[:16].tolist()
    decoded = bytes(held_out[:8]).decode(errors="replace")
    assert (sample["prompt"], len(sample["answer"]) > 0) == (decoded, True)


def test_recipes_start_alike_and_see_the_same_batches(settings):
    s = settings(recipe=("f32", "bf16"), steps=2)
    train.run(s)
    assert losses(s.out)[0][1] == pytest.approx(losses(s.out, "bf16")[0][1], abs=2e-3)


def test_the_validation_loss_is_that_of_the_held_out_tail(settings):
    s = settings(steps=2)
    result = train.run(s)["recipes"]["f32"]
    model = models.build(models.load(s.model))
    checkpoint = RunDir(s.out).checkpoint_path("f32")
    qv.load(checkpoint, model)
    pairs = list(data.load(s.data, s.seq).validation(1, s.seq))
    with torch.no_grad():
        each = [F.cross_entropy(model(x)[0], y[0]).item() for x, y in pairs]
    assert result["val_loss"] == pytest.approx(sum(each) / len(each), rel=1e-5)


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


@pytest.mark.parametrize("name", ["bf16", "fp8lm-o2", "coat"])
def test_held_out_losses_on_the_way_change_nothing(settings, tmp_path, name, capsys):
    train.run(settings(recipe=(name,), eval_every=0, out=str(tmp_path / "without")))
    train.run(settings(recipe=(name,), eval_every=3))
    assert losses(settings().out, name) == losses(tmp_path / "without", name)
    found = {line["step"]: line["val_loss"] for line in read_metrics(settings().out, name)
             if "val_loss" in line}  # fmt: skip
    assert list(found) == [3, 6, 8]
    assert found[8] == read_metrics(tmp_path / "without", name)[-1]["val_loss"]
    assert f"step 6/8  held-out {found[6]:.4f}  loss" in capsys.readouterr().out
    s = settings(recipe=(name,), steps=6, out=str(tmp_path / "shorter"), warmup=0)
    train.run(s)  # the step of the same number, at another rate
    assert read_metrics(s.out, name)[-1]["val_loss"] != found[6]


@pytest.mark.parametrize("missing", ["matplotlib", "tqdm"])
def test_a_run_without_its_packages_names_the_extra(missing, settings, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else found(n))
    s = settings()
    with pytest.raises(UsageError, match=rf"train needs {missing}: pip install quaver\[train\]"):
        train.run(s)
    assert not Path(s.out).exists()


def test_tensorboard_has_the_held_out_loss(settings):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the package tensorboard is not installed",
    )
    s = settings(eval_every=4, tensorboard=True)
    train.run(s)
    logs = accumulator.EventAccumulator(str(RunDir(s.out).tensorboard_path("f32")))
    logs.Reload()
    found = [(event.step, event.value) for event in logs.Scalars("val_loss")]
    lines = [line for line in read_metrics(s.out) if "val_loss" in line]
    assert [step for step, _ in found] == [line["step"] for line in lines] == [4, 8]
    assert [value for _, value in found] == pytest.approx([line["val_loss"] for line in lines])


def test_the_sample_is_the_models_likeliest_text(settings):
    s = settings(steps=40, lr=3e-3, recipe=("coat",))
    sample = train.run(s)["recipes"]["coat"]["sample"]
    model = qv.convert(models.build(models.load(s.model)), "coat").eval()
    qv.load(RunDir(s.out).checkpoint_path("coat"), model)
    row = data.load(s.data, s.seq).held_out[:8].long().tolist()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(8):  # of the length so far: what lies behind a token changes nothing
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    assert sample["answer"] == bytes(row[8:]).decode(errors="replace")


class FakeRuns:
    """wandb as far as a run is logged."""

    def __init__(self):
        self.made = []

    def init(self, **options):
        if options["project"] == "private":
            raise RuntimeError("api_key not configured\nmore")
        self.made.append(SimpleNamespace(options=options, lines=[], done=False))
        return self

    def log(self, values, step):
        self.made[-1].lines.append((step, values))

    def finish(self):
        self.made[-1].done = True


def test_weights_and_biases(settings, monkeypatch):
    runs = FakeRuns()
    monkeypatch.setitem(sys.modules, "wandb", runs)
    s = settings(eval_every=4, wandb="mine", recipe=("f32", "bf16"))
    train.run(s)
    assert [run.options["name"] for run in runs.made] == ["run/f32", "run/bf16"]
    assert runs.made[0].options["config"]["steps"] == 8 and all(run.done for run in runs.made)
    lines = read_metrics(s.out)
    for key in ("loss", "val_loss"):
        found = [(step, values[key]) for step, values in runs.made[0].lines if key in values]
        assert found == [(line["step"], line[key]) for line in lines if key in line]
    with pytest.raises(UsageError, match=r"--wandb private: api_key not configured$"):
        train.run(settings(wandb="private", overwrite=True))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--wandb needs the package `wandb`: pip install wandb"):
        train.run(settings(wandb="mine", out="no"))
    assert not os.path.exists("no")


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


def test_nan_is_counted_and_shown(settings, monkeypatch, capsys):
    loss = Job._loss

    def bad_at_three(self, inputs, targets):
        bad = torch.equal(inputs, self._batch(3, 0)[0])
        return loss(self, inputs, targets) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(Job, "_loss", bad_at_three)
    s = settings(recipe=("bf16",))
    result = train.run(s)["recipes"]["bf16"]
    lines = read_metrics(s.out, "bf16")
    assert [line["loss"] is None for line in lines] == [False, False, True] + [False] * 5
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 6
    assert result["nonfinite_losses"] == result["skipped"] == 1
    assert "skipped 1" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"save_every": 0}, "--save-every must be at least 1"),
        ({"lr": float("nan")}, "--lr must be a positive number, got nan"),
        ({"warmup": 8}, "--warmup must be 0 to 7, got 8"),
        ({"probe": -1}, "--probe must be at least 0, got -1"),
        ({"watch": -1}, "--watch must be at least 0, got -1"),
        ({"watch": 2, "parallel": "tp=2"}, "--watch moves no layers that --parallel tp=2 splits"),
        ({"eval_every": -1}, "--eval-every must be at least 0, got -1"),
        ({"schedule": "step"}, "--schedule must be one of cosine, linear, constant, got 'step'"),
        ({"weight_decay": -0.1}, "--weight-decay must be a number of at least 0, got -0.1"),
        ({"clip": float("inf")}, "--clip must be a number of at least 0, got inf"),
        ({"betas": (0.9, 1.0)}, "--betas must be two numbers of 0 to below 1, got 0.9 1.0"),
        ({"recipe": ("f32", "f32")}, "--recipe names one twice: f32,f32"),
        ({"recipe": ()}, "--recipe names none"),
        ({"recipe": ("fp9",)}, "fp9"),
        ({"seq": 65}, "--seq 65 exceeds the model's context 64"),
        ({"data": ("/no/such",)}, "--data /no/such: no such file or folder"),
        ({"model": "huge"}, "unknown model 'huge'"),
    ],
)
def test_bad_settings_are_named_and_write_nothing(settings, changes, message):
    with pytest.raises(UsageError) as error:
        train.run(settings(**changes))
    assert message in str(error.value)
    assert not os.path.exists(settings().out)


def test_a_vocabulary_below_that_of_the_data(settings, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL | {"vocab": 100}))
    with pytest.raises(UsageError, match="vocab 100, the data needs 256"):
        train.run(settings())


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


def test_the_table_and_the_picture_add_up(settings):
    results = train.run(settings(recipe=("bf16", "fp8lm-o2", "coat"), steps=2))["recipes"]
    for result in results.values():
        kinds = memory_kinds(result["memory"])
        assert sum(kinds.values()) == result["memory"]["total"]
        assert {"saved: norm", "saved: mlp", "saved: attention", "master"} <= kinds.keys()
    rows = {line.split()[0]: line for line in table(results).splitlines() if line}
    less = results["bf16"]["memory"]["total"] / results["coat"]["memory"]["total"]
    assert rows["coat"].endswith(f" {less:.2f}") and less > 1
    saved = [results[name]["memory"]["activation"] for name in ("coat", "fp8lm-o2", "bf16")]
    assert saved == sorted(saved)


def test_what_was_converted_is_said(settings, capsys):
    train.run(settings(recipe=("coat",), steps=1))
    shown = capsys.readouterr().out
    assert "coat converted 4 linear, 2 norm, 1 mlp" in shown
    assert "left lm_head: it is skipped" in shown


@pytest.mark.parametrize("name", ["bf16", "fp8lm-o2", "blockwise", "coat", "coat-blockwise"])
def test_a_probe_measures_and_changes_nothing(settings, tmp_path, name):
    s = settings(recipe=(name,), steps=20, accumulate=2, out=str(tmp_path / "without"))
    train.run(s)
    probed = settings(recipe=(name,), steps=20, accumulate=2, out=str(tmp_path / "with"), probe=2)
    train.run(probed)
    assert losses(s.out, name) == losses(probed.out, name)
    lines = read_metrics(probed.out, name)
    assert ["probe" in line for line in lines] == [step % 2 == 0 for step in range(1, 21)]
    found = lines[-1]["probe"]
    if name == "bf16":
        assert found == {}
        return
    suffixes = [".input", ".grad_output"]
    suffixes += [] if name == "blockwise" else [".exp_avg", ".exp_avg_sq"]  # its moments are f32
    if name == "fp8lm-o2":  # others have plain gradients
        suffixes.append(".weight.grad")
    for suffix in suffixes:
        assert any(key.endswith(suffix) for key in found), suffix
    for key, figures in found.items():
        assert 0 <= figures["zeros"] <= 1 and 0 <= figures["saturated"] <= 1, key
        if figures["snr_db"] is not None:
            # 3 or 2 bits of mantissa leave about 31.5 or 25.5 dB; moments were rounded once more.
            assert 15 < figures["snr_db"] < 80, (key, figures)
    if name.startswith("coat"):
        assert {"blocks.0.norm1.output", "blocks.0.norm2.saved", "blocks.0.mlp.product",
                "blocks.0.mlp.saved_gate", "blocks.0.mlp.saved_up"} <= found.keys()  # fmt: skip
        for key, figures in found.items():
            assert ("k" in figures) == key.endswith((".exp_avg", ".exp_avg_sq")), key
            k = figures.get("k", {"min": 1, "mean": 1, "max": 1})
            assert 1 <= k["min"] <= k["mean"] <= k["max"] < 16, key  # codec.h's limits


def test_a_probe_figures_are_those_of_the_codes():
    torch.manual_seed(0)
    model = qv.convert(torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)), "tensorwise")
    optimizer = qv.AdamW(model.parameters(), recipe="tensorwise")
    x = torch.randn(64, 64)
    x[:, :16] = 0
    x[0, 20] = 448.0
    probe = Probe(model, optimizer)
    with probe.watching():
        model(x).sum().backward()
    probe.before_update()
    optimizer.step()
    found = probe.after_update()["0.input"]
    q = qv.quantize(x)
    error = (x - q.dequantize()).double().square().sum()
    snr = 10 * math.log10(x.double().square().sum() / error)
    assert found["snr_db"] == pytest.approx(snr)
    assert found["zeros"] == (q.qdata.float() == 0).float().mean().item()
    assert found["saturated"] == 1 / x.numel()
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_probes_may_differ_on_resumption(settings):
    s = settings(recipe=("coat",), steps=4, probe=2)
    train.run(s)
    again = settings(recipe=("coat",), steps=4, probe=1, resume=True)
    assert train.run(again)["recipes"]["coat"]["steps"] == 4
