"""The CPU time of `import quaver` after `import torch`: the median of new processes.

torch's import leaves Python's garbage collector a few hundred objects short of a pass over all of
torch's, about 70 ms, which falls to whatever is imported or made next. The bar is for the import
without that pass; the time with it stands beside.
"""

import argparse
import os
import statistics
import subprocess
import sys

import common

CODE = """
import gc, time, torch
if {paused}:
    gc.disable()
start = time.process_time()
import quaver
print(time.process_time() - start)
"""


def milliseconds(paused: bool) -> float:
    """Of a new process, which finds or leaves compiled bytecode, as an installed package has it."""
    command = [sys.executable, "-c", CODE.format(paused=paused)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, env=env, capture_output=True, check=True, text=True)
    return 1e3 * float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=9, help="processes")
    times = parser.parse_args().times
    print(common.describe(common.machine()))
    milliseconds(False)
    paused, whole = (
        statistics.median(milliseconds(paused) for _ in range(times)) for paused in (True, False)
    )
    what = "import quaver after import torch: milliseconds of CPU time"
    row = common.judge(what, paused, "at most", 60, with_pass=whole)
    print(f"with the collector's pass: {whole:.4g}")
    common.finish("import", [row])


if __name__ == "__main__":
    main()
