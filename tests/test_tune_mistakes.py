"""`quaver tune`: mistakes are named in one line and write nothing."""

import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tuning
from test_cli import run
from tuning import flags, tokenizer, write_lines, write_model

base, paths = tuning.base, tuning.paths


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "qst,dora"}, "--method: unknown method 'dora'; there are qst, lora, full"),
    ({"method": "full", "lr": "qst=0.1"}, "--lr gives a rate to qst, which --method does not"),
    ({"lr": "fast"}, "argument --lr: wanted a number, or METHOD=RATE,..., got 'fast'"),
    ({"lr": 0}, "--lr must be a positive number, got 0"),
    ({"optimizer": "lion"}, "--optimizer: unknown optimizer 'lion'"),
    ({"recipe": "fp8lm-o2"}, "--recipe fp8lm-o2 keeps weights as scaled f16"),
    ({"method": "lora", "recipe": "coat"}, "too narrow for FP8"),
    ({"backbone": "int3"}, "--backbone must be one of nf4, fp8, keep, got int3"),
    ({"reduction": 8}, "qst: side_tune: reduction 8 does not divide the 4 attention heads"),
    ({"seq": 65}, "--seq 65 exceeds the model's context 64"),
    ({"held_out": 1}, "--held-out must be between 0 and 1"),
    ({"model": "nowhere"}, "--model nowhere: no such folder"),
    ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl: no such file"),
    ({"eval_data": "nowhere.jsonl"}, "--eval-data nowhere.jsonl: no such file"),
])  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(paths, capsys, changes, message):
    refused(flags(paths, **changes), paths, capsys, message)


def refused(command, paths, capsys, message):
    status, out, err = run(command, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("quaver tune: error: ") and err.count("\n") == 1, err
    assert message in err, err
    assert not (paths / "out").exists()


@pytest.mark.parametrize(("line", "message"), [
    ("{", ":2: no JSON"),
    ("[1]", ":2: the line must be an object, got a list"),
    ('{"text": "a"}', ":2: no field 'prompt' and no messages, among text; --prompt-field and"),
    ('{"prompt": "a"}', ":2: no field 'response'"),
    ('{"prompt": "a", "response": 4}', ":2: the line.response must be a text, got 4"),
    ('{"prompt": "a", "response": " "}', ":2: an answer is empty"),
    ('{"messages": [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "a"}]}',
     ":2: an answer is empty"),
    ('{"messages": [{"role": "user", "content": "a"}]}', ":2: 1 messages, the last of role 'user'"),
    ('{"messages": [{"role": "user"}]}', ":2: messages[0] lacks content"),
])  # fmt: skip
def test_a_wrong_line_is_named(paths, capsys, line, message):
    path = paths / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + f"\n{line}\n")
    refused(flags(paths), paths, capsys, f"{path}{message}")


def test_wrong_data_and_tokenizers_are_named(paths, capsys):
    (paths / "data.csv").write_text("a,b\n")
    (paths / "empty.jsonl").write_text("\n")
    table = pa.table({"prompt": ["a", "b"], "response": ["c", None]})
    pq.write_table(table, paths / "null.parquet")
    one = write_lines(paths / "one.jsonl", [{"prompt": "a", "response": "b"}])
    for data, message in (
        (paths / "data.csv", "data of unknown kind (.csv); wanted a .jsonl or .parquet file"),
        (paths, "data of unknown kind (folder)"),
        (paths / "null.parquet", "null.parquet:2: the line.response must be a text, got null"),
        (paths / "empty.jsonl", "no examples"),
        (one, "--data: one example; wanted one to train on and one held out"),
    ):
        refused(flags(paths, data=data), paths, capsys, message)
    coder = tokenizer(chat_template="{{ raise_exception('no such role') }}")
    folder = write_model(paths / "refuses", coder)
    refused(flags(paths, model=folder), paths, capsys,
            f"{paths / 'chat.jsonl'}:1: the chat template refuses it: no such role")  # fmt: skip
    folder = write_model(paths / "endless", tokenizer(eos_token=None))
    refused(flags(paths, model=folder), paths, capsys, "its tokenizer has no end token")
    folder = write_model(paths / "small", vocab_size=200)
    refused(flags(paths, model=folder), paths, capsys, "tokenizer has 258 tokens, its model 200")


def test_wrong_folders_are_named(paths, capsys):
    def broken(name, change):
        folder = write_model(paths / name)
        change(folder)
        return flags(paths, model=folder)

    def cut(folder):
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(1000)

    def lack(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def other(folder):
        (folder / "config.json").write_text('{"model_type": "vit"}')

    def no_tokenizer(folder):
        for path in folder.glob("*token*"):
            path.unlink()

    for name, change, message in (
        ("a", cut, "model.safetensors: cut short or damaged"),
        ("b", lack, "1 weights are missing, such as model.norm.weight"),
        ("c", other, "a vit model has no causal language-model head"),
        ("d", lambda folder: (folder / "model.safetensors").unlink(), "download the weights"),
        ("e", lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
        ("f", no_tokenizer, "the folder has no tokenizer"),
        ("g", lambda folder: (folder / "config.json").write_text("{"), "the config cannot be read"),
    ):
        refused(broken(name, change), paths, capsys, message)


def test_several_processes_are_refused(paths, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(flags(paths), paths, capsys, "tune is one process, 2 were started")


def test_missing_packages_are_named(paths, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(flags(paths, method="lora"), paths, capsys, "--method lora needs the package `peft`")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(flags(paths), paths, capsys, "needs the package `transformers`")


def test_a_run_is_not_mixed_with_another(paths, capsys):
    assert run(flags(paths, steps=3), capsys)[0] == 0
    for more, changes, message in (
        ((), {}, "holds a run already: --resume continues it, --overwrite replaces it"),
        (("--resume",), {"lr": 0.5}, "was started with lr.qst 0.02 (now 0.5)"),
        (("--resume",), {"method": "qst,full"}, 'methods ["qst"] (now ["qst", "full"])'),
        (("--resume",), {"adapter": 4}, "was started with adapter 8 (now 4)"),
    ):
        status, _, err = run([*flags(paths, steps=3, **changes), *more], capsys)
        assert status == 2 and message in err and err.count("\n") == 1
    other = write_model(paths / "other", hidden_size=64)
    status, _, err = run([*flags(paths, steps=3, model=other), "--resume"], capsys)
    assert status == 2 and "was started with model.sha256" in err
    (paths / "out" / "qst" / "note.txt").touch()
    assert run([*flags(paths, method="full", steps=2), "--overwrite"], capsys)[0] == 0
    assert os.listdir(paths / "out" / "qst") == ["note.txt"]
    train = ["train", "--steps", "2", "--out", str(paths / "out"), "--overwrite"]
    status, _, err = run(train, capsys)
    assert status == 2 and "holds other files and no run: config.json lacks recipes" in err
