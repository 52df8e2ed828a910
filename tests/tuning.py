"""Folders, data and flags of small `quaver tune` runs."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quaver.hf.pretrained import quiet

RATES = "qst=0.02,lora=0.02,full=0.003"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


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
