"""Searches by plans, reports of memory from them, and `quaver plan`."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from test_cli import run

import quaver as qv
from quaver import models, recipe
from quaver.errors import UsageError
from quaver.planning.fit import tries
from quaver.planning.search import largest

SMALL = {"dim": 64, "layers": 1, "heads": 2, "kv_heads": 2, "ffn": 96}


def reported(name, make):
    model = qv.convert(models.build(models.Config(**SMALL)), name)
    optimizer = make(model)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    found = qv.memory_report(model, optimizer, batch=(1, 32))
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    return model, optimizer, found


@pytest.mark.parametrize("name", ["f32", "fp8lm-o2"])
def test_a_memory_report_of_a_batch_is_the_plans(name):
    model, optimizer, found = reported(name, lambda m: qv.AdamW(m.parameters(), recipe=name))
    plan = qv.plan(model, dataclasses.replace(recipe.get(name), autocast=None), seq=32)
    assert {key: plan[key] for key in found} == found
    # After a step, and with a tensor of tokens, it is the same.
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    model(tokens).sum().backward()
    optimizer.step()
    again = qv.memory_report(model, optimizer, batch=tokens)
    assert {key: plan[key] for key in again if "peak" not in key} == {
        key: value for key, value in again.items() if "peak" not in key
    }
    assert plan["peak"] - again["peak"] == 8  # its count of skipped steps exists already
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(m.parameters()),
        lambda m: torch.optim.SGD(m.parameters(), momentum=0.9),
        lambda m: qv.MicroAdam(m.parameters(), 1e-3),
        lambda m: qv.Grass(m, rank=8),
        lambda m: qv.AdamW(m.parameters(), recipe="snsm"),
    ],
)
def test_a_memory_report_takes_every_optimizer(make):
    _, _, found = reported("bf16", make)
    assert found["peak"] >= found["master"] + found["grad"] + found["peak_by_kind"]["states"]
    assert found["peak_by_kind"]["gradients"] > 0


def test_a_memory_report_of_released_gradients_has_none():
    model = models.build(models.load("tiny"))
    optimizer = qv.AdamW(model.parameters(), recipe="bf16")
    qv.release_gradients(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        found = qv.memory_report(model, optimizer, batch=(1, 32))
    plan = qv.plan(model, "bf16", seq=32, release=True)
    assert found["grad"] == 0
    assert {key: plan[key] for key in found} == found


@pytest.mark.parametrize(
    ("arguments", "batch", "text"),
    [
        (2, 3, "batch must be (sequences, tokens)"),
        (2, (1, 0), "batch must be (sequences, tokens)"),
        (1, (1, 8), "wants the optimizer too"),
    ],
)
def test_a_memory_report_names_what_is_wrong_with_a_batch(arguments, batch, text):
    model = models.build(models.load("tiny"))
    pair = (model, qv.AdamW(model.parameters(), recipe="bf16"))[:arguments]
    with pytest.raises(UsageError, match=re.escape(text)):
        qv.memory_report(*pair, batch=batch)


def test_the_largest_batch_is_the_last_that_fits():
    model, size = models.Config(**SMALL), 10**8
    plan = qv.plan(model, "coat", seq=64)
    batch = plan.largest_batch(size)
    assert qv.plan(model, "coat", seq=64, batch=batch)["peak"] <= size
    assert qv.plan(model, "coat", seq=64, batch=batch + 1)["peak"] > size
    assert plan.largest_batch(plan["peak"] - 1) == 0
    with pytest.raises(UsageError, match="wants bytes, got -1"):
        plan.largest_batch(-1)


@pytest.mark.parametrize("size", [10, 11, 12, 13, 99, 100, 101, 2_000, 12_345])
def test_the_search_for_a_batch_takes_few_plans(size):
    asked = []

    def peak(batch):  # convex, as the largest of sums is
        asked.append(batch)
        return max(10 + batch, 5 + 3 * batch, 7 * batch - 40)

    found = largest(peak, size)
    assert found == sum(peak(batch) <= size for batch in range(1, 3_000))
    assert len(asked) - 2_999 <= 12


def test_the_search_for_settings_ends_with_the_first_that_fit():
    model, size = models.Config(**SMALL), 650_000
    found = list(tries(model, size, seq=8))
    peaks = [plan["peak"] for plan in found]
    assert all(peak > size for peak in peaks[:-1]) and peaks[-1] <= size
    settings = found[-1]["settings"]
    keys = ("recipe", "optimizer", "release", "recompute")
    again = qv.plan(model, seq=8, **{key: settings[key] for key in keys})
    assert again["peak"] == peaks[-1]
    fixed = list(tries(model, 1, "fp8lm-o2", release=True, seq=8))
    assert {plan["settings"]["recipe"] for plan in fixed} == {"fp8lm-o2"}
    assert all(plan["settings"]["release"] for plan in fixed)


def test_messages_take_the_stated_time_of_a_link():
    plan = qv.plan("tiny", "bf16", seq=16, parallel="dp=2", link="pcie4")
    assert plan["communication_seconds"] == sum(plan["communication"].values()) / 32e9
    assert qv.plan("tiny", "bf16", seq=16)["communication_seconds"] is None


def test_a_plan_without_a_card_does_not_say_that_it_fits():
    plan = qv.plan("tiny", "bf16", seq=16)
    assert plan["fits"] is plan["gpu"] is None


# The command


def test_the_command_prints_the_peak_and_the_verdict(capsys):
    flags = ["plan", "--model", "tiny", "--recipe", "coat", "--seq", "32"]
    status, out, err = run([*flags, "--gpu", "4090"], capsys)
    assert (status, err) == (0, "")
    assert "tiny, 4,917,888 parameters, batch 1 x 32, bfloat16" in out
    assert "fits 4090 of 24 GB" in out
    for kind in ("weights", "gradients", "states", "activations", "rest", "peak"):
        assert kind in out


def test_the_command_searches_for_settings(tmp_path, capsys):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    flags = ["plan", "--model", str(path), "--seq", "8", "--fit"]
    status, out, err = run([*flags, "0.00065"], capsys)
    assert (status, err) == (0, "")
    assert "GB: --recipe bf16" in out
    status, out, err = run([*flags, "0.0001"], capsys)
    assert (status, err.count("\n")) == (2, 1)
    assert "nothing fits 0.0001 GB, the least is" in err


def test_the_command_draws_the_peak_by_kind(tmp_path, monkeypatch, capsys):
    flags = ["plan", "--model", "tiny", "--seq", "16", "--gpu", "t4", "--plot"]
    path = tmp_path / "plan.png"
    assert run([*flags, str(path)], capsys)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run([*flags, str(path)], capsys)
    assert (status, err) == (
        2,
        "quaver plan: error: --plot needs matplotlib: pip install quaver[train]\n",
    )


def test_a_plan_that_does_not_fit_ends_with_a_remedy(tmp_path, capsys):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({"dim": 8192, "heads": 8, "kv_heads": 8, "ffn": 65536, "layers": 1}))
    flags = ["plan", "--model", str(path), "--dtype", "f32", "--seq", "8", "--gpu", "t4"]
    status, out, err = run(flags, capsys)
    assert status == 2
    assert "does not fit t4 of 16 GB" in out
    assert err.count("\n") == 1
    assert "GB and t4 has 16: try" in err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model", "8b"], "unknown model '8b'"),
        (["--model", "tiny", "--gpu", "x"], "unknown GPU 'x'"),
        (["--model", "."], "has no config.json"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(["plan", *flags], capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text in err
