"""How every bench measures: baseline and candidate in one process, by turns, medians of ratios.

A shared machine drifts by tens of percent over seconds. Two runs next to each other see the same
machine, so the ratio of a pair is steady where the times are not.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from statistics import median, quantiles

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAIRS = 30


def machine():
    """What a figure must be read with."""
    import quaver

    def git(*args):
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
        return done.stdout.strip()

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": quaver.build_info()["cpu_isa"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else ""),
    }


def seconds(function, calls):
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def compare(
    name, baseline, candidate, *, baseline_name, pairs=PAIRS, bytes=None, flops=None, bar=None
):
    """Times `baseline` against `candidate`; the ratio is how many times faster the candidate is.

    `bytes` and `flops` are of one call of the candidate and add GB/s and TFLOP/s to the row; `bar`
    is what the ratio should be at least.
    """
    baseline(), candidate()
    # Enough calls a turn that the clock's and the scheduler's grains do not matter.
    calls = max(1, round(0.01 / max(1e-9, min(seconds(baseline, 1), seconds(candidate, 1)))))
    seconds(baseline, calls), seconds(candidate, calls)
    times = []
    for turn in range(pairs):
        # Who goes first alternates too, so that neither always inherits the other's cache.
        if turn % 2:
            after = seconds(candidate, calls)
            times.append((seconds(baseline, calls), after))
        else:
            times.append((seconds(baseline, calls), seconds(candidate, calls)))
    ratios = [before / after for before, after in times]
    low, _, high = quantiles(ratios, n=4)
    row = {
        "name": name,
        "baseline": baseline_name,
        "ratio": median(ratios),
        "iqr": [low, high],
        "pairs": pairs,
        "calls": calls,
        "baseline_s": median(before for before, _ in times),
        "candidate_s": median(after for _, after in times),
    }
    if bytes is not None:
        row["gb_per_s"] = bytes / row["candidate_s"] / 1e9
    if flops is not None:
        row["tflop_per_s"] = flops / row["candidate_s"] / 1e12
    if bar is not None:
        row |= {"bar": bar, "met": row["ratio"] >= bar}
    print(line(row), flush=True)
    return row


def line(row):
    text = (
        f"{row['name']:<44} {row['ratio']:6.2f} x {row['baseline']:<36} "
        f"[{row['iqr'][0]:.2f}, {row['iqr'][1]:.2f}]  {row['candidate_s'] * 1e3:9.3f} ms"
    )
    if "gb_per_s" in row:
        text += f"  {row['gb_per_s']:7.1f} GB/s"
    if "tflop_per_s" in row:
        text += f"  {row['tflop_per_s']:7.3f} TFLOP/s"
    if "bar" in row:
        text += f"  bar {row['bar']:.2f}: {'met' if row['met'] else 'NOT met'}"
    return text


def describe(m):
    device = f", {m['gpu']}" if m["gpu"] else ""
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']}{device}; "
        f"torch {m['torch']}, Python {m['python']}, commit {m['commit']}"
    )


def save(stage, rows):
    """Writes bench/results/STAGE.json; figures without their machine are worth nothing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{stage}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


def main(stage, bench):
    """The body of a bench script: `bench(pairs)` yields or returns rows of `compare`."""
    parser = argparse.ArgumentParser(description=f"The {stage} bench.")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="pairs of runs (default %(default)s)"
    )
    args = parser.parse_args()
    print(describe(machine()))
    save(stage, list(bench(args.pairs)))
