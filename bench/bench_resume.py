"""kill -9 at random moments: does a resumed run have the losses of one that was left alone?

Kills `quaver train` some times for each recipe and `--parallel`, one rank or all of them at once,
resumes it each time, and compares every step's loss and gradient norm with an uninterrupted run,
bit for bit. `--start folder` trains from a folder of transformers, and `--start tune` is `quaver
tune` from one, whose methods take the recipes' place. `--all` goes through every recipe and every
kind of parallelism, and both of these on one rank (`make kills`).
"""

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

from quaver import recipe as recipes
from quaver.errors import UsageError
from quaver.parallel import Parallel

MODEL = {"vocab": 256, "dim": 64, "layers": 2, "heads": 2, "kv_heads": 2, "ffn": 128, "context": 64}
KINDS = ("dp=1", "dp=2", "zero=2", "fsdp=2", "tp=2")
STARTS = ("model", "folder", "tune")
METHODS = ("full", "lora", "qst")
END = 90  # seconds that the other ranks have to end after one was killed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags(start, folder, recipe):
    """Those that differ between the starts."""
    if start == "tune":
        side = ("--reduction", "2") if recipe == "qst" else ()  # the model has 4 heads
        places = "--model", folder / "hf", "--data", folder / "chat.jsonl"
        return "tune", *places, "--method", recipe, *side
    model, data = {"model": ("model.json", "text.txt"), "folder": ("hf", "docs.jsonl")}[start]
    return "train", "--model", folder / model, "--data", folder / data, "--recipe", recipe


def write_start(start, folder):
    """The model and the data, without a download."""
    text = random.Random(0).randbytes(1000).replace(b"\0", b" ") * 20
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text.txt").write_bytes(text)
    if start == "model":
        return
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"<end>": 0} | {str(n): n + 1 for n in range(60)}, "<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    coder = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0, attention_dropout=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    coder.save_pretrained(folder / "hf")
    counts = [[str((n + i) % 60) for i in range(12)] for n in range(200)]
    rows = [{"prompt": " ".join(c[:4]), "response": " ".join(c[4:])} for c in counts]
    for name, lines in (("chat", rows), ("docs", [{"text": " ".join(c)} for c in counts])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


class Training:
    """The command on every rank of `parallel`, as torchrun would start it."""

    def __init__(self, start, folder, out, recipe, parallel, steps):
        arguments = [
            *(sys.executable, "-m", "quaver", *flags(start, folder, recipe)),
            *("--steps", str(steps), "--batch", "4", "--seq", "32", "--device", "cpu"),
            *("--save-every", "7", "--out", out),
            *(["--parallel", parallel] if start != "tune" else []),
            *(["--resume"] if (out / ".lock").exists() else []),
        ]
        ranks = Parallel.parse(parallel).ranks
        self.processes, self.errors = [], []
        port = str(free_port())
        for rank in range(ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | ({k: str(v) for k, v in places.items()} | alone
                                        if ranks > 1 else {})  # fmt: skip
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by finish)
            self.errors.append(output)
            self.processes.append(subprocess.Popen(
                arguments, stdout=output, stderr=subprocess.STDOUT, env=environment
            ))  # fmt: skip

    def running(self):
        return all(process.poll() is None for process in self.processes)

    def kill(self, victims):
        """kill -9 to some ranks; the others must end by themselves. The first rank's output."""
        for rank in victims:
            self.processes[rank].kill()
        return self.finish()

    def finish(self):
        for process in self.processes:
            try:
                process.wait(None if len(self.processes) == 1 else END + 600)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        texts = []
        for output in self.errors:
            output.seek(0)
            texts.append(output.read())
            output.close()
        self.texts = texts
        return texts[0]


def metrics(out, recipe):
    lines = (out / recipe / "metrics.jsonl").read_text().splitlines()
    return [(m["step"], m["loss"], m["grad_norm"]) for m in map(json.loads, lines)]


def finish(start, folder, out, recipe, parallel, steps):
    """Trains to the end; UsageError with its reason where the combination is refused."""
    training = Training(start, folder, out, recipe, parallel, steps)
    training.finish()
    for process, text in zip(training.processes, training.texts, strict=True):
        if process.returncode == 2:
            raise UsageError(text.strip().splitlines()[-1])
        if process.returncode:
            raise RuntimeError(f"{recipe} {parallel}: exit {process.returncode}: {text}")
    return metrics(out, recipe)


def kill_once(training, path, moment, draw):
    """Waits for a step, and a little longer, and kills. (Resumed from, steps when it died.)"""
    while training.running():
        if path.exists() and path.read_text().count("\n") >= moment:
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.05))
    ranks = len(training.processes)
    victims = range(ranks) if draw.random() < 0.5 else [draw.randrange(ranks)]
    began = re.search(r"continues after step (\d+)", training.kill(victims))
    return int(began[1]) if began else None, len(path.read_text().splitlines())


def measure(start, recipe, parallel, kills, steps, seed):
    draw = random.Random(f"{seed}/{start}/{recipe}/{parallel}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_start(start, folder)
        whole = finish(start, folder, folder / "whole", recipe, parallel, steps)
        cut = folder / "cut"
        # Moments by step as well as by time, so that a fast machine is hit everywhere too.
        died = []
        for moment in sorted(draw.sample(range(1, steps), kills)):
            training = Training(start, folder, cut, recipe, parallel, steps)
            died.append(kill_once(training, cut / recipe / "metrics.jsonl", moment, draw))
        return died, whole, finish(start, folder, cut, recipe, parallel, steps)


def combination(start, recipe, parallel, args):
    """A row of the report; None where the combination is refused."""
    label = recipe if start == "model" else f"{start} {recipe}"
    try:
        died, whole, cut = measure(start, recipe, parallel, args.kills, args.steps, args.seed)
    except UsageError as error:
        print(f"{label:<17} {parallel:<8} refused: {error}", flush=True)
        return None
    equal = sum(a == b for a, b in zip(whole, cut, strict=True))
    print(f"{label:<17} {parallel:<8} {len(died)} kills   {equal} of {len(whole)} steps "
          f"bit-identical\n{'':<26} (resumed from, killed after) {died}", flush=True)  # fmt: skip
    return {"name": f"{label} {parallel}", "kills": died, "steps": len(whole), "identical": equal}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", choices=STARTS, default="model")
    parser.add_argument("--recipes", help="bf16,fp8lm-o2 if not given; of tune full,lora,qst")
    parser.add_argument("--parallel", nargs="+", default=["dp=1"], help=f"such as {KINDS}")
    parser.add_argument("--all", action="store_true", help="every start, recipe and kind of ranks")
    parser.add_argument("--kills", type=int, default=10, help="for each combination")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    default = ",".join(METHODS) if args.start == "tune" else "bf16,fp8lm-o2"
    names = (args.recipes or default).split(",")
    todo = [(args.start, name, kind) for kind in args.parallel for name in names]
    if args.all:
        todo = [("model", name, kind) for kind in KINDS for name in recipes.names()]
        todo += [("folder", name, "dp=1") for name in recipes.names()]
        todo += [("tune", method, "dp=1") for method in METHODS]
    print(common.describe(common.machine()))
    rows = [combination(*each, args) for each in todo]
    rows = [row for row in rows if row is not None]
    print(f"{sum(len(row['kills']) for row in rows)} kills")
    common.save("resume-all" if args.all else "resume", rows)
    if any(row["identical"] != row["steps"] for row in rows):
        sys.exit("resume: losses differ from those of an uninterrupted run")


if __name__ == "__main__":
    main()
