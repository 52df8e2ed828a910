"""Every bench of this tree against the same bench of another one, such as a worktree of an older
commit with its build in place: is any row slower?

Both trees run each bench by turns. A row's figure is its ratio to the bench's own baseline (torch,
or a copy), which a drifting machine leaves alone; "against" is this tree's over the other's, the
median of the rounds. Rows that only one tree has are named and not compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import common

BENCHES = (
    "quantize",
    "activation",
    "kernels",
    "layer",
    "optimizer",
    "gemm",
)
BAR = 0.97  # a row may be 3 % slower


def ratios(tree, bench, pairs):
    """{row: ratio} of one run of a tree's bench; empty where the tree has no such bench."""
    script = Path(tree, "bench", f"bench_{bench}.py")
    if not script.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        done = subprocess.run(
            [sys.executable, script, "--pairs", str(pairs), "--out", out.name],
            env=os.environ | {"PYTHONPATH": f"{Path(tree, 'python').resolve()}"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{script}: status {done.returncode}\n{done.stdout}{done.stderr}")
        rows = json.loads(Path(out.name).read_text())["rows"]
    return {f"{r['name']} over {r['baseline']}": r["ratio"] for r in rows if "ratio" in r}


def compare(bench, other, rounds, pairs):
    found = []
    for turn in range(rounds):
        trees = (common.ROOT, other) if turn % 2 else (other, common.ROOT)
        found.append({tree: ratios(tree, bench, pairs) for tree in trees})
    first = found[0]
    for name in sorted(first[other].keys() ^ first[common.ROOT].keys()):
        print(f"{bench}: only in one tree: {name}", flush=True)
    return [
        common.judge(
            f"{bench}: {name}",
            median(pair[common.ROOT][name] / pair[other][name] for pair in found),
            "at least",
            BAR,
        )
        for name in first[common.ROOT]
        if name in first[other]
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other tree, built in place")
    parser.add_argument("--benches", nargs="+", default=BENCHES, choices=BENCHES, metavar="BENCH")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=10)
    args = parser.parse_args()
    if not Path(args.other, "python", "quaver", "lib").is_dir():
        parser.error(f"{args.other} has no build in place: run `make` there")
    print(common.describe(common.machine()), flush=True)
    rows = [
        row for bench in args.benches for row in compare(bench, args.other, args.rounds, args.pairs)
    ]
    common.finish("against", rows)


if __name__ == "__main__":
    main()
