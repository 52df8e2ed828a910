"""`quaver train --optimizer`: every optimizer by name, compared on the same batches, resumed."""

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_runs import start
from test_cli import run
from torch import nn

import quaver as qv
from quaver import data, models, optimizers, recipe, train
from quaver.distributed import World
from quaver.errors import UsageError
from quaver.job import Job, Run
from quaver.progress import table
from quaver.rundir import RunDir

MODEL = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "ffn": 48, "context": 64}
NAMES = optimizers.names()


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "text.txt").write_bytes(random.Random(0).randbytes(200) * 50)
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return tmp_path


def flags(paths, *more, **changes):
    values = {
        "data": paths / "text.txt",
        "model": paths / "model.json",
        "steps": 12,
        "batch": 2,
        "seq": 16,
        "device": "cpu",
        "save-every": 3,
        "out": paths / "out",
    }
    values |= changes
    return ["train", *(str(x) for key, value in values.items() for x in (f"--{key}", value)), *more]


def lines(out, name):
    """What each step of a training had, without its speed."""
    text = Path(out, name, "metrics.jsonl").read_text()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_s"}
        for line in text.splitlines()
    ]


def summary(out):
    return json.loads(Path(out, "summary.json").read_text())


def test_the_names_are_those_of_the_recipes_and_the_two_others():
    assert ["adamw", *recipe.step_names(), "microadam", "grass"] == NAMES
    assert {"subset-norm", "snsm"} <= set(NAMES)
    assert optimizers.rate("subset-norm") == optimizers.rate("snsm") == 10
    assert optimizers.rate("adamw") == optimizers.rate("microadam") == optimizers.rate("grass") == 1


def test_all_train_on_the_same_batches(paths, pictures, capsys):
    status, shown, err = run(flags(paths, optimizer="all"), capsys)
    assert (status, err) == (0, "")
    found = summary(paths / "out")
    assert list(found["recipes"]) == [f"bf16+{name}" for name in NAMES]
    assert found["config"]["optimizers"] == NAMES
    first = {lines(paths / "out", f"bf16+{name}")[0]["loss"] for name in NAMES}
    assert len(first) == 1  # the same weights and the same batch
    for name in NAMES:
        steps = lines(paths / "out", f"bf16+{name}")
        assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["skipped"] == 0
        assert max(line["lr"] for line in steps) <= 1e-3 * optimizers.rate(name)
        assert f"bf16+{name}  step 12/12  held-out" in shown
    assert table(found["recipes"]) in shown
    for picture in ("loss.png", "memory.png"):
        assert (paths / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_adamw_is_what_a_run_without_the_flag_trains(paths, capsys):
    assert run(flags(paths, optimizer="adamw"), capsys)[0] == 0
    assert run(flags(paths, recipe="bf16", out=paths / "plain"), capsys)[0] == 0
    assert lines(paths / "out", "bf16+adamw") == lines(paths / "plain", "bf16")
    assert summary(paths / "plain")["config"]["lr"] == 1e-3
    assert "optimizers" not in summary(paths / "plain")["config"]


def test_the_table(paths, capsys):
    status, shown, _ = run(flags(paths, optimizer="snsm,adamw,grass", steps=5), capsys)
    assert status == 0
    results = summary(paths / "out")["recipes"]
    head, _, *rows = shown[shown.rindex("recipe ") :].splitlines()
    assert "vs bf16+adamw" in head  # the baseline, wherever it was named
    cells = {row.split()[0]: row.split() for row in rows[:3]}
    for name, result in results.items():
        per = result["memory"]["bytes_per_param"]
        assert f"{result['val_loss']:.4f}" in cells[name]
        assert f"{per['state']:.2f}" in cells[name]
        assert f"{per['exp_avg'] + per['exp_avg_sq']:.2f}" in cells[name]
        assert f"{result['tokens_per_s']:,.0f}" in cells[name]
        assert f"{result['memory']['total'] / 2**20:.1f}" in cells[name]
    states = {
        name: result["memory"]["bytes_per_param"]["exp_avg"]
        + result["memory"]["bytes_per_param"]["exp_avg_sq"]
        for name, result in results.items()
    }
    assert states["bf16+adamw"] == 8
    assert states["bf16+snsm"] < 4 and states["bf16+grass"] < 4
    assert "states: the optimizer's part of B/param." in shown
    assert "states:" not in table({"bf16": results["bf16+adamw"]})


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_resumes_to_the_same_bits(paths, monkeypatch, name):
    """Killed in step 8: it continues from the save of step 6."""

    def settings(**changes):
        values = {
            "data": (str(paths / "text.txt"),), "model": str(paths / "model.json"),
            "optimizer": (name,), "steps": 12, "batch": 2, "seq": 16, "device": "cpu",
            "save_every": 3, "out": str(paths / "out"),
        }  # fmt: skip
        return train.Settings(**(values | changes))

    whole = train.run(settings(out=str(paths / "whole")))
    step, save = Job.step, Job._save

    class KilledError(Exception):
        """The death of a process, which saves nothing."""

    def die_after_seven(self, number):
        if number == 8:
            raise KilledError
        return step(self, number)

    monkeypatch.setattr(Job, "step", die_after_seven)
    with pytest.raises(KilledError):
        train.run(settings())
    monkeypatch.undo()
    saves = []

    def note(self, number, metrics):
        saves.append(number)
        save(self, number, metrics)

    monkeypatch.setattr(Job, "_save", note)
    again = train.run(settings(resume=True))
    assert saves == [9, 12]  # from the save of step 6 on
    label = f"bf16+{name}"
    assert lines(paths / "out", label) == lines(paths / "whole", label)
    for key in ("final_loss", "val_loss", "memory"):
        assert again["recipes"][label][key] == whole["recipes"][label][key]
    files = [RunDir(paths / folder).checkpoint_path(label) for folder in ("out", "whole")]
    models_ = []
    for file in files:
        model = models.build(models.load(str(paths / "model.json")))
        qv.load(file, model)
        models_.append(model)
    for a, b in zip(*(m.parameters() for m in models_), strict=True):
        assert torch.equal(a, b)


def test_a_signal_stops_one_of_two_and_resume_goes_on(paths, capsys, monkeypatch):
    step = Job.step

    def stop_at_five(self, number):
        if number == 5 and self.chosen == "microadam":
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    command = flags(paths, optimizer="adamw,microadam")
    monkeypatch.setattr(Job, "step", stop_at_five)
    assert run(command, capsys)[0] == 130
    monkeypatch.undo()
    assert len(lines(paths / "out", "bf16+microadam")) == 5
    stamp = os.stat(RunDir(paths / "out").checkpoint_path("bf16+adamw")).st_mtime_ns
    status, shown, _ = run([*command, "--resume"], capsys)
    assert status == 0 and "bf16+microadam continues after step 5" in shown
    assert os.stat(RunDir(paths / "out").checkpoint_path("bf16+adamw")).st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw,lion"},
         f"--optimizer: unknown optimizer 'lion'; there are {', '.join(NAMES)}"),
        ({"optimizer": ""}, "--optimizer names none"),
        ({"optimizer": "snsm,snsm"}, "--optimizer names one twice: snsm,snsm"),
        ({"optimizer": "adamw", "lr": -1}, "--lr must be a positive number, got -1"),
        ({"optimizer": "adamw,grass", "recipe": "bf16,fp8lm-o2"},
         "--optimizer grass with --recipe fp8lm-o2: Grass: rows of an f16 master (fp8lm-*) cannot"),
        ({"optimizer": "adamw,snsm", "recipe": "fp8lm-o2"},
         "--optimizer snsm with --recipe fp8lm-o2: AdamW: recipe snsm is for plain parameters"),
        ({"optimizer": "microadam", "recipe": "fp8lm-o1"},
         "--optimizer microadam with --recipe fp8lm-o1: MicroAdam: wanted plain parameters"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(paths, capsys, changes, message):
    status, out, err = run(flags(paths, **changes), capsys)
    assert (status, out) == (2, "")
    assert err.startswith("quaver train: error: ") and err.count("\n") == 1
    assert message in err
    assert not (paths / "out").exists()


def test_resume_with_another_optimizer_or_rate_is_refused(paths, capsys):
    assert run(flags(paths, optimizer="adamw", steps=3), capsys)[0] == 0
    for changes, message in (
        ({"optimizer": "snsm"}, 'optimizers ["adamw"] (now ["snsm"])'),
        ({"optimizer": "adamw", "lr": 0.5}, "was started with lr.adamw 0.001 (now 0.5)"),
        ({"recipe": "bf16"}, 'optimizers ["adamw"] (now null)'),
    ):
        status, _, err = run([*flags(paths, steps=3, **changes), "--resume"], capsys)
        assert status == 2 and message in err and err.count("\n") == 1
    # A checkpoint that was moved to another optimizer's folder.
    both = flags(paths, optimizer="adamw,microadam", steps=3, out=paths / "both")
    assert run(both, capsys)[0] == 0
    folder = RunDir(paths / "both")
    os.replace(folder.checkpoint_path("bf16+adamw"), folder.checkpoint_path("bf16+microadam"))
    folder.summary_path.unlink()
    status, _, err = run([*both, "--resume"], capsys)
    assert status == 2 and "bf16+microadam" in err and err.count("\n") == 1


def test_overwrite_removes_the_folders_of_optimizers(paths, capsys):
    assert run(flags(paths, optimizer="adamw,grass", steps=2), capsys)[0] == 0
    (paths / "out" / "bf16+grass" / "note.txt").touch()
    assert run([*flags(paths, recipe="f32", steps=2), "--overwrite"], capsys)[0] == 0
    assert not (paths / "out" / "bf16+adamw").exists()
    assert os.listdir(paths / "out" / "bf16+grass") == ["note.txt"]


@pytest.mark.filterwarnings("ignore:.*steps converted weights by")  # as was asked for
def test_the_product_of_recipes_and_optimizers(paths, capsys):
    command = flags(paths, recipe="f32,coat", optimizer="adamw,microadam", steps=2, lr=3e-3)
    assert run(command, capsys)[0] == 0
    found = summary(paths / "out")
    names = ["f32+adamw", "f32+microadam", "coat+adamw", "coat+microadam"]
    assert list(found["recipes"]) == names
    assert found["config"]["lr"] == {"adamw": 3e-3, "microadam": 3e-3}
    states = {n: r["memory"]["bytes_per_param"] for n, r in found["recipes"].items()}
    assert states["coat+adamw"]["exp_avg"] == 4 and states["coat+adamw"]["master"] == 2


@pytest.fixture
def made(paths):
    """The model and optimizer of a name, as a run builds them."""
    text = data.load((str(paths / "text.txt"),), 16)
    config = models.load(str(paths / "model.json"))

    def make(name, **changes):
        settings = train.Settings(model=str(paths / "model.json"), batch=2, seq=16,
                                  optimizer=(name,), **changes)  # fmt: skip
        return Job(Run(settings, config, text, World(torch.device("cpu"))), "bf16", name)

    return make


def test_embeddings_keep_adam_and_ranks_are_a_quarter_of_the_width(made):
    job = made("snsm")
    job.step(1)
    embedding = job.model.embed.weight
    assert job.optimizer.state[embedding]["exp_avg"].shape == embedding.shape
    linear = next(m for m in job.model.modules() if isinstance(m, nn.Linear))
    assert job.optimizer.recipe.exp_avg == replace(qv.optim.Subspace(), rank=8)
    assert 8 in job.optimizer.state[linear.weight]["exp_avg"].shape
    grass = made("grass").optimizer
    assert grass.rank == 8


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(made, name):
    job = made(name)
    groups = job.optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    assert len(params) == len(set(params)) and set(params) == set(job.model.parameters())
    for group in groups:
        vectors = {p.dim() < 2 for p in group["params"]}
        assert len(vectors) == 1
        decay = 0.0 if vectors.pop() else 0.1
        # lr x weight_decay is AdamW's at the default rates.
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3 * decay)


@pytest.mark.parametrize(
    ("name", "message"),
    [("microadam", "wanted dp=N, got zero=N"), ("grass", "wanted dp=N, got zero=N")],
)
def test_an_optimizer_that_is_not_spread_over_ranks_says_so(made, name, message):
    with pytest.raises(UsageError, match=f"--optimizer {name} with --recipe bf16.*{message}"):
        made(name, parallel="zero=2")


def test_ranks_train_by_several_what_one_process_trains(paths, capsys):
    several = "snsm,microadam,grass"
    assert run(flags(paths, optimizer=several, steps=6, out=paths / "one"), capsys)[0] == 0
    command = flags(paths, optimizer=several, steps=6, parallel="dp=2")
    for status, text, _ in start(2, [str(part) for part in command]).results():
        assert status == 0, text
    for label, one in summary(paths / "one")["recipes"].items():
        many = summary(paths / "out")["recipes"][label]
        assert many["val_loss"] == pytest.approx(one["val_loss"], rel=2e-3)


@pytest.mark.parametrize(
    ("optimizer", "parallel", "message"),
    [
        ("adamw,snsm", "fsdp=2", "AdamW: recipe snsm keeps exp_avg as a projected moment"),
        ("adamw,grass", "tp=2", "Grass: no linear layer of the model holds a whole weight"),
        ("adamw,microadam", "tp=2", "MicroAdam: wanted whole parameters, got a shard"),
    ],
)
def test_ranks_refuse_by_name_before_the_first_step(paths, optimizer, parallel, message):
    command = flags(paths, optimizer=optimizer, parallel=parallel)
    found = start(2, [str(part) for part in command]).results()
    assert [status for status, *_ in found] == [2, 2]
    name = optimizer.split(",")[1]
    text = "".join(text for _, text, _ in found)
    assert f"--optimizer {name} with --recipe bf16, --parallel {parallel}: {message}" in text
    assert not (paths / "out").exists()
