"""The method of every bench: baseline and candidate in one process, by turns, medians of ratios.

A shared machine drifts by tens of percent over seconds. Two runs next to each other see the same
machine, so the ratio of a pair is steady where the times are not.

A bench gives `main` its rows as Cases, which allocate nothing until their turn comes: `--list`
shows them on any machine. `--device cuda` measures with the device's own clock (gpu.py).
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import gpu
import targets
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAIRS = 30


class NotHereError(Exception):
    """Raised by a Case's `build` where something that the row needs is not on this machine."""


@dataclass(frozen=True)
class Case:
    """A row to be measured. `build()` allocates and returns baseline and candidate, two functions
    of no arguments.

    `bytes` and `flops` are of one call of the candidate and add GB/s and TFLOP/s to the row; `bar`
    is what the ratio should be at least; `target` is the key of the row of targets.py that this
    one counts for.
    """

    name: str
    baseline: str
    build: Callable[[], tuple[Callable[[], object], Callable[[], object]]]
    bytes: int | None = None
    flops: int | None = None
    bar: float | None = None
    target: str | None = None

    def heading(self):
        row = {"name": self.name, "baseline": self.baseline}
        return row | ({"target": self.target} if self.target else {})


def machine():
    """The facts with which a figure must be read."""
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
    """Wall-clock seconds of one call, the device's work included."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def spread(ratios):
    """Median and quartiles of the pairs' ratios. One pair has no spread."""
    if len(ratios) == 1:
        return {"ratio": ratios[0], "iqr": [ratios[0], ratios[0]]}
    low, _, high = quantiles(ratios, n=4)
    return {"ratio": median(ratios), "iqr": [low, high]}


def compare(
    name,
    baseline,
    candidate,
    *,
    baseline_name,
    pairs=PAIRS,
    bytes=None,
    flops=None,
    bar=None,
    target=None,
    clock=seconds,
    turn=0.01,
    most_calls=10_000,
):
    """Times `baseline` against `candidate`; the ratio is how many times faster the candidate is.

    `clock(function, calls)` gives the seconds of one call, and `turn` is how long a turn should
    last, so that the clock's and the scheduler's grains do not matter. The rest is as in `Case`.
    """
    baseline(), candidate()
    shorter = min(clock(baseline, 1), clock(candidate, 1))
    calls = max(1, min(round(turn / max(1e-9, shorter)), most_calls))
    clock(baseline, calls), clock(candidate, calls)
    times = []
    for pair in range(pairs):
        # Who goes first alternates too, so that neither always inherits the other's cache.
        if pair % 2:
            after = clock(candidate, calls)
            times.append((clock(baseline, calls), after))
        else:
            times.append((clock(baseline, calls), clock(candidate, calls)))
    row = {
        "name": name,
        "baseline": baseline_name,
        **spread([before / after for before, after in times]),
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
    if target is not None:
        row["target"] = target
    if hasattr(clock, "host_bound"):
        row["host_bound"] = clock.host_bound / clock.turns
    print(line(row), flush=True)
    return row


def line(row):
    if "reason" in row:
        return f"{row['name']:<44} against {row['baseline']}: not measured, {row['reason']}"
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


def judge(name, value, wanted, bar, **more):
    """A row for a figure that does not depend on the machine, beside its bar, printed.

    `wanted` is "at most", "at least", or "within" for a figure that may be negative too.
    """
    met = {"at most": value <= bar, "at least": value >= bar, "within": abs(value) <= bar}[wanted]
    print(f"{name:<72} {value:9.4g}   {wanted} {bar:g}: {'met' if met else 'NOT met'}", flush=True)
    return {"name": name, "value": value, "wanted": wanted, "bar": bar, "met": met, **more}


def finish(stage, rows, **more):
    """Saves the rows; the process fails where one of them misses its bar."""
    save(stage, rows, **more)
    missed = [row["name"] for row in rows if row.get("met") is False]
    if missed:
        sys.exit(f"{stage}: missed: {'; '.join(missed)}")


def describe(m):
    device = f", {m['gpu']}" if m["gpu"] else ""
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']}{device}; "
        f"torch {m['torch']}, Python {m['python']}, commit {m['commit']}"
    )


def save(stage, rows, path=None, **more):
    """Writes `path`, or bench/results/STAGE.json, with `more` beside the rows; figures without
    their machine are worth nothing."""
    path = RESULTS / f"{stage}.json" if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": rows, **more}, indent=1) + "\n")
    print(f"wrote {os.path.relpath(path, ROOT)}")


def measure(case, pairs, **how):
    """The row of `case`, or its heading with the reason why there is none."""
    try:
        baseline, candidate = case.build()
        return compare(
            case.name,
            baseline,
            candidate,
            baseline_name=case.baseline,
            pairs=pairs,
            bytes=case.bytes,
            flops=case.flops,
            bar=case.bar,
            target=case.target,
            **how,
        )
    except NotHereError as missing:
        row = case.heading() | {"reason": str(missing)}
    except Exception as error:
        # One row's failure must not cost the others; `main` fails in the end.
        traceback.print_exc()
        what = str(error).strip().splitlines() or [""]
        row = case.heading() | {"reason": f"{type(error).__name__}: {what[0]}", "failed": True}
    print(line(row), flush=True)
    return row


def run_cases(cases, pairs, write=lambda rows: None, protocol=dict):
    """Measures each case with what `protocol()` gives `compare`. `write(rows)` is called after each
    with all rows, those still to come included, so that a bench that is stopped leaves what it has
    and says what it lacks."""
    rows = [case.heading() | {"reason": "not reached before the bench ended"} for case in cases]
    for i, case in enumerate(cases):
        rows[i] = measure(case, pairs, **protocol())
        write(rows)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def _parser(stage, devices):
    parser = argparse.ArgumentParser(description=f"The {stage} bench.")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="pairs of runs (default %(default)s)"
    )
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--out", metavar="FILE", help="default: bench/results/STAGE.json")
    parser.add_argument("--list", action="store_true", help="show the rows and measure nothing")
    return parser


def main(stage, bench=None, cases=None):
    """The body of a bench script. `cases(device)` returns its Cases for "cpu" and "cuda"; where
    there is a `bench`, `bench(pairs)` yields the CPU's rows instead, made by `compare`."""
    parser = _parser(stage, ["cpu"] if cases is None else ["cpu", "cuda"])
    args = parser.parse_args()
    if args.device == "cuda" and args.out is None and not args.list:
        parser.error("--device cuda needs --out: bench/results/ has the CPU's rows by this name")
    if args.list:
        if bench is not None and args.device == "cpu":
            parser.error(f"the {stage} bench cannot list its CPU rows")
        for case in cases(args.device):
            unknown = case.target is not None and case.target not in targets.TARGETS
            print(json.dumps(case.heading()))
            if unknown:
                sys.exit(f"{case.name}: no target {case.target!r} in targets.py")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"{stage}: --device cuda, but torch {torch.__version__} finds no GPU")
    print(describe(machine()))
    if bench is not None and args.device == "cpu":
        save(stage, list(bench(args.pairs)), args.out)
        return
    if args.device == "cuda":
        rows = run_cases(
            cases("cuda"), args.pairs, lambda rows: save(stage, rows, args.out), gpu.protocol
        )
    else:
        rows = run_cases(cases("cpu"), args.pairs)
        save(stage, rows, args.out)
    if any(row.get("failed") for row in rows):
        sys.exit(f"{stage}: some rows failed")
