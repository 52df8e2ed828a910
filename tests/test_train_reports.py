"""What a run reports: metrics, TensorBoard, Weights & Biases, samples, the table and probes."""

import importlib.util
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import losses, read_metrics

import quaver as qv
from quaver import data, models, train
from quaver.errors import UsageError
from quaver.job import Job
from quaver.plot import memory_kinds
from quaver.probe import Probe
from quaver.progress import table
from quaver.rundir import RunDir


@pytest.mark.parametrize("name", ["bf16", "fp8lm-o2", "coat"])
def test_held_out_losses_on_the_way_change_nothing(settings, pictures, tmp_path, name, capsys):
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


def test_nan_is_counted_and_shown(settings, pictures, monkeypatch, capsys):
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
