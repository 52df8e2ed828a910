"""`quaver tune`: what its methods learn and keep, and resumption."""

import json
import signal
import subprocess
import sys

import pytest
import torch
import transformers
import tuning
from test_cli import run
from tuning import WORDS, flags, lines, tokenizer, write_lines, write_model

import quaver as qv
from quaver import tune
from quaver.hf.pretrained import quiet
from quaver.tune.job import Tuning

base, paths = tuning.base, tuning.paths

METHODS = ("qst", "lora", "full")


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """A model with dropout, which a generator draws."""
    return write_model(tmp_path_factory.mktemp("dropped") / "model", attention_dropout=0.1)


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def loaded(out, base, method):
    """The tuned model as a user loads it."""
    folder = out / method / "tuned"
    if method == "full":
        return plain(folder)
    if method == "lora":
        from peft import PeftModel

        return PeftModel.from_pretrained(plain(base), folder).eval()
    model = qv.side_tune(plain(base), reduction=2, adapter=8)
    model.load(folder)
    return model


def loss_of(model, text, coder):
    """Of a conversation's answer, in f32."""
    prompt = coder(f"user: {text[0]}\nassistant:").input_ids
    answer = [*coder(f" {text[1]}").input_ids, coder.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[*[-100] * len(prompt), *answer]])
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


def test_every_method_learns_and_its_result_loads(paths, base, pictures, capsys):
    """With a learning rate that suits each, 60 steps learn eight words by heart."""
    command = flags(paths, method="qst,lora,full", steps=60, recipe="f32", held_out=0.2)
    status, shown, err = run(command, capsys)
    assert (status, err) == (0, "")
    found = json.loads((paths / "out" / "summary.json").read_text())
    assert list(found["methods"]) == list(METHODS) and found["config"]["lr"]["full"] == 0.003
    for method, result in found["methods"].items():
        assert result["val_loss"] < 0.7 * found["untouched"], method
        assert f"{result['val_loss']:.4f}" in shown and f"{result['trained']:,}" in shown
        assert result["sample"]["prompt"].startswith("user: say")
        model = loaded(paths / "out", base, method)
        text = [(f"say {i}", word) for i, word in enumerate(WORDS)]
        before, after = (
            sum(loss_of(m, pair, tokenizer()) for pair in text) for m in (plain(base), model)
        )
        assert after < 0.7 * before, method
    sizes = {method: result["memory"] for method, result in found["methods"].items()}
    assert sizes["qst"]["activation"] < sizes["lora"]["activation"] < sizes["full"]["activation"]
    assert found["methods"]["full"]["trained"] == plain(base).num_parameters()
    assert tune.table(found["methods"], found["untouched"]) in shown
    for picture in ("loss.png", "memory.png"):
        assert (paths / "out" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_bits(paths, dropped, monkeypatch, capsys, method):
    """Killed in step 8: it continues from the save of step 5, with the generators of that step."""

    class KilledError(Exception):
        """The death of a process, which saves nothing."""

    changes = {"method": method, "model": dropped, "accumulate": 2, "steps": 10}
    assert run(flags(paths, out=paths / "whole", **changes), capsys)[0] == 0
    step = Tuning.step

    def die(self, number):
        if number == 8:
            raise KilledError
        return step(self, number)

    monkeypatch.setattr(Tuning, "step", die)
    with pytest.raises(KilledError):
        run(flags(paths, **changes), capsys)
    monkeypatch.undo()
    assert_resumes(paths, changes, capsys)


def assert_resumes(paths, changes, capsys):
    method = changes["method"]
    status, shown, _ = run([*flags(paths, **changes), "--resume"], capsys)
    assert status == 0 and f"{method} continues after step 5" in shown
    whole, again = (
        json.loads((paths / name / "summary.json").read_text())["methods"][method]
        for name in ("whole", "out")
    )
    assert lines(paths / "out", method) == lines(paths / "whole", method)
    for key in ("final_loss", "val_loss", "memory", "sample"):
        assert again[key] == whole[key]
    name = {"qst": "side", "lora": "adapter_model", "full": "model"}[method]
    a, b = (
        paths / folder / method / "tuned" / f"{name}.safetensors" for folder in ("out", "whole")
    )
    assert a.read_bytes() == b.read_bytes()


def test_a_process_killed_with_kill_9_resumes_to_the_same_bits(paths, capsys):
    changes = {"method": "qst", "steps": 10}
    assert run(flags(paths, out=paths / "whole", **changes), capsys)[0] == 0
    code = (
        "import os, signal, sys\n"
        "from quaver import cli\n"
        "from quaver.tune.job import Tuning\n"
        "step = Tuning.step\n"
        "def killed(self, n):\n"
        "    if n == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, n)\n"
        "Tuning.step = killed\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, *flags(paths, **changes)]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(lines(paths / "out", "qst")) == 7
    assert_resumes(paths, changes, capsys)


def test_a_checkpoint_holds_what_trains_alone(paths, capsys):
    assert run(flags(paths), capsys)[0] == 0
    from safetensors import safe_open

    with safe_open(paths / "out/qst/checkpoint/state.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
    assert names and all(name.startswith("model.side_network/") for name in names)


@pytest.mark.parametrize("changes", [
    {"optimizer": "adamw-4bit", "method": "qst,lora,full"},
    {"optimizer": "microadam", "method": "qst,full"},
    {"optimizer": "subset-norm", "method": "full", "dtype": "bfloat16"},
    {"optimizer": "snsm", "method": "qst"},
    {"optimizer": "grass", "method": "full"},
    {"recipe": "tensorwise", "method": "qst,full"},
    {"recipe": "coat", "method": "full"},
    {"backbone": "keep", "method": "lora,qst"},
    {"backbone": "fp8", "method": "lora,qst", "dtype": "bfloat16"},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*steps converted weights by")
def test_optimizers_recipes_and_backbones(paths, capsys, changes):
    status, _, err = run(flags(paths, steps=3, **changes), capsys)
    assert (status, err) == (0, "")
    for method in changes["method"].split(","):
        assert all(line["loss"] and not line["skipped"] for line in lines(paths / "out", method))


def test_gpt2_an_answer_at_the_end_of_its_context_and_a_probe(paths, capsys):
    """Its positions are a table, so that a sample must end where they do."""
    config = transformers.GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=257
    )
    with quiet():
        transformers.GPT2LMHeadModel(config).save_pretrained(paths / "gpt2")
    tokenizer().save_pretrained(paths / "gpt2")
    rows = [{"prompt": "a" * 42, "response": "b"} for _ in range(4)]
    write_lines(paths / "chat.jsonl", rows)
    changes = {"method": "qst,lora,full", "model": paths / "gpt2", "steps": 2, "seq": 64}
    status, _, err = run(flags(paths, probe=2, **changes), capsys)
    assert (status, err) == (0, "")
    assert all(len(lines(paths / "out", method)) == 2 for method in METHODS)


def test_a_folder_in_fp8_is_a_start(paths, base, capsys):
    """Its weights are decoded: what is tuned in full is a plain folder."""
    command = ["export", base, "--format", "fp8-tensor", "--out", paths / "fp8"]
    assert run(command, capsys)[0] == 0
    command = flags(paths, method="lora,full", steps=2, model=paths / "fp8")
    assert run(command, capsys)[::2] == (0, "")
    tuned = paths / "out" / "full" / "tuned"
    assert "quantization_config" not in json.loads((tuned / "config.json").read_text())
    assert plain(tuned).dtype == torch.bfloat16
