"""Random calls of every native op: each must raise, or return what the reference says, and leave
all other memory alone. A batch runs in a process of its own, so that a crash has a seed.

    python tests/fuzz/run.py --calls 20000            # seeds 0 to 19,999
    python tests/fuzz/run.py --calls 1 --seed 1234    # that call again
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
BATCH = 2500
# Threads sleep between regions: batches run beside each other, and one that spins takes a core.
PASSIVE = {**os.environ, "OMP_WAIT_POLICY": "passive"}


def ops() -> list[str]:
    """Every op but those of communicators, which need peers (tests/test_comm.py)."""
    import torch

    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "quaver::" in n}
    return sorted(name for name in names if not name.startswith("comm_"))


def leaves(value):
    return [t for v in value for t in leaves(v)] if isinstance(value, (list, tuple)) else [value]


def results(op: str, args: list, out) -> list:
    """The results of an op, or the tensors it wrote if it returns nothing."""
    import torch

    if out is None:
        schema = getattr(torch.ops.quaver, op).default._schema.arguments
        out = [a for a, s in zip(args, schema, strict=False) if s.alias_info is not None]
    return leaves(out if isinstance(out, (list, tuple)) else [out])


def run_one(seed: int, names: list[str]) -> str:
    """Makes the call of a seed and checks it; returns how it ended."""
    import oracle
    import torch
    from generate import Generator
    from helpers import assert_same, isa
    from memory import clone, wrote_outside

    from quaver import _C

    op, args, valid = Generator(seed).call(names)
    call = getattr(torch.ops.quaver, op)
    before = clone(args)
    try:
        out = call(*args)
    except MemoryError:
        raise
    except Exception as error:
        if valid:
            raise AssertionError(f"a valid call was refused: {error}") from error
        out = error
    schema = call.default._schema.arguments
    for argument, then, now in zip(schema, before, args, strict=False):
        written = argument.alias_info is not None and not isinstance(out, Exception)
        for a, b in zip(leaves([then]), leaves([now]), strict=True):
            if isinstance(b, torch.Tensor):
                assert not wrote_outside(a, b, written), f"{argument.name}: other memory changed"
    if isinstance(out, Exception):
        return "refused"
    got = [t for t in results(op, args, out) if isinstance(t, torch.Tensor)]
    if any(t.is_meta for t in leaves(args) if isinstance(t, torch.Tensor)):
        assert all(t.is_meta for t in got), "memory that nothing wrote"
        return "meta"
    for name in _C.available_isas()[1:] if not op.startswith(("gemm", "grouped", "linear")) else []:
        again = clone(before)
        with isa(name):
            other = results(op, again, call(*again))
        for i, (a, b) in enumerate(zip(got, other, strict=True)):
            assert_same(a, b, f"{name}, result {i}", any_nan=True)
    wanted = oracle.EXACT[op](*clone(before)) if op in oracle.EXACT and valid else None
    for i, (a, b) in enumerate(zip(got, wanted or [], strict=wanted is not None)):
        if b is not None:
            assert_same(a, b, f"result {i}", any_nan=True)
    return "exact" if wanted else "done"


def work(first: int, calls: int, progress: str) -> None:
    """A batch, in this process. Leaves the seed of the call that runs in the file `progress`."""
    import torch

    import quaver  # noqa: F401

    torch.set_num_threads(2)  # one could not race
    names, ends = ops(), {}
    with open(progress, "r+b", buffering=0) as file:
        for seed in range(first, first + calls):
            file.seek(0)
            file.write(b"%20d" % seed)
            try:
                end = run_one(seed, names)
            except AssertionError as error:
                raise SystemExit(f"seed {seed}: {describe(seed, names)}\n{error}") from error
            ends[end] = ends.get(end, 0) + 1
    print(ends)


def describe(seed: int, names: list[str]) -> str:
    import torch
    from generate import Generator

    op, args, valid = Generator(seed).call(names)

    def text(value):
        if isinstance(value, torch.Tensor):
            where = f"+{value.first}" if hasattr(value, "first") else value.device
            return f"{value.dtype} {list(value.shape)} strides {value.stride()} {where}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return repr(value)

    schema = getattr(torch.ops.quaver, op).default._schema.arguments
    named = [f"\n  {s.name}: {text(a)}" for s, a in zip(schema, args, strict=False)]
    return f"{op}, {'valid' if valid else 'wild'}{''.join(named)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.seed, args.calls, args.worker)
        return 0
    began, end = time.monotonic(), args.seed + args.calls
    firsts = range(args.seed, end, BATCH)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(batch, firsts, [min(BATCH, end - first) for first in firsts]):
            print(found.text, flush=True)
            if found.failed:
                pool.shutdown(cancel_futures=True)
                return 1
    print(f"{args.calls} calls in {time.monotonic() - began:.0f} s: nothing found")
    return 0


class Batch(NamedTuple):
    text: str
    failed: bool


def batch(first: int, calls: int) -> Batch:
    """Makes the calls of some seeds in a process of their own."""
    with tempfile.NamedTemporaryFile() as progress:
        command = [sys.executable, "-W", "ignore", __file__, "--seed", str(first)]
        command += ["--calls", str(calls), "--worker", progress.name]
        result = subprocess.run(command, capture_output=True, text=True, env=PASSIVE)
        text = f"seeds {first} to {first + calls - 1}: {result.stdout.strip()}"
        if not result.returncode:
            return Batch(text, False)
        seed = Path(progress.name).read_text().strip()
    errors = f"{result.stderr[:3000]}\n...\n{result.stderr[-1000:]}"
    return Batch(f"{text}\n{errors}\nended with {result.returncode} in seed {seed}", True)


if __name__ == "__main__":
    sys.exit(main())
