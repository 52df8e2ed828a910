"""What the CUDA kernels' PTX does, counted by the interpreter of tests/ptx without a GPU: threads'
instructions an element, bytes of global memory, sectors and passes over shared memory's banks.

    cmake --build build/cuda --target count_ptx && python bench/bench_ptx.py
    python bench/bench_ptx.py --check     # fails where a count grew by more than 2 %

PTX is not machine code: ptxas removes, merges and adds instructions. `model` is no measurement: the
longer of the times that an H100's issue slots and its memory would take, were nothing in the way.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

SLOTS = 132 * 4 * 32 * 1.755e9  # SMs, schedulers, lanes of a warp, clock of an H100 SXM
MEMORY = 3.35e12  # bytes a second
GROWTH = 1.02
RATIO = 1.05

# Bars of an element of the case's longest kernel. None: a figure without a bar.
INSTRUCTIONS = {
    "cast_transpose bf16 to e4m3, delayed": 13,
    "activate SwiGLU bf16, delayed": 55,
    "normalize RMSNorm bf16, delayed": 40,
    "adam fp8lm-o2": 100,
    "adam coat": 190,
    "adam 4 bits, blocks": 150,
}

# Cases whose places in shared memory are data: which banks they touch is no choice of the kernel.
SCATTERED = ("micro_adam", "decode_state")


def counted(folder: Path) -> list[dict]:
    """The cases of all programs of count_ptx, which run beside each other."""
    programs = sorted(folder.glob("count_*_ptx"))
    if not programs:
        sys.exit(f"bench_ptx: {folder} is empty: cmake --build build/cuda --target count_ptx")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [case for cases in pool.map(cases_of, programs) for case in cases]


def cases_of(program: Path) -> list[dict]:
    done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench_ptx: {program} failed:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def rows_of(case: dict) -> list[dict]:
    """Rows of one case; sums are over all its launches."""

    def total(key):
        return sum(launch[key] for launch in case["launches"])

    name, n = case["name"], case["elements"]
    instructions, moved = total("instructions") / n, (total("read") + total("written")) / n
    longest = max(case["launches"], key=lambda launch: launch["instructions"])
    seconds = max(instructions * n / SLOTS, moved * n / MEMORY)
    more = {
        "kernel": longest["kernel"],
        "launches": len(case["launches"]),
        "instructions": instructions,
        "bytes": moved,
        "least_bytes": case["least_bytes"],
        "model_us_per_million": seconds / n * 1e12,
    }
    bar = INSTRUCTIONS.get(name)
    what = f"{name}: PTX instructions an element"
    if bar is None:
        print(f"{what:<72} {instructions:9.4g}", flush=True)
        rows = [{"name": what, "value": instructions, **more}]
    else:
        rows = [common.judge(what, instructions, "at most", bar, **more)]
    ratios = {"bytes of global memory over the least": moved / case["least_bytes"]}
    ratios["sectors over the least of its requests"] = total("sectors") / total("least_sectors")
    if total("least_passes") and not name.startswith(SCATTERED):
        passes = total("passes") / total("least_passes")
        ratios["passes over shared memory's banks over the least"] = passes
    rows += [common.judge(f"{name}: {what}", x, "at most", RATIO) for what, x in ratios.items()]
    return rows


def grown(rows: list[dict]) -> list[str]:
    """Figures that are more than 2 % above those of bench/results/ptx.json."""
    kept = json.loads((common.RESULTS / "ptx.json").read_text())["rows"]
    known = {row["name"]: row["value"] for row in kept}
    said = []
    for row in rows:
        if row["name"] not in known:
            said.append(f"{row['name']}: not in bench/results/ptx.json")
        elif row["value"] > GROWTH * known[row["name"]]:
            said.append(f"{row['name']}: {row['value']:.4g}, was {known[row['name']]:.4g}")
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=common.ROOT / "build" / "cuda")
    parser.add_argument("--check", action="store_true", help="compare with the kept figures")
    args = parser.parse_args()
    folder = args.build / "bench" / "count"
    if not folder.exists() and not args.check:
        return print(f"bench_ptx: left out: {folder} is not built (it needs nvcc)")
    rows = [row for case in counted(folder) for row in rows_of(case)]
    if not args.check:
        return common.finish("ptx", rows)
    if said := grown(rows):
        sys.exit("bench_ptx: counts grew by more than 2 %:\n" + "\n".join(said))
    print(f"{len(rows)} figures, none more than 2 % above bench/results/ptx.json")


if __name__ == "__main__":
    main()
