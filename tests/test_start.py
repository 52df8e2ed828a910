"""`quaver train --model FOLDER`: from a folder of transformers to one, and mistakes by name."""

import json
import signal
from pathlib import Path

import pytest
import torch
import transformers
from test_cli import run
from tuning import tokenizer, write_lines, write_model

import quaver as qv
from quaver import data, tokens, train
from quaver.hf.pretrained import quiet
from quaver.job import Job
from quaver.rundir import RunDir

SIDES = {"intermediate_size": 128, "hidden_size": 64}  # of an FP8 folder: no block is cut


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with dropout, which a generator draws, and documents beside it."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model", attention_dropout=0.1, **SIDES)
    rows = [{"text": f"say {i % 8} and {i % 7}", "n": i} for i in range(200)]
    write_lines(folder / "docs.jsonl", rows)
    return folder


def flags(base, out, *more, **changes):
    values = {
        "model": base / "model", "data": base / "docs.jsonl", "recipe": "f32", "steps": 10,
        "batch": 2, "seq": 24, "save-every": 3, "device": "cpu", "out": out, "lr": 3e-3,
    } | {key.replace("_", "-"): value for key, value in changes.items()}  # fmt: skip
    return ["train", *(str(x) for key, value in values.items() for x in (f"--{key}", value)), *more]


def losses(out, name):
    lines = (Path(out) / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("recipe", ["f32", "fp8lm-o2", "coat"])
def test_from_a_folder_to_a_folder(base, tmp_path, capsys, monkeypatch, recipe):
    """Trained, interrupted, resumed to the same bits, exported, and loaded by transformers."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(flags(base, whole, recipe=recipe), capsys)[0] == 0
    step = Job.step

    def stop_at_five(self, number):
        if number == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Job, "step", stop_at_five)
    assert run(flags(base, out, recipe=recipe), capsys)[0] == 130
    monkeypatch.undo()
    assert run(flags(base, out, "--resume", recipe=recipe), capsys)[0] == 0
    assert losses(out, recipe) == losses(whole, recipe)
    first, last = losses(out, recipe)[0], losses(out, recipe)[-1]
    assert last["val_loss"] < 0.9 * first["loss"]
    status, shown, _ = run(["export", out, "--out", tmp_path / "hf"], capsys)
    assert status == 0 and "bf16" in shown
    model = plain(tmp_path / "hf")
    coder = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert coder("say 3").input_ids == tokenizer()("say 3").input_ids
    assert coder.eos_token == "<end>"
    text = data.load([str(base / "docs.jsonl")], 24, tokens.load_coder("x", str(base / "model")))
    with torch.no_grad():
        found = [model(x, labels=x).loss.item() for x, _ in text.validation(8, 24)]
    # Shifted by one within the window instead of the token behind it, and weights in bf16.
    assert sum(found) / len(found) == pytest.approx(last["val_loss"], rel=0.03)


def test_step_one_is_the_folders_own_loss(base, tmp_path, capsys):
    assert run(flags(base, tmp_path / "run", steps=1, **{"eval-every": 1}), capsys)[0] == 0
    torch.manual_seed(0)
    model = plain(base / "model").train()
    text = data.load([str(base / "docs.jsonl")], 24, tokens.load_coder("x", str(base / "model")))
    inputs, targets = text.batch(0, 1, 2, 24)
    logits = model(inputs).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    # Dropout draws as many numbers, in the same order, after the same seed.
    assert losses(tmp_path / "run", "f32")[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_an_fp8_folder_is_a_start(base, tmp_path, capsys):
    with quiet():
        model = plain(base / "model")
    qv.export(model, tmp_path / "fp8", "fp8-tensor", tokenizer=tokenizer())
    command = flags(base, tmp_path / "run", model=tmp_path / "fp8", recipe="coat", steps=2)
    assert run(command, capsys)[0] == 0
    config = json.loads((tmp_path / "run" / "base" / "config.json").read_text())
    assert "quantization_config" not in config
    assert run(["export", tmp_path / "run", "--out", tmp_path / "out"], capsys)[0] == 0
    plain(tmp_path / "out")


def test_the_run_needs_its_folder_no_more(base, tmp_path, capsys):
    """A preset with a tokenizer's file too: base/ has the tokenizer."""
    tokenizer().backend_tokenizer.save(str(tmp_path / "t.json"))
    command = flags(base, tmp_path / "run", model="tiny", steps=1, tokenizer=tmp_path / "t.json",
                    **{"end-token": "<end>"})  # fmt: skip
    assert run(command, capsys)[0] == 0
    (tmp_path / "t.json").unlink()
    assert run(["export", tmp_path / "run", "--out", tmp_path / "out"], capsys)[0] == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<end>"
    assert plain(tmp_path / "out").config.vocab_size == 258
    settings = {"data": ("stdlib",), "steps": 1, "seq": 24, "batch": 1, "recipe": ("f32",)}
    train.run(train.Settings(**settings, out=str(tmp_path / "run"), overwrite=True))
    assert not RunDir(tmp_path / "run").base_path.exists()


def test_optimizers_take_the_folder(base, tmp_path, capsys):
    command = flags(base, tmp_path / "run", steps=1, optimizer="adamw,grass")
    assert run(command, capsys)[0] == 0


def refused(command, out, capsys, message):
    status, shown, err = run(command, capsys)
    assert (status, shown) == (2, "")
    assert err.startswith("quaver train: error: ") and err.count("\n") == 1, err
    assert message in err, err
    assert not out.exists()


def test_mistakes_are_one_line_and_write_nothing(base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    text = tmp_path / "text.txt"
    text.write_text("no end\n" * 50)
    endless = write_model(tmp_path / "endless", tokenizer(eos_token=None))
    for changes, message in (
        ({"model": "nowhere"}, "unknown model 'nowhere': give one of tiny"),
        ({"model": tmp_path / "empty"}, "the folder has no config.json"),
        ({"seq": 65}, "--seq 65 exceeds the model's context 64"),
        ({"data": tmp_path / "table.csv"}, "data of unknown kind (.csv)"),
        ({"text_field": "body"}, "no field 'body' among text, n; --text-field names"),
        ({"model": endless}, "the tokenizer has no end token, by which documents are joined"),
        ({"end_token": "</s>"}, "--end-token </s>: the tokenizer of --model"),
        ({"model": "tiny", "data": text, "end_token": "</s>"}, "--end-token is of a tokenizer"),
        ({"optimizer": "adamw,lion"}, "unknown optimizer 'lion'"),
    ):
        refused(flags(base, tmp_path / "run", **changes), tmp_path / "run", capsys, message)


def test_a_folder_that_lacks_files_is_named_before_weights_are_read(base, tmp_path, capsys):
    folder = tmp_path / "half"
    with quiet():
        plain(base / "model").save_pretrained(folder, max_shard_size="100KB")
    tokenizer().save_pretrained(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    for command in (flags(base, tmp_path / "run", model=folder),
                    ["tune", "--model", str(folder), "--data", "x.jsonl", "--seq", "24",
                     "--out", str(tmp_path / "run")]):  # fmt: skip
        status, _, err = run(command, capsys)
        assert status == 2 and err.count("\n") == 1
        assert f"{shards[-1].name} is missing: download it again" in err
        assert not (tmp_path / "run").exists()
    for path in folder.glob("*token*"):
        path.unlink()
    command = flags(base, tmp_path / "run", model=folder)
    refused(command, tmp_path / "run", capsys, "is missing")
