"""Every block of Python in the README and in docs/ runs, in the order of its page."""

import re
import socket
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import nn
from tuning import tokenizer, write_model

import quaver as qv
from quaver import models

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
TOKENS = torch.arange(24).repeat(8, 1) + torch.arange(8)[:, None]
# Too large here: test_plan.py has plans of real steps, test_tensor_parallel.py has ranks.
SMALLER = {
    "docs/memory.md": (('"7b"', '"tiny"'), ("24 * 10**9", "4 * 10**7")),
    "docs/tensor_parallel.md": (('"cuda"', '"cpu"'), ("(2, 4)", "(1, 1)")),
}
MODEL = [f"docs/{name}.md" for name in ("choose", "distributed", "export", "tensor_parallel")]


def pages():
    paths = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    return [str(path.relative_to(ROOT)) for path in paths if BLOCK.search(path.read_text())]


def loss_of(model, tokens=TOKENS):
    return model(tokens, labels=tokens).loss


def one_rank(monkeypatch):
    """What torchrun says to a lone rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "LOCAL_RANK": 0}
    for name, value in (names | {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}).items():
        monkeypatch.setenv(name, str(value))


# What a page takes from its reader, who has a folder of a model in any case.
def reader(page):
    names = {
        "torch": torch, "qv": qv, "loss_of": loss_of, "tokenizer": tokenizer(),
        "folder": "my-model", "data": [{"input_ids": row, "labels": row} for row in TOKENS],
    }  # fmt: skip
    if page == "README.md":
        batches = [(torch.randn(4, 64), torch.randn(4, 16))]
        names |= {"loss_function": nn.functional.mse_loss, "batches": batches}
        names["MyModel"] = lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
    if page == "docs/finetuning.md":
        names |= {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "labels": TOKENS}
        names |= {"batch": {"input_ids": TOKENS}, "prompt": {"input_ids": TOKENS[:1]}}
    if page in MODEL:
        names["model"] = transformers.AutoModelForCausalLM.from_pretrained("my-model")
    if page == "docs/distributed.md":
        names |= {"batches": [[TOKENS[:4], TOKENS[4:]]], "path": "checkpoint", "n": 1}
    if page == "docs/troubleshooting.md":
        names["model"] = model = qv.convert(models.build(models.PRESETS["tiny"]), "coat")
        names["optimizer"] = qv.AdamW(model.parameters(), recipe="coat")
        names["loss_of"] = lambda model: model(TOKENS[:1]).float().square().mean()
    return names


@pytest.mark.parametrize("page", pages())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    for large, small in SMALLER.get(page, ()):
        assert large in text
        text = text.replace(large, small)
    if "distributed.init(" in text:
        one_rank(monkeypatch)
    write_model("my-model", hidden_size=64, num_attention_heads=16, num_key_value_heads=16)
    names = reader(page)
    try:
        for block in BLOCK.finditer(text):
            AcceleratorState._reset_state(True)  # a process has one Accelerator's settings
            before = "\n" * text.count("\n", 0, block.start(1))  # errors name the page's line
            exec(compile(before + block.group(1), page, "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
