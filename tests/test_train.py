"""The loop: what a step computes, what a run writes, and what it refuses."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import MODEL, losses, read_metrics

import quaver as qv
from quaver import data, models, train
from quaver.errors import UsageError
from quaver.job import learning_rate
from quaver.progress import table
from quaver.rundir import RunDir

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


def test_what_a_run_writes(settings, pictures, capsys):
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
