"""Damages every file of a run's folder in every way, and reads it.

Each case must end in one of two ways: an error of one line that names the file, with model,
optimizer, random generators and folder as they were, or the values that were saved. A case is a
function of its seed and number: `--only N` repeats it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import quaver as qv
from quaver import checkpoint, models, train
from quaver.distributed.fsdp import checkpoint as sharded
from quaver.errors import UsageError
from quaver.job import Run, finished
from quaver.rundir import RunDir
from quaver.schema import with_crc32
from quaver.tensor_file import read_tensors, write_tensors

SIZES = {"vocab": 256, "dim": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 16, "context": 16}
RECIPE = "fp8lm-o2"
WRONG = (None, True, -1.5, "x", [], {})  # one value of every JSON type


def same_type(old, new) -> bool:
    """Whether a schema cannot tell the two values apart."""
    return type(old) is type(new) or (type(old), type(new)) == (int, float)


def bits(value):
    """Nested plain values, so that == compares every bit."""
    if isinstance(value, qv.ScaledTensor):
        return {name: bits(part) for name, part in value.parts().items()}
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value


# Damage of bytes


def flip(draw, data):
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


def flip_in_head(draw, data):
    return flip(draw, data[:200]) + data[200:]


def replace(draw, data):
    place, count = draw.randrange(len(data)), draw.randrange(1, 65)
    return data[:place] + draw.randbytes(len(data[place : place + count])) + data[place + count :]


def zero(draw, data):
    place, count = draw.randrange(len(data)), draw.randrange(1, 4097)
    return data[:place] + bytes(len(data[place : place + count])) + data[place + count :]


def cut(draw, data):
    return data[: draw.randrange(len(data))]


def cut_out(draw, data):
    place = draw.randrange(len(data))
    return data[:place] + data[place + draw.randrange(1, 100) :]


def extend(draw, data):
    return data + draw.choice((bytes, draw.randbytes))(draw.randrange(1, 1000))


def insert(draw, data):
    place = draw.randrange(len(data))
    return data[:place] + draw.randbytes(draw.randrange(1, 100)) + data[place:]


def exchange(draw, data):
    size = draw.choice((1, 4, 64))
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    first, second = data[a : a + size], data[b : b + size]
    if b < a + size or len(second) < size:
        return cut(draw, data)
    return data[:a] + second + data[a + size : b] + first + data[b + size :]


def double(draw, data):
    return data + data


def empty(draw, data):
    return b""


def nest(draw, data):
    return draw.choice((b"[", b'{"a":')) * 50_000


BYTES = (flip, flip, flip_in_head, replace, zero, cut, cut_out, extend, insert, exchange, double,
         empty, nest)  # fmt: skip


# Damage of files


def swap(draw, path, others):
    """Another file of a run in its place; a whole checkpoint is what it is, wherever it lies."""
    shutil.copy(draw.choice(others), path)


def remove(draw, path, others):
    path.unlink()


def folder(draw, path, others):
    path.unlink()
    path.mkdir()


def link(draw, path, others):
    path.unlink()
    path.symlink_to(draw.choice(("/dev/zero", "/nowhere", str(path), "/etc/hostname")))


def pipe(draw, path, others):
    path.unlink()
    os.mkfifo(path)


FILES = (swap, swap, remove, folder, link, pipe)


# Damage of documents, by a forger who knows the checksums


def mistype(draw, document, free):
    """Gives one value another type, or removes it; a text says what. Fields whose path `free` finds
    may be anything."""
    places = []

    def walk(value, path):
        items = value.items() if isinstance(value, dict) else ()
        items = list(enumerate(value))[:3] if isinstance(value, list) else items
        for key, inner in items:
            if not free((*path, key)):
                places.append((value, key, (*path, key)))
            walk(inner, (*path, key))

    walk(document, ())
    parent, key, path = draw.choice(places)
    wrong = [value for value in WRONG if not same_type(parent[key], value)]
    if isinstance(parent, dict) and draw.random() < 0.2 and not optional(path):
        del parent[key]
        return f"without {path}"
    parent[key] = draw.choice(wrong)
    return f"{path} = {parent[key]!r}"


def optional(path) -> bool:
    """What a file may lack: options stay as they are, and so does NumPy's generator."""
    return path[:2] in (("optimizer", "options"), ("random", "numpy"))


def free_of_checkpoint(path) -> bool:
    return path[0] in ("extra", "crc32", "format", "version", "step")


def free_of_summary(path) -> bool:
    """What nothing is computed from."""
    inner = path[2:] if path[0] == "recipes" else path
    known = ("tokens_per_s", "steps", "skipped", "metrics_crc32")  # losses may be null
    if path[0] == "recipes" and len(path) > 2:
        return inner[0] not in known
    return path[0] == "machine" or path[:2] == ("config", "parallel") or path[-1] == "data" or (
        path[:2] == ("config", "data"))  # fmt: skip


class Bench:
    """A finished run, a checkpoint, a sharded checkpoint; and a second of each, of another seed."""

    def __init__(self, root: Path):
        self.root = root
        (root / "text.txt").write_bytes(random.Random(0).randbytes(200) * 20)
        (root / "model.json").write_text(json.dumps(SIZES))
        self.runs = [self._train(seed) for seed in (0, 1)]
        self.run, self.out = self.runs[0]
        self.model, self.optimizer = self._build(3)
        self.expected = []
        for i in range(2):
            model, optimizer = self._build(i)
            self._step(model, optimizer)
            extra = {"note": [i]}
            qv.save(root / f"state{i}", model, optimizer, step=i, extra=extra)
            sharded.save(root / f"folder{i}", model, optimizer, step=i, extra=extra)
            self.expected.append(self._values(model, optimizer))
        self.others = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"]
        self.work = root / "work"

    def _train(self, seed):
        out = self.root / f"run{seed}"
        settings = train.Settings(
            data=(str(self.root / "text.txt"),), model=str(self.root / "model.json"),
            recipe=(RECIPE,), steps=2, batch=1, seq=8, device="cpu", out=str(out), seed=seed,
        )  # fmt: skip
        summary = train.run(settings)
        config = {k: v for k, v in summary["config"].items() if k != "parallel"}
        world = qv.distributed.World("cpu")
        return Run(settings, None, None, world, None, config), out

    def _build(self, seed):
        torch.manual_seed(seed)
        model = qv.convert(models.build(models.Config(**SIZES)), recipe=RECIPE)
        return model, qv.AdamW(model.parameters(), lr=1e-2, recipe=RECIPE)

    def _step(self, model, optimizer):
        tokens = torch.randint(0, 256, (1, 9))
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def _values(self, model, optimizer):
        states = [optimizer.state.get(p, {}) for g in optimizer.param_groups for p in g["params"]]
        options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return bits([dict(model.state_dict(keep_vars=True)), states, options])

    # The three readers. Each gives what it read, as plain values, and what that must be.

    def read_checkpoint(self, path):
        state = qv.load(path, self.model, self.optimizer)
        found = self._values(self.model, self.optimizer)
        return [state["extra"], found], [{"note": [state["step"]]}, self.expected[state["step"]]]

    def read_folder(self, path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: no process group
            state = sharded.load(path, self.model, self.optimizer)
        found = self._values(self.model, self.optimizer)
        return [state["extra"], found], [{"note": [0]}, self.expected[0]]

    def read_run(self, path):
        folder, config = RunDir(path), self.run.configuration
        folder.check(config, resume=True)
        with folder.started(config, resume=True):
            results = folder.results(config)
            run = Run(self.run.settings, None, None, self.run.world, folder, config)
            done = {name: finished(run, name, result) for name, result in results.items()}
        expected = RunDir(self.out).results(config)
        if not results:  # the summary is gone: the run goes on from its checkpoint
            return [], []
        lines = (self.out / RECIPE / "metrics.jsonl").read_text().splitlines()
        wanted = {RECIPE: [json.loads(line) for line in lines]}
        return [bits(results), done], [bits(expected), wanted]

    def forge_checkpoint(self, draw, path):
        tensors, document = read_tensors(path, checkpoint.FORMAT, checkpoint.VERSION)
        document = copy.deepcopy(document)
        what = mistype(draw, document, free_of_checkpoint)
        document.pop("crc32")
        write_tensors(path, tensors, document)
        return what

    def forge_json(self, draw, path, free):
        document = json.loads(path.read_text())
        document.pop("crc32")
        what = mistype(draw, document, free)
        path.write_text(json.dumps(with_crc32(document)))
        return what

    def case(self, draw):
        """(what is done, function that reads, path of the copy that is read)."""
        if self.work.is_dir():
            shutil.rmtree(self.work)
        self.work.mkdir()
        kind = draw.choice(("checkpoint", "folder", "run"))
        copied = self.work / kind
        if kind == "checkpoint":
            shutil.copy(self.root / "state0", copied)
            victim, read = copied, self.read_checkpoint
        else:
            shutil.copytree(self.root / "folder0" if kind == "folder" else self.out, copied)
            read = self.read_folder if kind == "folder" else self.read_run
            names = ("config.json", "summary.json", "metrics.jsonl")
            files = [p for p in sorted(copied.rglob("*")) if p.is_file() and p.name != ".lock"]
            files = [p for p in files if kind == "folder" or p.name in names]
            victim = draw.choice(files)
        return f"{victim.relative_to(self.work)}: {self.damage(draw, victim)}", read, copied

    def damage(self, draw, victim):
        how = draw.choice(("bytes", "bytes", "file", "document"))
        if how == "document" and victim.name == "checkpoint":
            return f"forged {self.forge_checkpoint(draw, victim)}"
        if how == "document" and victim.name == "checkpoint.json":
            return f"forged {self.forge_json(draw, victim, free_of_checkpoint)}"
        if how == "document" and victim.name == "summary.json":
            return f"forged {self.forge_json(draw, victim, free_of_summary)}"
        if how == "file":
            change = draw.choice(FILES)
            change(draw, victim, self.others)
        else:
            change = draw.choice(BYTES)
            victim.write_bytes(change(draw, victim.read_bytes()))
        return change.__name__

    def judge(self, draw) -> tuple[str, str | None]:
        """The outcome of one case, and what is wrong with it, if anything is."""
        what, read, path = self.case(draw)
        before = self._values(self.model, self.optimizer), torch.get_rng_state(), tree(path)
        try:
            found, wanted = read(path)
        except UsageError as error:
            after = self._values(self.model, self.optimizer), torch.get_rng_state(), tree(path)
            if str(path) not in str(error) or "\n" in str(error):
                return what, f"an error that names no file: {error}"
            if not torch.equal(before[1], after[1]) or before[::2] != after[::2]:
                return what, f"refused, but something changed: {error}"
            return "refused", None
        except Exception as error:
            return what, f"{type(error).__name__}: {error}"
        same = found == wanted
        self.model, self.optimizer = self._build(3)
        return ("loaded", None) if same else (what, "accepted, but other values")


def tree(path: Path):
    """The contents of a folder without its lock, or of a file."""

    def content(p):
        return p.read_bytes() if p.is_file() and not str(p.resolve()).startswith("/dev") else None

    if not path.is_dir():
        return content(path)
    return {str(p): content(p) for p in sorted(path.rglob("*")) if p.name != ".lock"}


def fuzz(cases: int, seed: int, only: int | None = None) -> list[str]:
    """The failures of that many cases."""
    failures, outcomes = [], Counter()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        for number in range(cases) if only is None else [only]:
            what, wrong = bench.judge(random.Random(f"{seed}/{number}"))
            outcomes["wrong" if wrong else what] += 1
            if wrong:
                failures.append(f"--seed {seed} --only {number}: {what}: {wrong}")
                print(failures[-1], flush=True)
    print(", ".join(f"{count} {what}" for what, count in outcomes.items()))
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    arguments = parser.parse_args()
    sys.exit(1 if fuzz(arguments.cases, arguments.seed, arguments.only) else 0)


if __name__ == "__main__":
    main()
