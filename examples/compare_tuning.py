"""A small Llama is trained on Python code, then tuned on the language's manual by three methods:
every weight, LoRA and side tuning, on the same batches. The table compares what trains, the loss,
the speed and the bytes.

python examples/compare_tuning.py --steps 300 --out runs/compare-tuning

Everything is made here and runs without a network: a tokenizer whose tokens are bytes, the model,
and both texts from Python's standard library.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from quaver import tune
from quaver.documents import Notes, documents

PROMPT, ANSWER = 64, 160  # bytes of a piece of code
PIECES = 5_000
RATES = {"full": 1e-3, "lora": 5e-3, "qst": 1e-2}  # a small model takes large ones
# Of the side network; LoRA of this rank has as many parameters, within 4 %.
REDUCTION, ADAPTER, RANK = 4, 64, 10


def write_model(folder, width):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate([*letters, "<end>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=width * 43 // 16,
        num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=512,
        eos_token_id=vocabulary["<end>"], bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_lines(path, pairs):
    lines = [json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(lines) + "\n")


def code():
    """A piece of a file, and how it goes on."""
    text = b"\n".join(documents(["stdlib"], "text", Notes())).decode("utf-8", errors="ignore")
    size = PROMPT + ANSWER
    step = max(size, len(text) // PIECES)
    for start in range(0, len(text) - size, step):
        piece = text[start : start + size]
        if piece[PROMPT:].strip():
            yield piece[:PROMPT], piece[PROMPT:]


def manual():
    """A topic of the manual, and a paragraph on it."""
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            paragraph = " ".join(paragraph.split())
            if 40 <= len(paragraph) <= 240:
                yield f"the manual on {topic}", paragraph


def main(steps, out, width=128, overwrite=False):
    """Returns the summary of the second run."""
    logging.disable_progress_bar()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / "random", width)
    write_lines(out / "code.jsonl", code())
    write_lines(out / "manual.jsonl", manual())
    common = {"steps": steps, "batch": 4, "seq": 320, "recipe": "f32", "overwrite": overwrite}
    first = tune.Settings(
        model=str(out / "random"), data=(str(out / "code.jsonl"),), method=("full",), lr=1e-3,
        out=str(out / "code"), held_out=0.01, **common,
    )  # fmt: skip
    tune.run(first)
    second = tune.Settings(
        model=str(out / "code" / "full" / "tuned"), data=(str(out / "manual.jsonl"),),
        method=tuple(RATES), lr=RATES, out=str(out / "manual"), reduction=REDUCTION,
        adapter=ADAPTER, rank=RANK, **common,
    )  # fmt: skip
    return tune.run(second)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of both trainings")
    parser.add_argument("--out", default="runs/compare-tuning")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    main(**vars(parser.parse_args()))
