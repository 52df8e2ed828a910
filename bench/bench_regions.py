"""The parallel regions of OpenMP in one training step of `tiny`, by recipe, against bf16's.

A region wakes threads and waits for them. Beside other processes the wait is for a thread that the
machine does not run, so that many small regions cost far more than their work. They are counted
where libgomp starts them, torch's own among them.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common

RECIPES = ("bf16", "fp8lm-o2", "coat", "blockwise")
JUDGED = ("fp8lm-o2", "coat")
COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
typedef void (*Start)(void (*)(void*), void*, unsigned, unsigned);
static long count;
long regions(void) { return count; }
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  __sync_fetch_and_add(&count, 1);
  ((Start)dlsym(RTLD_NEXT, "GOMP_parallel"))(body, data, threads, flags);
}
"""
STEPS = 2  # that settle scales and caches before the one that is counted


def counted(library: str) -> dict[str, int]:
    """Regions of a step by recipe, in a process that `library` was preloaded into."""
    import torch

    from quaver import data, models, train
    from quaver.distributed import World
    from quaver.job import Job, Run

    torch.set_num_threads(2)
    regions, found = ctypes.CDLL(library).regions, {}
    regions.restype = ctypes.c_long
    for recipe in RECIPES:
        settings = train.Settings(
            data=("stdlib",), model="tiny", recipe=(recipe,), steps=STEPS + 1, batch=4, seq=64
        )
        text = data.load(settings.data, settings.seq)
        config = models.load(settings.model).replace(vocab=text.vocab)
        job = Job(Run(settings, config, text, World(torch.device("cpu"))), recipe)
        for step in range(1, STEPS + 1):
            job.step(step)
        before = regions()
        job.step(STEPS + 1)
        found[recipe] = regions() - before
    return found


def rows() -> list[dict]:
    """Counts in a process of its own, and judges."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "counter.c"), Path(folder, "counter.so")
        source.write_text(COUNTER)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
        done = subprocess.run(
            [sys.executable, __file__, "--count", library],
            env=os.environ | {"LD_PRELOAD": str(library)},
            check=True,
            capture_output=True,
            text=True,
        )
    counts = dict(line.split() for line in done.stdout.splitlines())
    base = int(counts["bf16"])
    if base == 0:
        sys.exit("regions: this torch does not start its threads by GOMP_parallel")
    print(f"bf16: {base}, blockwise: {counts['blockwise']}")
    return [
        common.judge(f"parallel regions of a step of tiny, {recipe}", int(counts[recipe]),
                     "at most", base)
        for recipe in JUDGED
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", metavar="LIBRARY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        for recipe, count in counted(args.count).items():
            print(recipe, count)
        return
    print(common.describe(common.machine()))
    common.finish("regions", rows())


if __name__ == "__main__":
    main()
