"""The CPU time of `import quaver` after `import torch`: the median of new processes."""

import argparse
import os
import statistics
import subprocess
import sys

import common

CODE = """
import time, torch
start = time.process_time()
import quaver
print(time.process_time() - start)
"""


def milliseconds() -> float:
    """Of a new process, which finds or leaves compiled bytecode, as an installed package has it."""
    command = [sys.executable, "-c", CODE]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, env=env, capture_output=True, check=True, text=True)
    return 1e3 * float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=9, help="processes")
    times = parser.parse_args().times
    print(common.describe(common.machine()))
    milliseconds()
    taken = statistics.median(milliseconds() for _ in range(times))
    what = "import quaver after import torch: milliseconds of CPU time"
    common.finish("import", [common.judge(what, taken, "at most", 60)])


if __name__ == "__main__":
    main()
