"""`quaver tune`: methods, what of a conversation is trained on, resumption, mistakes by name."""

import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from test_cli import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import quaver as qv
from quaver import tune
from quaver.errors import UsageError
from quaver.hf.pretrained import quiet
from quaver.tune import chat
from quaver.tune.job import Tuning

METHODS = ("qst", "lora", "full")
RATES = "qst=0.02,lora=0.02,full=0.003"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(**more):
    """A token is a byte; two more begin and end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*letters, "<begin>", "<end>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    options = {"bos_token": "<begin>", "eos_token": "<end>"} | more
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)


def write_model(folder, coder=None, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }  # fmt: skip
    config = transformers.LlamaConfig(**sizes | changes)
    with quiet():
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (coder or tokenizer()).save_pretrained(folder)
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """A model with dropout, which a generator draws."""
    return write_model(tmp_path_factory.mktemp("dropped") / "model", attention_dropout=0.1)


@pytest.fixture
def paths(tmp_path, base):
    lines = [{"prompt": f"say {i % 8}", "response": WORDS[i % 8]} for i in range(40)]
    write_lines(tmp_path / "chat.jsonl", lines)
    (tmp_path / "model").symlink_to(base)
    return tmp_path


def flags(paths, *more, **changes):
    values = {
        "model": paths / "model", "data": paths / "chat.jsonl", "method": "qst", "lr": RATES,
        "steps": 12, "batch": 4, "seq": 48, "reduction": 2, "adapter": 8, "rank": 4,
        "save-every": 5, "device": "cpu", "out": paths / "out",
    } | {key.replace("_", "-"): value for key, value in changes.items()}  # fmt: skip
    if values["lr"] == RATES:
        values["lr"] = ",".join(r for r in RATES.split(",") if r[:3] in str(values["method"]))
    return ["tune", *(str(x) for key, value in values.items() for x in (f"--{key}", value)), *more]


def lines(out, name):
    text = (out / name / "metrics.jsonl").read_text()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_s"}
        for line in text.splitlines()
    ]


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


def test_every_method_learns_and_its_result_loads(paths, base, capsys):
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


# Conversations as tokens


def test_a_folder_in_fp8_is_a_start(paths, base, capsys):
    """Its weights are decoded: what is tuned in full is a plain folder."""
    command = ["export", base, "--format", "fp8-tensor", "--out", paths / "fp8"]
    assert run(command, capsys)[0] == 0
    command = flags(paths, method="lora,full", steps=2, model=paths / "fp8")
    assert run(command, capsys)[::2] == (0, "")
    tuned = paths / "out" / "full" / "tuned"
    assert "quantization_config" not in json.loads((tuned / "config.json").read_text())
    assert plain(tuned).dtype == torch.bfloat16


def examples(tmp_path, rows, coder=None, **changes):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    settings = tune.Settings(data=(str(path),), eval_data=(str(path),), **changes)
    return chat.load(settings, coder or tokenizer())


def pieces(example, coder):
    """The text of all, and of what is trained on."""
    taught = [label for label in example.labels if label != chat.IGNORED]
    return coder.decode(example.tokens), coder.decode(taught)


def test_the_answers_of_a_plain_layout(tmp_path):
    coder = tokenizer()
    turns = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    found = examples(tmp_path, [{"prompt": "2+2", "response": "4"}, {"messages": turns}])
    one, two = found.train
    assert pieces(one, coder) == ("user: 2+2\nassistant: 4<end>", " 4<end>")
    whole = "system: be brief\nuser: a\nassistant: b<end>user: c\nassistant: d<end>"
    assert pieces(two, coder) == (whole, " b<end> d<end>")
    assert coder.decode(two.tokens[: two.start]) == whole[: -len(" d<end>")]
    assert one.answers == 3


def test_the_answers_of_a_chat_template(tmp_path):
    coder = tokenizer(chat_template=TEMPLATE)
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]  # fmt: skip
    rows = [{"q": "2+2", "a": "4"}, {"messages": turns}]
    one, two = examples(tmp_path, rows, coder, prompt_field="q", response_field="a").train
    assert pieces(one, coder) == ("<user>2+2\n<assistant>4<end>\n", "4<end>")
    assert pieces(two, coder)[1] == "b<end>d<end>"
    # A template that has no end for an answer gets the tokenizer's.
    coder = tokenizer(chat_template=TEMPLATE.replace("<end>", ""))
    one, _ = examples(tmp_path, rows, coder, prompt_field="q", response_field="a").train
    assert pieces(one, coder) == ("<user>2+2\n<assistant>4\n<end>", "4\n<end>")
    # One that hides earlier answers: the last one is trained on, the others are counted.
    hides = TEMPLATE.replace("{{ m.content }}", "{% if m.role != 'assistant' or loop.last %}"
                             "{{ m.content }}{% endif %}")  # fmt: skip
    coder = tokenizer(chat_template=hides)
    found = examples(tmp_path, [{"messages": turns}], coder)
    assert pieces(found.train[0], coder)[1] == "d<end>"
    assert "2 earlier answers are no target" in str(found.notes)  # as data and as --eval-data


def test_long_examples_are_cut_or_left_out_and_counted(tmp_path):
    rows = [{"prompt": "a", "response": "b" * 99}, {"prompt": "a" * 99, "response": "b"},
            {"prompt": "a", "response": "b"}]  # fmt: skip
    found = examples(tmp_path, rows, seq=32)
    assert [len(example.tokens) for example in found.train] == [32, 21]
    assert str(found.notes) == (
        "2 examples longer than --seq were cut; 2 left out, since --seq ends before their answer"
    )
    with pytest.raises(UsageError, match="--seq 8 ends before the answer of every example"):
        examples(tmp_path, rows, seq=8)


def test_rows_of_parquet_are_lines_of_jsonl(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"say {i}"},
                          {"role": "assistant", "content": "yes"}]} for i in range(4)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    write_lines(tmp_path / "chat.jsonl", rows)
    one, other = (
        chat.load(tune.Settings(data=(str(tmp_path / name),), seq=48), tokenizer())
        for name in ("chat.parquet", "chat.jsonl")
    )
    assert one == other and len(one.train) == 3


def test_batches_are_epochs_that_depend_on_the_seed_alone(tmp_path):
    found = examples(tmp_path, [{"prompt": str(i), "response": "x"} for i in range(5)])
    order = found.batch(3, 0, 5)
    assert set(order) == set(found.train) and found.batch(3, 5, 5) != order
    assert found.batch(3, 2, 6)[:3] == order[2:] and found.batch(4, 0, 5) != order


def test_every_answers_token_counts_alike_over_micro_batches(paths):
    """The gradient of two micro-batches is that of one that holds them both."""

    def grads(batch, accumulate):
        settings = tune.Settings(
            model=str(paths / "model"), data=(str(paths / "chat.jsonl"),), method=("full",),
            batch=batch, accumulate=accumulate, seq=48, recipe="f32", device="cpu",
        )  # fmt: skip
        text = chat.load(settings, tokenizer())
        world = qv.distributed.World(torch.device("cpu"))
        job = Tuning(tune.Run(settings, tokenizer(), text, world), "full")
        loss = job._backward(1, None)
        return loss, {name: p.grad for name, p in job.model.named_parameters()}

    (loss, one), (other, two) = grads(4, 1), grads(2, 2)
    torch.testing.assert_close(loss, other)
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, atol=1e-6, rtol=1e-4)


# Mistakes


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
