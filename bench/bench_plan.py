"""`qv.plan` against real steps: every recipe with every optimizer, `tiny` and `125m`, on one rank,
two and four.

A plan must equal the memory report of the real run to the byte, of the first rank and of the last;
what the real run refuses, the plan refuses with the same words. Each pair that was compared is kept
in bench/results/plan_runs.jsonl and not compared again: all of them take hours on two cores.

    python bench/bench_plan.py                        all that is missing
    python bench/bench_plan.py --only tiny:dp=2,125m: some of it
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import common
import torch

import quaver as qv
from quaver import models, optimizers, recipe
from quaver.distributed import World, launch
from quaver.errors import UsageError
from quaver.parallel import Parallel
from quaver.planning.job import Job
from quaver.planning.sources import source
from quaver.planning.step import measure

MODELS = ("tiny", "125m")
PARALLELS = ("", "dp=2", "zero=2", "fsdp=2", "tp=2", "dp=4", "zero=4", "fsdp=4")
PAIRS = [(name, o) for name in recipe.names() for o in (None, *optimizers.names())]
SEQ = 32
RUNS = common.RESULTS / "plan_runs.jsonl"


def ranks_of(parallel: str) -> Parallel:
    return Parallel.parse(parallel) if parallel else Parallel()


@contextmanager
def joined(parallel: Parallel) -> Iterator[World]:
    """The World of the ranks that torchrun started, or of this process alone."""
    device = torch.device("cpu")
    if parallel.ranks == 1:
        yield World(device)
        return
    with launch.joined(device, parallel.tensor) as world:
        yield world


def pairs_of(model: str, parallel: str) -> list[tuple[str, str | None]]:
    """All pairs; of the larger model on several ranks each recipe and each optimizer once."""
    if model == "tiny" or not parallel:
        return PAIRS
    return [(name, o) for name, o in PAIRS if o is None or name == "bf16"]


def real(model: str, parallel: str, name: str, optimizer: str | None, world: World) -> dict:
    """The memory report of this rank after real steps, or what refuses them."""
    config, chosen, ranks = models.load(model), recipe.get(name), ranks_of(parallel)
    torch.manual_seed(0)
    try:
        built = qv.convert(models.build(config), chosen)
        job = Job(source(config, torch.float32), chosen, optimizer, ranks, world, False, False)
        report, _ = measure(job.training(built), 1, SEQ)
    except UsageError as error:
        return {"refused": str(error)}
    return dict(report)


def planned(model: str, parallel: str, name: str, optimizer: str | None, rank: int) -> dict:
    """The same of the plan."""
    options = {"seq": SEQ, "dtype": torch.float32, "parallel": parallel, "rank": rank}
    try:
        return dict(qv.plan(model, name, optimizer, **options))
    except UsageError as error:
        return {"refused": str(error)}


def work(model: str, parallel: str, pairs: list, out: Path) -> None:
    """Runs the pairs on this rank; writes the first rank's and the last one's results."""
    torch.set_num_threads(1)
    with joined(ranks_of(parallel)) as world:
        results = []
        for name, optimizer in pairs:
            found = world.all_gather(real(model, parallel, name, optimizer, world))
            results.append({0: found[0], len(found) - 1: found[-1]})
        if world.rank == 0:
            out.write_text(json.dumps(results))


def run(model: str, parallel: str, pairs: list) -> list[dict]:
    """`work` in processes of its own."""
    size = ranks_of(parallel).ranks
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.json")
        start = [sys.executable]
        if size > 1:
            start += ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        case = json.dumps([model, parallel, pairs])
        subprocess.run([*start, __file__, "--work", case, "--out", out], check=True)
        return json.loads(out.read_text())


def compared(model: str, parallel: str, pair: tuple, results: dict) -> dict:
    """What differs between the real run and the plan, by rank and key."""
    differing = {}
    for rank, report in results.items():
        plan = planned(model, parallel, *pair, int(rank))
        wrong = {
            key: [report[key], plan.get(key)] for key in report if plan.get(key) != report[key]
        }
        if wrong:
            differing[rank] = wrong
    refused = "refused" in results["0"]
    return {"model": model, "parallel": parallel, "recipe": pair[0], "optimizer": pair[1],
            "refused": refused, "differing": differing,
            "commit": common.machine()["commit"]}  # fmt: skip


def kept() -> dict[tuple, dict]:
    lines = map(json.loads, RUNS.read_text().splitlines()) if RUNS.exists() else []
    keys = ("model", "parallel", "recipe", "optimizer")
    return {tuple(line[key] for key in keys): line for line in lines}


def compare(model: str, parallel: str, at_once: int) -> None:
    """Compares the pairs that are missing, `at_once` in a start of the ranks."""
    done = kept()
    missing = [p for p in pairs_of(model, parallel) if (model, parallel, *p) not in done]
    for i in range(0, len(missing), at_once):
        pairs = missing[i : i + at_once]
        for pair, results in zip(pairs, run(model, parallel, pairs), strict=True):
            line = compared(model, parallel, pair, results)
            with RUNS.open("a") as file:  # one write of a short line is whole, whoever else writes
                file.write(json.dumps(line) + "\n")
            said = "refused" if line["refused"] else "ran"
            print(f"{model} {parallel or 'one rank'} {pair[0]} {pair[1]}: {said}, "
                  f"{line['differing'] or 'equal'}", flush=True)  # fmt: skip


def rows() -> list[dict]:
    """A row for each model and number of ranks of which something was compared."""
    lines, found = list(kept().values()), []
    for model in MODELS:
        for parallel in PARALLELS:
            these = [x for x in lines if (x["model"], x["parallel"]) == (model, parallel)]
            if not these:
                continue
            wanted = len(pairs_of(model, parallel))
            refused = sum(line["refused"] for line in these)
            name = (
                f"plan of {model}, {parallel or 'one rank'}: pairs that differ from real steps, of "
                f"{len(these)} of {wanted}, {refused} refused"
            )
            differing = sum(bool(line["differing"]) for line in these)
            found.append(common.judge(name, differing, "at most", 0))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = [f"{model}:{parallel}" for model in MODELS for parallel in PARALLELS]
    parser.add_argument("--only", default=",".join(everything), help="MODEL:PARALLEL, with commas")
    parser.add_argument("--at-once", type=int, default=9, help="pairs in a start of the ranks")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        model, parallel, pairs = json.loads(args.work)
        work(model, parallel, pairs, args.out)
        return
    print(common.describe(common.machine()))
    for case in args.only.split(","):
        model, _, parallel = case.partition(":")
        if case not in everything:
            parser.error(f"--only wants some of {', '.join(everything)}, got {case}")
        compare(model, parallel, args.at_once)
    common.finish("plan", rows())


if __name__ == "__main__":
    main()
