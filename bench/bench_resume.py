"""kill -9 at random moments: does a resumed run have the losses of one that was left alone?

Kills `quaver train` some times for each recipe and `--parallel`, one rank or all of them at once,
resumes it each time, and compares every step's loss and gradient norm with an uninterrupted run,
bit for bit. `--all` goes through every recipe and every kind of parallelism (`make kills`).
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
END = 90  # seconds that the other ranks have to end after one was killed


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Training:
    """`quaver train` on every rank of `parallel`, as torchrun would start it."""

    def __init__(self, folder, out, recipe, parallel, steps):
        arguments = [
            *(sys.executable, "-m", "quaver", "train", "--model", folder / "model.json"),
            *("--data", folder / "text.txt", "--recipe", recipe, "--steps", str(steps)),
            *("--batch", "4", "--seq", "32", "--device", "cpu", "--save-every", "7"),
            *("--out", out, "--parallel", parallel),
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


def finish(folder, out, recipe, parallel, steps):
    """Trains to the end; UsageError with its reason where the combination is refused."""
    training = Training(folder, out, recipe, parallel, steps)
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


def measure(recipe, parallel, kills, steps, seed):
    draw = random.Random(f"{seed}/{recipe}/{parallel}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "model.json").write_text(json.dumps(MODEL))
        (folder / "text.txt").write_bytes(
            random.Random(0).randbytes(1000).replace(b"\0", b" ") * 20
        )
        whole = finish(folder, folder / "whole", recipe, parallel, steps)
        cut = folder / "cut"
        # Moments by step as well as by time, so that a fast machine is hit everywhere too.
        died = []
        for moment in sorted(draw.sample(range(1, steps), kills)):
            training = Training(folder, cut, recipe, parallel, steps)
            died.append(kill_once(training, cut / recipe / "metrics.jsonl", moment, draw))
        return died, whole, finish(folder, cut, recipe, parallel, steps)


def combination(recipe, parallel, args):
    """A row of the report; None where the combination is refused."""
    try:
        died, whole, cut = measure(recipe, parallel, args.kills, args.steps, args.seed)
    except UsageError as error:
        print(f"{recipe:<12} {parallel:<8} refused: {error}", flush=True)
        return None
    equal = sum(a == b for a, b in zip(whole, cut, strict=True))
    print(f"{recipe:<12} {parallel:<8} {len(died)} kills   {equal} of {len(whole)} steps "
          f"bit-identical\n{'':<21} (resumed from, killed after) {died}", flush=True)  # fmt: skip
    return {"name": f"{recipe} {parallel}", "kills": died, "steps": len(whole), "identical": equal}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="bf16,fp8lm-o2")
    parser.add_argument("--parallel", nargs="+", default=["dp=1"], help=f"such as {KINDS}")
    parser.add_argument("--all", action="store_true", help="every recipe and kind of parallelism")
    parser.add_argument("--kills", type=int, default=10, help="for each combination")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = recipes.names() if args.all else args.recipes.split(",")
    kinds = KINDS if args.all else args.parallel
    print(common.describe(common.machine()))
    rows = [combination(name, kind, args) for kind in kinds for name in names]
    rows = [row for row in rows if row is not None]
    print(f"{sum(len(row['kills']) for row in rows)} kills")
    common.save("resume-all" if args.all else "resume", rows)
    if any(row["identical"] != row["steps"] for row in rows):
        sys.exit("resume: losses differ from those of an uninterrupted run")


if __name__ == "__main__":
    main()
